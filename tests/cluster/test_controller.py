"""The controller: what a node hears becomes what it does."""

from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from clusters import CONTEXT, ME, SEQUENCES, Simple, facts_of, placed, running, shape_of
from cordee.cluster.controller import RETHINK_SECONDS, Controller, Decision, Running
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Facts, Gauges, Hosted, best_host, stream_key
from cordee.cluster.goals import Goals
from cordee.cluster.membership import LISTEN_SECONDS, SILENCE_SECONDS, SUSPICION_SECONDS, Heartbeat
from cordee.cluster.reconcile import WorkerStatus
from sim.trust import Seals

EPOCH = 1.8e9
ALL = placed(("a", 0, 4))


def controller_of(node: str = "a", listened: bool = True, facts: Facts | None = None) -> Controller:
    controller = Controller(node, f"session of {node}", Simple(), Seals(node))
    look(controller, 0.0, facts)
    if listened:
        for now in range(1, int(LISTEN_SECONDS) + 1):
            look(controller, float(now), facts)
    return controller


def look(controller: Controller, now: float, facts: Facts | None = None, **more: bytes) -> None:
    controller.observe(facts or facts_of(controller.me), now, EPOCH + now, more)


def deploy(controller: Controller, now: float = 5.0, replicas: int = 1) -> None:
    controller.deploy("m", shape_of(), CONTEXT, SEQUENCES, now, replicas)


def test_what_is_deployed_at_one_node_is_run_by_another() -> None:
    a, b = controller_of("a", facts=facts_of("a", 2)), controller_of("b", facts=facts_of("b", 2))
    deploy(a)
    assert b.hear(a.heartbeat(5.0), 5.0)
    assert a.hear(b.heartbeat(5.0), 5.0)
    assert a.plan(5.0).stages and b.plan(5.0).stages
    assert a.chosen == b.chosen
    deploy(b, replicas=0)
    a.hear(b.heartbeat(5.1), 5.1)
    assert a.plan(5.1).stages == ()
    assert a.deployments == b.deployments


def test_what_changes_all_the_time_is_told_and_no_news() -> None:
    a, b = controller_of("a"), controller_of("b")
    assert b.hear(a.heartbeat(5.0), 5.0)
    busy = Gauges((Hosted("m", 3, 1, 12.5),), watts=42.0)
    assert not b.hear(a.heartbeat(5.1, busy), 5.1)
    assert b.gauges(5.1) == {"a": busy}
    assert b.gauges(5.1 + SILENCE_SECONDS) == {}


def test_a_node_listens_before_it_plans_at_the_start_and_after_it_was_stopped() -> None:
    controller = controller_of(listened=False)
    deploy(controller, 0.0)
    assert controller.plan(LISTEN_SECONDS - 0.1).stages == ()
    assert len(controller.plan(LISTEN_SECONDS).stages) == 1
    later = 100.0
    look(controller, later)
    assert controller.plan(later).stages == ()
    for now in range(100, 104):
        look(controller, float(now))
    assert len(controller.plan(later + LISTEN_SECONDS).stages) == 1


def test_a_node_that_heard_all_there_are_need_not_listen_longer() -> None:
    """A cluster that is switched on serves at once."""
    controller = Controller("a", "session of a", Simple(), ME, remembered=("a", "b", "c"))
    look(controller, 0.0)
    deploy(controller, 0.0)
    controller.hear(controller_of("b").heartbeat(3.0), 0.2)
    assert controller.plan(0.2).stages == ()
    assert controller.hear(controller_of("c").heartbeat(3.0), 0.4)
    assert len(controller.plan(0.4).stages) == 1
    look(controller, 100.0)  # it was stopped meanwhile
    controller.hear(controller_of("b").heartbeat(100.0), 100.0)
    assert controller.plan(100.0).stages == ()


def test_a_node_also_listens_for_those_of_whom_others_tell() -> None:
    """They may have joined, and serve, since it was there last."""
    controller = Controller("a", "session of a", Simple(), ME, remembered=("b",))
    look(controller, 0.0)
    deploy(controller, 0.0)
    reports = running(placed(("d", 0, 2), ("b", 2, 4)))["b"]
    told = msgspec.structs.replace(facts_of("b"), stages=tuple(reports), rtts={"c": 0.001})
    controller.hear(controller_of("b", facts=told).heartbeat(3.0), 0.1)
    for node in ("c", "d"):
        assert controller.plan(0.2).routes == {"m": ()}
        controller.hear(controller_of(node).heartbeat(3.0), 0.2)
    assert [route.host for route in controller.plan(0.2).routes["m"]] == ["d"]


