"""The backends of a libllama that keeps them in libraries of their own (GGML_BACKEND_DL), as ours does.

Its folder has a CPU backend for each generation of processors, `libggml-cpu-VARIANT.so`, one of which this
process takes: the best that the machine can run, or the one that was asked for. Backends of graphics cards
may lie beside them, and count where their drivers are. A libllama that was compiled on the machine has what
it needs inside, and one variant only.
"""

import ctypes
import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.errors import BadRequest, SetupNeeded

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = "cordee_libllama"  # the wheel with the libraries; see packaging/
BINDINGS = "llama_cpp"
LIBRARY_PATH = "LLAMA_CPP_LIB_PATH"  # where the bindings look for libllama
VARIABLE = "CORDEE_CPU_VARIANT"  # what workers are told by who starts them
NATIVE = "native"  # the variant of a libllama that was compiled on this machine
# What `common` stands for: AVX2 and FMA. PCs have had them since 2013 (Intel) and 2015 (AMD); what AVX-512
# adds changes the bits of most weight types.
COMMON = "haswell"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
CPU = "ggml-cpu-"


@dataclass(frozen=True)
class Backends:
    """What of libllama this process computes with."""

    cpu_variant: str
    cpu_variants: tuple[str, ...]  # those that this machine can run, the best first
    files: tuple[Path, ...]  # all libraries in use

    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of all libraries in use, by name."""
        whole = hashlib.sha256()
        for path in sorted(self.files, key=lambda path: path.name):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            whole.update(path.name.encode() + b"\0" + digest)
        return whole.hexdigest()[:12]


def find_libraries() -> None:
    """Let the bindings load our prebuilt libraries, if they came with none and nobody named others."""
    folder = prebuilt()
    if folder is not None:
        os.environ.setdefault(LIBRARY_PATH, str(folder))


def prebuilt() -> Path | None:
    """The folder of our prebuilt libraries; None where libllama was compiled on this machine.

    Who compiles it although the wheel is there, for a graphics card for example, wants what was compiled.
    """
    bindings, package = map(importlib.util.find_spec, (BINDINGS, PACKAGE))
    if bindings is None or package is None or bindings.origin is None or package.origin is None:
        return None
    if (Path(bindings.origin).parent / "lib").is_dir():
        return None
    return Path(package.origin).with_name("lib")


def load(folder: Path, registry: ctypes.CDLL) -> Backends:
    """Load the backends of the libllama in `folder`; `registry` is its library `ggml`.

    Raises:
        BadRequest: this machine cannot run the variant that VARIABLE names.
        SetupNeeded: there is none that it can run.
    """
    wanted = os.environ.get(VARIABLE, "")
    name = COMMON if wanted == "common" else wanted
    core = [path for path in _libraries(folder, "") if _kind(path) in ("llama", "ggml", "ggml-base")]
    if registry.ggml_backend_reg_count():
        if name not in ("", NATIVE):
            raise BadRequest(
                f"There is no CPU variant {wanted!r} here: this libllama was compiled for this machine. "
                f"Install Cordée from its wheels, or leave the choice out (--cpu-variant, {VARIABLE})."
            )
        return Backends(NATIVE, (NATIVE,), tuple(_libraries(folder, "")))
    cpus = {_kind(path).removeprefix(CPU): path for path in _libraries(folder, CPU)}
    scores = {variant: ctypes.CDLL(str(path)).ggml_backend_score() for variant, path in cpus.items()}
    usable = sorted((variant for variant, score in scores.items() if score), key=lambda each: -scores[each])
    if not usable:
        raise SetupNeeded(f"libllama in {folder} has no CPU backend for this machine: install Cordée anew.")
    if name and name not in usable:
        raise BadRequest(
            f"This machine cannot run the CPU variant {name!r}: it can run {', '.join(usable)} "
            f"(--cpu-variant, {VARIABLE})."
        )
    variant = name or usable[0]
    add = registry.ggml_backend_load
    add.restype, add.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    cards = [path for path in _libraries(folder, "ggml-") if path not in core and path not in cpus.values()]
    used = [path for path in cards if add(os.fsencode(path))]  # without its driver, a card's does not load
    if not add(os.fsencode(cpus[variant])):
        raise SetupNeeded(f"{cpus[variant]} does not load: install Cordée anew.")
    return Backends(variant, tuple(usable), (*core, *used, cpus[variant]))


def _libraries(folder: Path, kind: str) -> "Iterable[Path]":
    """The libraries whose names begin so, without the names with versions that lie beside them."""
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    return [path for path in paths if _kind(path).startswith(kind)]


def _kind(path: Path) -> str:
    """`ggml-cpu-haswell` of `libggml-cpu-haswell.so`."""
    return path.name.removesuffix(SUFFIX).removeprefix("lib")
