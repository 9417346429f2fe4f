"""Which slices may go when a node's disk is short: pure, and safe though every node decides alone.

A slice goes only if nothing of this node needs it, and only while the disk has less free than its reserve;
the one that was used longest ago goes first. That other nodes have its layers is not enough, as they may be
short of disk at the same moment and think the same. So the nodes that hold a layer stand in a fixed order
(those with the whole model first, then by a hash), and the first COPIES of them keep it: nodes that share a
view let go of different copies, and never of the last ones.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cordee.cluster.facts import SliceHeld
from cordee.cluster.goals import DISK_RESERVE_BYTES, SliceGoal

COPIES = 2  # nodes that keep each layer


class StoredSlice(NamedTuple):
    """A slice on this node's disk, which takes `nbytes` of it. `used`: when last, in seconds of any clock."""

    held: SliceHeld
    nbytes: int
    used: float


def removable(
    me: str,
    slices: Iterable[StoredSlice],
    wanted: Iterable[SliceGoal],
    others: Mapping[str, Sequence[SliceHeld]],
    free_bytes: int,
) -> list[SliceHeld]:
    """What to remove now, in this order.

    `others` is what the other live nodes hold, `wanted` what this node is to hold or runs.
    """
    missing, slices, wanted = DISK_RESERVE_BYTES - free_bytes, list(slices), set(wanted)
    unmet = wanted - {_goal(stored.held) for stored in slices}
    models = {goal.model for goal in wanted}
    found: list[SliceHeld] = []
    for stored in sorted(slices, key=lambda stored: (stored.used, _goal(stored.held))):
        if missing <= 0:
            break
        held = stored.held
        is_embedding = held.last == 0 and held.model in models  # a host needs it beside its layers
        needed = is_embedding or _goal(held) in wanted or any(_overlap(held, goal) for goal in unmet)
        if not needed and _kept_elsewhere(me, held, others):
            found.append(held)
            missing -= stored.nbytes
    return found


def _goal(held: SliceHeld) -> SliceGoal:
    return SliceGoal(held.model, held.first, held.last)


def _overlap(held: SliceHeld, goal: SliceGoal) -> bool:
    """Whether some of a goal can be copied from a slice: two cuts of one model share layers."""
    return held.model == goal.model and held.first < goal.last and goal.first < held.last


def _kept_elsewhere(me: str, held: SliceHeld, others: Mapping[str, Sequence[SliceHeld]]) -> bool:
    layers = range(held.first, held.last) if held.last else (None,)
    return all(_before(me, held.model, layer, others) >= COPIES for layer in layers)


def _before(me: str, model: str, layer: int | None, others: Mapping[str, Sequence[SliceHeld]]) -> int:
    """How many nodes that hold a layer (None: the embedding) keep it rather than we do."""
    count = 0
    for node, slices in others.items():
        having = [held for held in slices if held.model == model and _has(held, layer)]
        if any(held.whole for held in having) or (having and _lot(model, node) < _lot(model, me)):
            count += 1
    return count


def _has(held: SliceHeld, layer: int | None) -> bool:
    return held.whole or (held.last == 0 if layer is None else held.first <= layer < held.last)


def _lot(model: str, node: str) -> bytes:
    return hashlib.sha256(f"{model} {node}".encode()).digest()
