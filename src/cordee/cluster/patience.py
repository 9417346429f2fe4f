"""How long a node waits for the stages of others before it doubts their nodes (doubts.py). Pure.

A placement that was chosen has to come to serve. Each stage that another node is to run is watched, by what
that node says of it:

    state           late when
    (none)          it was not reported for REPORT_SECONDS
    fetching        it grew by less than FETCH_BYTES_PER_SECOND for FETCH_SECONDS
    loading         it takes longer than LOAD_SECONDS, and its bytes at READ_BYTES_PER_SECOND_MIN
    loaded          all are loaded for WIRE_SECONDS, no two of them doubt each other, and it is not wired yet,
                    or was given new ids all the time instead

The figures are those of the slowest machine that would still be of use, so nobody who works is late. Whoever
says that it goes on, and does not, holds up a model for as long once, and each time after a longer pause.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cordee.cluster.choose import Chosen, Planning, Reports
from cordee.cluster.doubts import Exclusions
from cordee.cluster.facts import Facts, Gauges, Placement, StageReport, placement_id
from cordee.cluster.goals import READ_BYTES_PER_SECOND_MIN

REPORT_SECONDS = 12.0  # a node that has just started listens for a quarter of this before it plans
FETCH_SECONDS = 60.0  # a download that pauses; a hub that is asked again
FETCH_BYTES_PER_SECOND = 10_000  # the poorest line
LOAD_SECONDS = 15.0  # to start a process and what it imports, on a machine that something else keeps busy
WIRE_SECONDS = 15.0  # an attempt takes 10 s at most (worker/tls_link.py), and the next follows


@dataclass(eq=False)
class _Watch:
    """Since when a stage is in a state, and with how many bytes done; `worker` was its id then."""

    state: str
    since: float
    done_bytes: int = 0
    worker: str = ""


class Patience:
    """What one node waits for. `now` is a clock that never jumps, in seconds."""

    def __init__(self, me: str, planning: Planning) -> None:
        self._me = me
        self._planning = planning
        self._watches: dict[tuple[str, int], _Watch] = {}

    def late(
        self,
        chosen: Mapping[str, tuple[Chosen, ...]],
        facts: Mapping[str, Facts],
        gauges: Mapping[str, Gauges],
        now: float,
    ) -> Iterator[tuple[str, str]]:
        """The other nodes whose stages are late, with the reason; to be called at least once a heartbeat."""
        waited: set[tuple[str, int]] = set()
        if any(not pick.wiring or pick.successor for picks in chosen.values() for pick in picks):
            reports, exclusions = Reports(facts), Exclusions(facts)
            for model, picks in chosen.items():
                for pick in picks:
                    placement = pick.successor if pick.wiring else pick.placement
                    if placement is not None:
                        stages = reports.stages(placement)
                        self._look(placement, stages, gauges, now)
                        waited |= {(placement_id(placement), index) for index in range(len(stages))}
                        doubted = exclusions.concern({place.node for place in placement.stages})
                        yield from self._late(model, pick, placement, stages, now, doubted)
        for key in self._watches.keys() - waited:
            del self._watches[key]

    def _look(
        self,
        placement: Placement,
        stages: list[StageReport | None],
        gauges: Mapping[str, Gauges],
        now: float,
    ) -> None:
        """Begin to wait anew where something has changed."""
        name = placement_id(placement)
        ready = all(report is not None and report.state in ("loaded", "wired") for report in stages)
        for index, report in enumerate(stages):
            state = "" if report is None else report.state
            if state in ("loaded", "wired"):
                state = "ready" if ready else "loaded"
            watch = self._watches.get((name, index))
            if watch is None or watch.state != state or not watch.since <= now:
                worker = "" if report is None else report.worker
                watch = self._watches[name, index] = _Watch(state, now, worker=worker)
            if state == "fetching":
                _advance(watch, _done_bytes(placement, index, gauges), now)

    def _late(
        self,
        model: str,
        pick: Chosen,
        placement: Placement,
        stages: list[StageReport | None],
        now: float,
        doubted: bool,
    ) -> Iterator[tuple[str, str]]:
        name, found = placement_id(placement), list[tuple[str, str, bool]]()
        for index, (place, report) in enumerate(zip(placement.stages, stages, strict=True)):
            watch = self._watches[name, index]
            waited, what = now - watch.since, f"layers {place.first} to {place.last - 1} of {model}"
            if place.node == self._me:
                continue
            if watch.state == "" and waited > REPORT_SECONDS:
                yield place.node, f"it does not begin with {what} ({waited:.0f} s)"
            elif watch.state == "fetching" and waited > FETCH_SECONDS:
                yield place.node, f"it says that it fetches {what}, without progress for {waited:.0f} s"
            elif watch.state == "loading":
                nbytes = self._planning.stage_bytes(pick.shape, placement, index)
                if waited > LOAD_SECONDS + nbytes / READ_BYTES_PER_SECOND_MIN:
                    yield place.node, f"it says that it loads {what}, for {waited:.0f} s now"
            elif watch.state == "ready" and waited > WIRE_SECONDS and report is not None and not doubted:
                renamed = report.worker != watch.worker
                if renamed or report.state != "wired":
                    reason = f"it has loaded {what}, but does not join the other stages ({waited:.0f} s)"
                    found.append((place.node, reason, renamed))
        # One that begins anew again and again keeps the others from being wired; they are not to blame.
        worst = any(renamed for _, _, renamed in found)
        yield from ((node, reason) for node, reason, renamed in found if renamed == worst)


def _advance(watch: _Watch, done_bytes: int, now: float) -> None:
    """Bytes that came too slowly do not count."""
    if done_bytes < watch.done_bytes:  # it began anew; or another slice is fetched
        watch.done_bytes = done_bytes
    elif done_bytes - watch.done_bytes >= FETCH_BYTES_PER_SECOND * max(now - watch.since, 1.0):
        watch.since, watch.done_bytes = now, done_bytes


def _done_bytes(placement: Placement, index: int, gauges: Mapping[str, Gauges]) -> int:
    """How far a stage's slice, or another of the model at its node, is fetched."""
    place = placement.stages[index]
    fetching = gauges[place.node].fetching if place.node in gauges else ()
    return sum(each.done_bytes for each in fetching if each.model == placement.model)
