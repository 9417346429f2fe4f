"""Which file of native/ may lean on which: rooms by what they include, files without circles."""

import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
# How weights and the cache lie in memory: the engine cuts them, kernels read them.
LAYOUTS = ("engine/cache.h", "engine/matrix.h")
# Rooms, or single headers, that a room may include beside its own; include/ is for all.
ROOMS = {
    "base": (),
    "tokenizer": (),
    "kernels": ("base", *LAYOUTS),
    "pentium2": ("base", "kernels", *LAYOUTS),
    "engine": ("base", "kernels", "pentium2"),
    "cli": ("base", "pentium2"),
}
PUBLIC_HEADERS = ("ternary.h", "tokenizer.h")
LINES_MAX = 600
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
# What a file defines for others: it begins a line, is not static and no declaration.
FUNCTION = re.compile(r"^(?!static|INLINE|typedef)\w[\w *]*?\b(\w+)\([^;{]*\)\n\{", re.MULTILINE)
TABLE = re.compile(r"^const [\w *]*?\b(\w+)(?:\[.*\])? = ", re.MULTILINE)


@cache
def files() -> dict[str, str]:
    """Each file by its room and name, without comments."""
    found = [*(NATIVE / "src").glob("*/*"), *(NATIVE / "cli").iterdir()]
    return {
        f"{path.parent.name}/{path.name}": COMMENT.sub("", path.read_text(encoding="utf-8")) for path in found
    }


def included(name: str) -> list[str]:
    """Room and name of the headers that a file includes, those of include/ left out."""
    room = name.partition("/")[0]
    return [
        header if "/" in header else f"{room}/{header}"
        for header in INCLUDE.findall(files()[name])
        if header not in PUBLIC_HEADERS
    ]


def unit(name: str) -> str:
    """A source and its header are one."""
    return name.rpartition(".")[0]


def test_every_file_lies_in_a_room() -> None:
    assert {name.partition("/")[0] for name in files()} == set(ROOMS)
    assert not [path.name for path in (NATIVE / "src").iterdir() if path.is_file()]


def test_files_are_short() -> None:
    lengths = {name: text.count("\n") for name, text in files().items()}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES_MAX}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_includes_only_what_it_stands_on(room: str) -> None:
    faults = []
    for name in (name for name in files() if name.startswith(f"{room}/")):
        for header in included(name):
            assert header in files(), f"{name} includes {header}, which is not there"
            allowed = (room, *ROOMS[room])
            if header not in allowed and header.partition("/")[0] not in allowed:
                faults.append(f"{name} includes {header}")
    assert not faults


def test_files_lean_on_one_another_in_no_circle() -> None:
    owners = {
        found: name
        for name, text in files().items()
        if name.endswith(".c")
        for pattern in (FUNCTION, TABLE)
        for found in pattern.findall(text)
    }
    assert {"ternary_decode", "kernels_amx", "output_put", "unicode_classes"} <= set(owners)
    leans: dict[str, set[str]] = {}
    for name, text in files().items():
        words = set(re.findall(r"\w+", text))
        used = {owners[word] for word in words & set(owners)} if name.endswith((".c", ".inc")) else set()
        leans.setdefault(unit(name), set()).update(map(unit, {*used, *included(name)}))
    for name, others in leans.items():
        others.discard(name)
    try:
        TopologicalSorter(leans).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}", pytrace=False)
