"""What happened to the placements of models, as one node saw it, and why: for people to read.

The reasons are read from what is known when a change is seen. Each node has its own history; nothing is
decided by it. A history also keeps *snapshots*: which nodes there were and what ran where, each time that
this changed, so that people can look back at it.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from cordee.cluster.choose import Chosen, Reports
from cordee.cluster.facts import Facts, Placement, placement_id
from cordee.cluster.membership import Liveness

log = logging.getLogger(__name__)

CHANGES_KEPT = 64  # a page or two
SNAPSHOTS_KEPT = 256  # each has some 100 bytes for each node and stage

Nodes = Mapping[str, tuple[Liveness, Facts]]


class Change(msgspec.Struct, frozen=True):
    """`clock` is in seconds since 1970, as the node believes."""

    clock: float
    model: str
    text: str


class NodeSeen(NamedTuple):
    """A node in a snapshot."""

    id: str
    name: str
    state: Liveness
    draining: bool


class ModelSeen(NamedTuple):
    """A model in a snapshot: whether it `serves`, and its stages as (node, first layer, the layer after)."""

    name: str
    serves: bool
    stages: tuple[tuple[str, int, int], ...]


class Snapshot(msgspec.Struct, frozen=True):
    """What there was from `clock` on, which is in seconds since 1970, as the node believes."""

    clock: float
    nodes: tuple[NodeSeen, ...]
    models: tuple[ModelSeen, ...]


class History:
    """Notes what changed of what should run, since it was last asked to."""

    def __init__(self) -> None:
        self.changes: deque[Change] = deque(maxlen=CHANGES_KEPT)
        self.count = 0  # of all changes
        self.snapshots: deque[Snapshot] = deque(maxlen=SNAPSHOTS_KEPT)
        self._before: Mapping[str, tuple[Chosen, ...]] = {}

    def note(self, chosen: Mapping[str, tuple[Chosen, ...]], nodes: Nodes, clock: float) -> None:
        """Compare what is `chosen` now with the time before; the reasons are read from `nodes`."""
        self._note_snapshot(chosen, nodes, clock)
        if chosen == self._before:
            return
        for model in sorted(chosen.keys() | self._before.keys()):
            if model not in chosen:
                self._add(Change(clock, model, "no longer deployed"))
                continue
            for text in _changes(_by_id(self._before.get(model, ())), _by_id(chosen[model]), nodes):
                self._add(Change(clock, model, text))
        self._before = chosen

    def _note_snapshot(self, chosen: Mapping[str, tuple[Chosen, ...]], nodes: Nodes, clock: float) -> None:
        seen = tuple(
            NodeSeen(node, facts.name, state, facts.draining)
            for node, (state, facts) in sorted(nodes.items())
        )
        models = tuple(
            ModelSeen(
                name,
                any(pick.wiring for pick in picks),
                tuple((each.node, each.first, each.last) for pick in picks for each in pick.placement.stages),
            )
            for name, picks in sorted(chosen.items())
        )
        last = self.snapshots[-1] if self.snapshots else None
        if last is None or (last.nodes, last.models) != (seen, models):
            self.snapshots.append(Snapshot(clock, seen, models))

    def _add(self, change: Change) -> None:
        self.changes.append(change)
        self.count += 1
        log.info("%s: %s", change.model, change.text)


def where(placement: Placement, nodes: Nodes) -> str:
    """A placement in words: `layers 0-14 on a, 15-29 on b`."""
    stages = [f"{place.first}-{place.last - 1} on {_name(place.node, nodes)}" for place in placement.stages]
    return f"layers {', '.join(stages)}"


def _by_id(picks: Iterable[Chosen]) -> dict[str, Chosen]:
    return {placement_id(pick.placement): pick for pick in picks}


def _changes(before: Mapping[str, Chosen], now: Mapping[str, Chosen], nodes: Nodes) -> list[str]:
    lost = [pick.placement for name, pick in before.items() if name not in now]
    new = [pick.placement for name, pick in now.items() if name not in before]
    texts = [f"placed: {where(placement, nodes)}" for placement in new]
    if new and lost:
        is_alike = _demand(new[0]) == _demand(lost[0])
        reason = "a better placement" if is_alike else "deployed with other options"
        texts[0] += f" ({_fault(lost[0], nodes) or reason})"
    elif lost:
        texts.append(f"runs nowhere: {_fault(lost[0], nodes) or 'no machines have room for it'}")
    for name, pick in now.items():
        was = before[name].wiring if name in before else ""
        if was and not pick.wiring:
            fault = _fault(pick.placement, nodes, wanted=True) or "its stages are being connected again"
            texts.append(f"interrupted: {fault}")
        elif was != pick.wiring:
            texts.append("serves")
    return texts


def _demand(placement: Placement) -> tuple[int, int]:
    return placement.context, placement.sequences


def _fault(placement: Placement, nodes: Nodes, *, wanted: bool = False) -> str:
    """What happened to a placement that no longer serves; empty if nothing did.

    Unless it is `wanted` still, a stage that is not reported was just stopped, and no fault.
    """
    reports = Reports({node: facts for node, (_, facts) in nodes.items()}).stages(placement)
    for place, report in zip(placement.stages, reports, strict=True):
        name = _name(place.node, nodes)
        state = nodes[place.node][0] if place.node in nodes else "gone"
        if state != "alive":
            return f"{name} is gone" if state == "gone" else f"{name} has gone silent"
        if nodes[place.node][1].draining:
            return f"{name} is being drained"
        if report is not None and report.state == "failed":
            return f"{name} cannot run its stage: {report.detail}"
        if report.state in ("fetching", "loading") if report is not None else wanted:
            return f"{name} lost its stage"
    return ""


def _name(node: str, nodes: Nodes) -> str:
    return nodes[node][1].name if node in nodes else node
