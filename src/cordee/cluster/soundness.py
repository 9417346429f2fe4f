"""What is heard is sound, or dropped: bounds on all that a node may say, and that a disk may hold.

Types are checked where messages are decoded. Here it is sizes, ranges and characters, by one rule for each
kind of value: a heartbeat that passes can be held, compared, planned with and printed at a known cost.

    text      printable, so that no escape sequence reaches a terminal; TEXT_CHARS_MAX
    integer   0 to INTEGER_MAX
    number    0 to NUMBER_MAX
    bytes     BYTES_MAX
    items     ITEMS_MAX, or fewer where COUNTS says so
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import cast

import msgspec

from cordee.cluster.facts import NODES_MAX, Facts, Gauges, ModelShape, Placement

TEXT_CHARS_MAX = 2000  # a reason with a path in it; an endpoint with all of a machine's addresses
INTEGER_MAX = 1 << 56  # bytes of any disk
NUMBER_MAX = 1e18  # of times, speeds and rates; a NaN is not in this range
BYTES_MAX = 1024  # a revocation
ITEMS_MAX = 1024  # layers of a model, or slices on a disk
PLACES_MAX = 8192  # stages of all placements that a node reports stages of: 128 of each of 64 models
# Fewer than ITEMS_MAX: what planning takes time for grows with these.
COUNTS: Mapping[tuple[type, str], int] = {
    (Facts, "devices"): 64,
    (Facts, "stages"): 256,
    (Facts, "offers"): 256,
    (Facts, "doubts"): NODES_MAX,
    (Facts, "rtts"): NODES_MAX,
    (Facts, "bytes_per_second"): NODES_MAX,
    (Placement, "stages"): NODES_MAX,
    (Gauges, "hosted"): 256,
    (Gauges, "fetching"): 256,
    (Gauges, "reading"): 256,
    (Gauges, "used"): 64,
}


def fault(said: msgspec.Struct, known: object = None) -> str:
    """What is wrong with a struct that was heard or read, "" if it is sound; the field is named.

    `known` is an object that was found sound before: a field that is this very object is passed over.
    """
    return next(_faults(said, type(said).__name__, known=known), "")


def plain(text: str) -> str:
    """A text as a sound one: for what this node says of itself, from sources that it does not control."""
    return "".join(c if c.isprintable() else " " for c in text[:TEXT_CHARS_MAX])


def _faults(value: object, where: str, count_max: int = ITEMS_MAX, known: object = None) -> Iterator[str]:
    if isinstance(value, ModelShape):
        if found := _shape_fault(value):
            yield f"{where}.{found}"
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            field = getattr(value, name)
            if field is known and known is not None:
                continue
            yield from _faults(field, f"{where}.{name}", COUNTS.get((type(value), name), ITEMS_MAX))
        if isinstance(value, Facts):
            yield from _facts_faults(value, where)
    elif isinstance(value, str):
        if len(value) > TEXT_CHARS_MAX or not value.isprintable():
            yield f"{where} is longer than {TEXT_CHARS_MAX} characters, or not printable"
    elif isinstance(value, bytes):
        if len(value) > BYTES_MAX:
            yield f"{where} has {len(value)} bytes, at most {BYTES_MAX} are expected"
    elif isinstance(value, dict | tuple):
        items = cast("dict[object, object] | tuple[object, ...]", value)
        yield from _items_faults(items, where, count_max)
    else:
        yield from _number_faults(value, where)


def _items_faults(
    items: dict[object, object] | tuple[object, ...], where: str, count_max: int
) -> Iterator[str]:
    if len(items) > count_max:
        yield f"{where} has {len(items)} items, at most {count_max} are expected"
        return
    kinds = set(map(type, items))
    if isinstance(items, tuple) and kinds and kinds <= {int, bool}:  # what a shape says by layer: at once
        numbers = cast("tuple[int, ...]", items)
        if min(numbers) >= 0 and max(numbers) <= INTEGER_MAX:
            return
    if isinstance(items, dict):
        for key, value in items.items():
            yield from _faults(key, where)
            yield from _faults(value, where)
    else:
        for value in items:
            yield from _faults(value, where)


def _facts_faults(facts: Facts, where: str) -> Iterator[str]:
    names = [device.name for device in facts.devices]
    if len(set(names)) < len(names):
        yield f"{where}.devices has two of one name"
    places = sum(len(report.placement.stages) for report in facts.stages)
    if places > PLACES_MAX:
        yield f"{where}.stages names {places} stages, at most {PLACES_MAX} are expected"


def _number_faults(value: object, where: str) -> Iterator[str]:
    if isinstance(value, float):
        if not 0 <= value <= NUMBER_MAX:
            yield f"{where} is {value}"
    elif isinstance(value, int) and not 0 <= value <= INTEGER_MAX:
        yield f"{where} is {value}, which is no count"


@lru_cache(maxsize=1024)  # the same few shapes come with every heartbeat of every node
def _shape_fault(shape: ModelShape) -> str:
    if not shape.cut_step:
        return "cut_step is 0"
    for name in shape.__struct_fields__:
        for found in _faults(getattr(shape, name), name):
            return found
    return ""
