"""What people are told about placements that changed: what, and why."""

import msgspec
import pytest

from clusters import chosen, facts_of, placed, running, view_of
from cordee.agent.history import CHANGES_KEPT, SNAPSHOTS_KEPT, History, Nodes
from cordee.cluster.choose import Chosen
from cordee.cluster.facts import Facts, StageReport

BOTH = placed(("a", 0, 2), ("b", 2, 4))
ALONE = placed(("b", 0, 4))


def pick(placement=BOTH, wiring: str = "w") -> Chosen:
    [some] = chosen(view_of(facts_of("a"), facts_of("b")))
    return Chosen(some.shape, placement, wiring)


def nodes(**changes: object) -> Nodes:
    """a and b, alive and running BOTH, but for a's facts or its state."""
    state = changes.pop("state", "alive")
    stages = running(BOTH)
    a = msgspec.structs.replace(facts_of("a", stages=stages["a"]), **changes)
    return {"a": (state, a), "b": ("alive", facts_of("b", stages=stages["b"]))}


def texts(*steps: tuple[dict, Nodes]) -> list[str]:
    history = History()
    for clock, (picks, known) in enumerate(steps):
        history.note({model: tuple(each) for model, each in picks.items()}, known, float(clock))
    assert [change.clock for change in history.changes] == sorted(c.clock for c in history.changes)
    return [change.text for change in history.changes]


def test_from_deploy_to_undeploy() -> None:
    told = texts(
        ({"m": []}, nodes()), ({"m": [pick(wiring="")]}, nodes()), ({"m": [pick()]}, nodes()), ({}, nodes())
    )
    assert told == ["placed: layers 0-1 on a, 2-3 on b", "serves", "no longer deployed"]


FAILED = StageReport(BOTH, 0, "failed", detail="its disk is full")


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({"state": "gone"}, "a is gone"),
        ({"state": "suspect"}, "a has gone silent"),
        ({"draining": True}, "a is being drained"),
        ({"stages": (FAILED,)}, "a cannot run its stage: its disk is full"),
        ({"stages": (StageReport(BOTH, 0, "loading"),)}, "a lost its stage"),
        ({}, "a better placement"),
    ],
)
def test_why_a_model_moved(now: dict, why: str) -> None:
    told = texts(({"m": [pick()]}, nodes()), ({"m": [pick(ALONE, "")]}, nodes(**now)))
    assert told[2:] == [f"placed: layers 0-3 on b ({why})"]


def test_why_a_model_with_other_options_moved_or_runs_nowhere() -> None:
    longer = placed(("b", 0, 4), context=128)
    told = texts(({"m": [pick()]}, nodes()), ({"m": [pick(longer)]}, nodes()), ({"m": []}, nodes()))
    assert told[2:] == [
        "placed: layers 0-3 on b (deployed with other options)",
        "serves",
        "runs nowhere: no machines have room for it",
    ]


@pytest.mark.parametrize("reports", [(StageReport(BOTH, 0, "loading"),), ()])
def test_a_replaced_worker_interrupts(reports: tuple[StageReport, ...]) -> None:
    lost = nodes(stages=reports)
    steps = ({"m": [pick()]}, nodes()), ({"m": [pick(wiring="")]}, lost), ({"m": [pick(wiring="x")]}, nodes())
    assert texts(*steps)[2:] == ["interrupted: a lost its stage", "serves"]


def test_it_is_bounded_and_silent_while_nothing_changes() -> None:
    history, known = History(), nodes()
    for clock in range(CHANGES_KEPT * 3):
        history.note({"m": (pick(wiring=str(clock // 2)),)}, known, clock)
    assert len(history.changes) == CHANGES_KEPT
    before = list(history.changes)
    history.note({"m": (pick(wiring=str((CHANGES_KEPT * 3 - 1) // 2)),)}, known, 1e9)
    assert list(history.changes) == before


def test_nodes_that_nobody_remembers_are_told_by_their_id() -> None:
    known: dict[str, tuple[str, Facts]] = {"b": ("alive", facts_of("b"))}
    told = texts(({"m": [pick()]}, nodes()), ({"m": []}, known))
    assert told[-1] == "runs nowhere: a is gone"


def test_scenes_are_kept_when_something_changed() -> None:
    history = History()
    for clock, state in enumerate(("alive", "alive", "gone", "gone", "alive")):
        picks = {"m": (pick(wiring="" if state == "gone" else "w"),)}
        history.note(picks, nodes(state=state), float(clock))
    assert [snapshot.clock for snapshot in history.snapshots] == [0.0, 2.0, 4.0]
    then = history.snapshots[1]
    assert [(node.name, node.state) for node in then.nodes] == [("a", "gone"), ("b", "alive")]
    assert then.models == (("m", False, (("a", 0, 2), ("b", 2, 4))),)


def test_scenes_are_bounded() -> None:
    history = History()
    for clock in range(2 * SNAPSHOTS_KEPT):
        history.note({}, nodes(draining=bool(clock % 2)), float(clock))
    assert len(history.snapshots) == SNAPSHOTS_KEPT
    assert history.snapshots[-1].clock == 2 * SNAPSHOTS_KEPT - 1
