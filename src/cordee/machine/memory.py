"""How much memory there is: the machine's, within the limits of the control groups (containers) we are in.

The kernel's files: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# What the processes take that start when the memory for stages has been promised. That of a vocabulary
# (engine/vocabulary.py): measured, 44 MB for the 49,152 tokens of the starter and 66 MB for 200,000, of which
# 10 MB are libraries that the stages load as well. One that plans takes 25 MB, a verb that somebody types 50.
BESIDE_BYTES = 60_000_000 + 75_000_000


@dataclass(frozen=True)
class _Names:
    """The names of a control group's files."""

    limit: str
    usage: str
    cache: tuple[str, str]  # in memory.stat: memory that the kernel reclaims on demand


V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class Memory:
    """Memory of a machine; `available_bytes` can be used without swapping."""

    total_bytes: int
    available_bytes: int


def memory(root: Path = Path("/")) -> Memory:
    """The memory that this process may use; `root` is where /proc and /sys are found."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, usage in _groups(root):
        total = min(total, limit)
        available = min(available, max(limit - usage, 0))
    return Memory(total, available)


def memory_for_stages() -> int:
    """Bytes that stages may take of this machine's memory: not all that is free, since other processes of
    ours start beside them."""
    return max(0, memory().available_bytes - BESIDE_BYTES)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, usage without cache) in bytes of each group that limits this process, innermost first."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, kinds, path = line.split(":", 2)
        if kinds == "memory":
            names, top = V1, root / "sys/fs/cgroup/memory"
        elif number == "0":
            names, top = V2, root / "sys/fs/cgroup"
        else:
            continue
        # Inside a container the path may be the one outside of it: then only the top folder is there.
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            limit = _read(folder / names.limit)
            if limit.isdigit():
                yield int(limit), _usage(folder, names)
            if folder == top:
                break


def _usage(folder: Path, names: _Names) -> int:
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    cache = sum(int(stat.get(name, 0)) for name in names.cache)
    return max(0, int(_read(folder / names.usage) or 0) - cache)


def _read(path: Path) -> str:
    """The text of a small system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
