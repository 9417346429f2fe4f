"""Patience: whose stages are late, and whose are not."""

from collections.abc import Iterable

import msgspec
import pytest

from clusters import LAYER_BYTES, Simple, facts_of, placed, running, shape_of
from cordee.cluster import patience
from cordee.cluster.choose import Chosen
from cordee.cluster.facts import Doubt, Facts, Fetching, Gauges, Placement, StageReport
from cordee.cluster.patience import Patience

HALVES = placed(("a", 0, 2), ("b", 2, 4))
PICK = {"m": (Chosen(shape_of(), HALVES, "", None),)}


def nodes(
    *stages: StageReport | None, placement: Placement = HALVES, **more: tuple[Doubt, ...]
) -> dict[str, Facts]:
    """The facts of a placement's nodes that report these stages."""
    return {
        place.node: msgspec.structs.replace(
            facts_of(place.node, stages=[] if report is None else [report]), doubts=more.get(place.node, ())
        )
        for place, report in zip(placement.stages, stages, strict=True)
    }


def report(index: int, state: str, worker: str = "", placement: Placement = HALVES) -> StageReport:
    return StageReport(placement, index, state, worker or f"w{index}")  # type: ignore[arg-type]


def first_late(
    facts: Iterable[dict[str, Facts]], gauges: Iterable[dict[str, Gauges]] = (), me: str = "a"
) -> tuple[int, list[tuple[str, str]]]:
    """After how many seconds somebody is late, with what is heard each second, and who; -1: nobody."""
    waiting, seen = Patience(me, Simple()), iter(gauges)
    for second, each in enumerate(facts):
        late = list(waiting.late(PICK, each, next(seen, {}), float(second)))
        if late:
            return second, late
    return -1, []


MY = report(0, "loaded")


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        (None, patience.REPORT_SECONDS),
        (report(1, "loading"), patience.LOAD_SECONDS),
        (report(1, "fetching"), patience.FETCH_SECONDS),
        (report(1, "loaded"), patience.WIRE_SECONDS),
    ],
    ids=["unheard", "loading", "fetching", "loaded"],
)
def test_each_state_has_its_time_and_the_reason_names_layers_and_model(
    stage: StageReport | None, seconds: float
) -> None:
    second, late = first_late([nodes(MY, stage)] * 200)
    assert seconds < second <= seconds + 2
    [(node, reason)] = late
    assert node == "b" and "layers 2 to 3 of m" in reason


def test_what_fails_by_itself_and_what_is_our_own_is_not_waited_for() -> None:
    assert first_late([nodes(MY, report(1, "failed"))] * 200) == (-1, [])
    assert first_late([nodes(report(0, "loading"), MY)] * 200, me="a")[1][:0] == []
    second, late = first_late([nodes(report(0, "loading"), report(1, "loaded"))] * 200, me="b")
    assert [node for node, _ in late] == ["a"] and second > 0


def test_large_slices_may_load_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "READ_BYTES_PER_SECOND_MIN", LAYER_BYTES / 10)
    second, _ = first_late([nodes(MY, report(1, "loading"))] * 200)
    assert patience.LOAD_SECONDS + 20 < second <= patience.LOAD_SECONDS + 22


def fetching(done_bytes: int) -> dict[str, Gauges]:
    return {"b": Gauges(fetching=(Fetching("m", 2, 4, done_bytes, 1 << 30),))}


def test_a_download_that_goes_on_is_waited_for_and_one_that_creeps_is_not() -> None:
    facts = [nodes(MY, report(1, "fetching"))] * 1000
    fast = patience.FETCH_BYTES_PER_SECOND
    assert first_late(facts, (fetching(2 * fast * second) for second in range(1000))) == (-1, [])
    second, _ = first_late(facts, (fetching(second) for second in range(1000)))  # a byte a second
    assert patience.FETCH_SECONDS < second <= patience.FETCH_SECONDS + 2


def test_a_new_state_is_waited_for_anew_and_a_changing_worker_is_not() -> None:
    states = [report(1, "loading")] * 15 + [report(1, "fetching")] * 15
    assert first_late(nodes(MY, each) for each in states * 10) == (-1, [])
    renamed = (nodes(MY, report(1, "loaded", worker=f"w{second}")) for second in range(200))
    second, late = first_late(renamed)
    assert patience.WIRE_SECONDS < second <= patience.WIRE_SECONDS + 2
    assert [node for node, _ in late] == ["b"]


def test_of_stages_that_are_not_wired_the_one_that_begins_anew_is_late_alone() -> None:
    thirds = placed(("a", 0, 1), ("b", 1, 2), ("c", 2, 4))
    pick = {"m": (Chosen(shape_of(), thirds, "", None),)}
    waiting = Patience("a", Simple())
    for second in range(60):
        stages = [report(0, "loaded", placement=thirds), report(1, "loaded", placement=thirds)]
        stages.append(report(2, "wired", worker=f"w{second}", placement=thirds))
        late = list(waiting.late(pick, nodes(*stages, placement=thirds), {}, float(second)))
        if late:
            assert [node for node, _ in late] == ["c"]
            return
    raise AssertionError("nobody was late")


def test_where_two_already_doubt_each_other_the_link_is_known_and_nobody_else_to_blame() -> None:
    doubted = nodes(MY, report(1, "loaded"), a=(Doubt("b", "no connection"),))
    assert first_late([doubted] * 200) == (-1, [])


def test_what_serves_is_not_waited_for() -> None:
    serving = running(HALVES)
    pick = {"m": (Chosen(shape_of(), HALVES, serving["a"][0].wiring, None),)}
    waiting = Patience("a", Simple())
    facts = nodes(serving["a"][0], serving["b"][0])
    assert not any(list(waiting.late(pick, facts, {}, float(second))) for second in range(200))