def test_a_node_also_listens_for_those_whom_it_sees() -> None:
    controller = Controller("a", "session of a", Simple(), ME, remembered=("b",))
    look(controller, 0.0)
    deploy(controller, 0.0)
    controller.liveliness("c", True, 0.1)
    controller.hear(controller_of("b").heartbeat(3.0), 0.1)
    assert controller.plan(0.1).stages == ()
    controller.hear(controller_of("c").heartbeat(3.0), 0.2)
    assert len(controller.plan(0.2).stages) == 1


def test_a_wrong_memory_of_when_to_listen_until_does_not_last() -> None:
    controller = controller_of()
    deploy(controller)
    controller._listens_until = 1e30
    for now in (3.0, 4.0, 5.0, 6.0):
        look(controller, now)
    assert len(controller.plan(6.0).stages) == 1


def test_a_damaged_plan_is_computed_anew_though_nothing_changed() -> None:
    controller = controller_of()
    deploy(controller)
    right = controller.plan(5.0)
    controller._goals = Goals()
    assert controller.plan(5.0) != right
    assert controller.plan(5.0 + RETHINK_SECONDS) == right


def test_a_node_that_goes_is_replaced_after_silence_and_suspicion() -> None:
    a = controller_of("a")
    serving = facts_of("b", stages=running(placed(("b", 0, 4)))["b"])
    b = controller_of("b", facts=serving)
    deploy(b)
    a.hear(b.heartbeat(5.0), 5.0)
    gone = 5 + SILENCE_SECONDS + SUSPICION_SECONDS
    for now in range(5, int(gone) + 1):
        look(a, float(now))
        stages = a.plan(float(now)).stages
        assert (stages == ()) == (now < gone)
    assert a.nodes(gone)["b"][0] == "gone"


def test_revoked_nodes_are_neither_heard_nor_placed_and_the_word_goes_on() -> None:
    a = controller_of("a", facts=facts_of("a", 2))
    b = controller_of("b", facts=facts_of("b", 2))
    deploy(a)
    a.hear(b.heartbeat(5.0), 5.0)
    assert a.plan(5.0).stages
    look(a, 5.1, facts_of("a", 2), b=b"record")
    assert a.plan(5.1).stages == ()
    assert list(a.nodes(5.1)) == ["a"]
    assert not a.hear(b.heartbeat(6.0), 6.0)
    assert a.heartbeat(6.0).revocations == (b"record",)


def test_one_clock_that_is_a_day_off_changes_nothing() -> None:
    controllers = [controller_of(node) for node in "abc"]
    controllers[0].observe(facts_of("a"), 5.0, EPOCH + 86400, {})
    for one in controllers:
        for other in controllers:
            one.hear(other.heartbeat(5.0), 5.0)
    deploy(controllers[0], 5.0)
    assert abs(controllers[0].deployments[0].stamp - EPOCH - 5) < 1
    controllers[1].hear(controllers[0].heartbeat(5.1), 5.1)
    deploy(controllers[1], 5.2, replicas=0)
    controllers[0].hear(controllers[1].heartbeat(5.3), 5.3)
    assert controllers[0].deployments[0].replicas == 0


def test_heartbeats_carry_everything_and_travel() -> None:
    controller = controller_of()
    deploy(controller)
    said = controller.heartbeat(5.0)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Heartbeat) == said
    assert (said.facts.node, said.clock, said.deployments) == ("a", EPOCH + 5, controller.deployments)


def test_deployments_outlive_a_restart() -> None:
    controller = controller_of()
    deploy(controller)
    again = Controller("a", "next session", Simple(), ME, controller.deployments)
    look(again, 0.0)
    assert again.deployments == controller.deployments


def test_of_two_deployments_of_one_file_a_stream_goes_where_the_context_does() -> None:
    hosts = {"m/64": "w1", "m/8": "w2", "other/64": "w3"}
    assert best_host(hosts, "m/64") == "m/64"
    assert best_host(hosts, "m/8") == "m/8"
    assert best_host(hosts, "m/9") == "m/64"
    assert best_host(hosts, "m/65") is None
    assert best_host(hosts | {"m/8": ""}, "m/8") == "m/64"  # its own cannot answer yet


@given(st.text(), st.text())
def test_whatever_another_node_asks_for_finds_a_host_or_none(key: str, other: str) -> None:
    for wanted in (key, f"m/{other}", f"m/{'9' * 5000}", "m/", "/", ""):
        assert best_host({"m/64": "w"}, wanted) in ("m/64", None)


def stepped(
    controller: Controller, workers: list[WorkerStatus], wirings: dict[str, str], routes: dict[str, str]
) -> Decision:
    running = Running({worker.id: worker for worker in workers}, wirings, routes)
    return controller.step(facts_of("a", 8), running, 5.5, EPOCH + 5.5)


def two_names(first_state: str = "loaded") -> tuple[Controller, list[WorkerStatus]]:
    """A node that serves one file under two names, with the worker of each; the second's is wired."""
    controller = controller_of(facts=facts_of("a", 8))
    for name, sequences in (("m", SEQUENCES), ("n", SEQUENCES + 1)):
        controller.deploy(name, shape_of(), CONTEXT, sequences, 5.0)
    specs = {goal.spec.sequences: goal.spec for goal in controller.plan(5.0).stages}
    workers = [WorkerStatus(f"w{n}", specs[n], "loaded", f"a/{n}") for n in (SEQUENCES, SEQUENCES + 1)]
    goals = {each.worker: each.goal for each in stepped(controller, workers, {}, {}).actions.wire}
    for index, state in enumerate((first_state, "wired")):
        wiring = goals[workers[index].id].wiring
        if state == "wired":
            workers[index] = replace(workers[index], state=state, wiring=wiring, wirings=frozenset({wiring}))
    return controller, workers


def test_a_deployment_that_never_comes_up_does_not_take_the_host_from_its_twin() -> None:
    controller, workers = two_names("loading")
    decision = stepped(controller, workers, {}, {})
    [(key, goal)] = decision.hosts.items()
    assert goal.wiring == workers[1].wiring
    assert decision.routes == {key: "a"}


def test_what_is_hosted_stays_when_its_twin_is_there_too() -> None:
    controller, workers = two_names("wired")
    for worker in workers:
        decision = stepped(controller, workers, {stream_key("m", CONTEXT): worker.wiring}, {})
        [goal] = decision.hosts.values()
        assert goal.wiring == worker.wiring


def test_a_scheduler_hears_of_no_wiring_that_its_worker_has_left() -> None:
    controller, workers = two_names("wired")
    broken = [replace(worker, state="loaded", wiring="") for worker in workers]
    decision = stepped(controller, broken, {}, {})
    assert [goal.wiring for goal in decision.hosts.values()] == [""]
    assert decision.actions.rename


def test_facts_are_news_until_they_were_said() -> None:
    controller, workers = two_names("wired")
    assert stepped(controller, workers, {}, {}).is_news
    controller.heartbeat(5.5)
    assert not stepped(controller, workers, {}, {}).is_news
    assert stepped(controller, workers[:1], {}, {}).is_news


def test_streams_that_are_to_stay_on_some_nodes_get_into_no_other_placement() -> None:
    free, kept, other = stream_key("m", 64), stream_key("m", 64, ("a", "b")), stream_key("m", 64, ("a",))
    hosts = {free: "w1", kept: "w2"}
    assert best_host(hosts, stream_key("m", 32, ("a", "b"))) == kept
    assert best_host(hosts, stream_key("m", 32)) == free
    assert best_host(hosts, other) is None and best_host({kept: "w2"}, free) is None


def test_a_model_is_deployed_on_some_nodes_and_served_by_those() -> None:
    controller = Controller("a", "session of a", Simple(), ME)
    controller.observe(facts_of("a"), 0.0, 1e9)
    later = LISTEN_SECONDS + 1
    for node, speed in (("b", 1.0), ("c", 1e6)):
        controller.observe(facts_of("a"), later, 1e9 + later)
        controller.hear(Heartbeat("s", 1.0, 1e9 + later, facts_of(node, speed=speed)), later)
    controller.deploy("m", shape_of(), CONTEXT, SEQUENCES, later, only=["b", "a"])
    controller.observe(facts_of("a"), later + LISTEN_SECONDS, 1e9)
    controller.plan(later + LISTEN_SECONDS)
    [deployed] = controller.deployments
    assert deployed.only == ("a", "b")
    [pick] = controller.chosen["m"]
    assert {place.node for place in pick.placement.stages} <= {"a", "b"}


def test_what_a_member_sends_that_its_author_did_not_sign_is_counted_for_the_member() -> None:
    controller = Controller("a", "session of a", Simple(), ME)
    controller.observe(facts_of("a"), 0.0, 1e9)
    forged = Deployment("m", shape_of(), CONTEXT, SEQUENCES, author="b", stamp=1e9, written=1e9)
    controller.hear(Heartbeat("s", 1.0, 1e9, facts_of("c"), (forged,)), 1.0)
    assert controller.deployments == ()
    assert controller.unsound == {"c": (1, "a deployment that its author did not sign")}
