"""What a node says over the bus, and whom it believes: a fake bus, true identities."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import pytest

import cordee
from clusters import Simple, facts_of
from cordee.agent.gossip import HEARTBEATS_MAX, Gossip
from cordee.cluster.controller import Controller
from cordee.cluster.facts import Gauges
from cordee.cluster.membership import WIRE, Heartbeat
from cordee.net.bus import REMOVED
from cordee.net.identity import Identity
from cordee.net.members import Members
from hostile_member import mutated
from members import cluster

RANDOM = 20_000  # of each kind; tests/net/test_net_member.py sends them over the network


@dataclass
class FakeBus:
    """Keeps what is said; the tests call the handlers."""

    published: list[tuple[str, bytes]] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    handlers: dict[str, Callable] = field(default_factory=dict)

    def publish(self, key: str, payload: bytes) -> None:
        self.published.append((key, payload))

    def announce(self, key: str) -> None:
        self.announced.append(key)

    def forget(self, node: str) -> None:
        self.forgotten.append(node)

    def subscribe(self, pattern: str, handler: Callable) -> None:
        self.handlers[pattern] = handler

    def watch(self, pattern: str, handler: Callable) -> None:
        self.handlers[pattern] = handler


class World:
    """Three members of a cluster, the first an admin; the second gossips."""

    def __init__(self, folder: Path) -> None:
        self.admin, self.me, self.other = cluster(folder, 3)
        self.bus, self.calls = FakeBus(), []
        self.controller = Controller(self.me.node, "session", Simple(), self.me)
        self.controller.observe(facts_of(self.me.node), time.monotonic(), time.time())
        self.gossip = Gossip(
            self.bus,
            self.me,
            self.controller,
            lambda: self.calls.append("changed"),
            lambda: self.calls.append("excluded"),
        )
        self.gossip.open()
        self.certificates = {
            member.node: member.member_certificate for member in (self.admin, self.me, self.other)
        }

    def hear(self, node: str, key: str = "", **more: object) -> None:
        """A heartbeat of a node comes, under its own key or another."""
        payload = self.heartbeat(node, **more)
        self.bus.handlers["heartbeat/*"](key or f"heartbeat/{node}", payload)

    def heartbeat(self, node: str, **more: object) -> bytes:
        more = {"certificate": self.certificates.get(node, b"")} | more
        return msgspec.msgpack.encode(Heartbeat("its session", 1.0, time.time(), facts_of(node), **more))

    def hear_removal(self, entry: str) -> None:
        """The other buses announce that this node was removed."""
        pattern, key = (
            REMOVED.format(self.me.node, *rest) for rest in (("*", "*"), (self.other.node, entry))
        )
        self.bus.handlers[pattern](key, True)

    @property
    def others(self) -> set[str]:
        """The other nodes that the controller knows."""
        return self.controller.nodes(time.monotonic()).keys() - {self.me.node}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path))  # which the members change
    return World(tmp_path)


def removal_of(identity: Identity, admin: Identity) -> bytes:
    admin.revoke(identity.node)
    return next(entry for entry in admin.revocations if entry.startswith(bytes.fromhex(identity.node)))


def test_a_node_is_seen_and_heard(world: World) -> None:
    assert world.bus.announced == [f"alive/{world.me.node}"]
    world.gossip.speak(Gauges(watts=3.0))
    [(key, payload)] = world.bus.published
    said = msgspec.msgpack.decode(payload, type=Heartbeat)
    assert (key, said.facts.node, said.gauges.watts) == (f"heartbeat/{world.me.node}", world.me.node, 3.0)
    world.hear(world.other.node)
    assert (world.others, world.calls) == ({world.other.node}, ["changed"])


def test_a_heartbeat_under_another_nodes_key_or_that_is_none_is_not_heard(world: World) -> None:
    world.hear(world.other.node, f"heartbeat/{world.admin.node}")
    world.bus.handlers["heartbeat/*"](f"heartbeat/{world.other.node}", b"\xc1")
    assert (world.others, world.calls) == (set(), [])


def test_a_heartbeat_in_the_name_of_another_node_is_counted_for_the_member_of_the_slot(world: World) -> None:
    world.hear(world.other.node)
    invented = f"{world.other.node[:2]}0123456789abcd"
    world.hear(world.admin.node, f"heartbeat/{world.other.node}")
    world.hear(invented)
    world.hear(invented, certificate=world.other.member_certificate)
    world.hear(world.other.node, certificate=b"")
    world.bus.handlers["heartbeat/*"](f"heartbeat/{invented}", b"\xc1")
    assert world.others == {world.other.node}
    assert world.controller.unsound == {world.other.node: (5, "a heartbeat that is none")}


def test_a_flood_is_counted_once_a_second_and_the_rest_is_not_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    for second in range(3):
        monkeypatch.setattr(time, "monotonic", lambda second=second: now + second)
        for _ in range(5 * HEARTBEATS_MAX):
            world.hear(world.other.node)
        count, what = world.controller.unsound[world.other.node]
        assert count == second + 1 and str(HEARTBEATS_MAX) in what
    world.hear(world.admin.node)
    assert world.others == {world.other.node, world.admin.node}


def test_random_messages_typed_and_untyped_change_nothing(world: World) -> None:
    """Those of the right types and those of none; most are dropped, none raises."""
    random, now = Random(15), time.monotonic()
    template = msgspec.msgpack.decode(world.heartbeat(world.other.node))
    with pytest.MonkeyPatch.context() as patch:
        for number in range(RANDOM):
            patch.setattr(time, "monotonic", lambda number=number: now + number / 100)
            typed = msgspec.msgpack.encode(mutated(random, template))
            untyped = random.randbytes(random.choice((0, 1, 30, 500)))
            for payload in (typed, untyped):
                world.bus.handlers["heartbeat/*"](f"heartbeat/{world.other.node}", payload)
        assert world.others <= {world.other.node}
        assert world.controller.unsound.keys() == {world.other.node}
        assert world.controller.deployments == ()
        patch.setattr(time, "monotonic", lambda: now + RANDOM)
        world.hear(world.admin.node)
        assert world.admin.node in world.others


def test_a_removed_node_is_not_heard_any_more_and_is_excluded_once(world: World) -> None:
    entry = removal_of(world.other, world.admin)
    world.hear(world.admin.node, revocations=(entry, b"no removal"))
    assert world.calls == ["excluded", "changed"]
    assert world.gossip.revocations() == {world.other.node: entry}
    world.hear(world.other.node)
    world.hear(world.admin.node, revocations=(entry,))
    assert (world.others, world.calls.count("excluded")) == ({world.admin.node}, 1)
    assert not world.gossip.removed.is_set()


def test_a_node_hears_of_its_own_removal_by_key_or_by_heartbeat(world: World) -> None:
    entry = removal_of(world.me, world.admin)
    for nonsense in ("no hexadecimal", "", entry[:-1].hex() + "00"):
        world.hear_removal(nonsense)
        assert not world.gossip.removed.is_set()
    world.hear_removal(entry.hex())
    assert world.gossip.removed.is_set()
    assert "excluded" not in world.calls


def test_a_heartbeat_brings_the_same_news(world: World) -> None:
    world.hear(world.admin.node, revocations=(removal_of(world.me, world.admin),))
    assert world.gossip.removed.is_set()


def test_a_farewell_is_said_only_by_a_node_that_was_heard(world: World) -> None:
    world.gossip.say_farewell(Gauges(), "stops")
    assert world.bus.published == []
    world.gossip.speak(Gauges())
    world.gossip.say_farewell(Gauges(), "leaves")
    assert msgspec.msgpack.decode(world.bus.published[-1][1], type=Heartbeat).farewell == "leaves"


def test_a_node_that_leaves_for_good_is_not_looked_for_any_more(world: World) -> None:
    world.hear(world.other.node, farewell="stops")
    assert world.bus.forgotten == []
    world.hear(world.other.node, farewell="leaves")
    assert world.bus.forgotten == [world.other.node]


def test_a_heartbeat_of_another_wire_is_not_believed_but_its_node_is_named(world: World) -> None:
    world.hear(world.other.node, wire=WIRE + 1)
    assert (world.others, world.calls) == (set(), [])
    [said] = world.gossip.strangers(time.monotonic())
    assert f"{world.other.node} runs Cordée 0.2.0 or older and this node {cordee.__version__}" in said
    world.hear(world.other.node)  # it was updated
    assert world.gossip.strangers(time.monotonic()) == []
    assert world.others == {world.other.node}


@pytest.mark.parametrize(
    "payload",
    [
        {"session": "s", "sent": 1.0, "clock": 1.0, "facts": {"node": "n", "name": "pc-9"}},  # 0.2.0
        {"wire": 99, "facts": {"name": "pc-9", "version": "7.0", "new": [1, 2]}, "session": 7, "more": None},
        {"facts": {"version": 3}, "wire": 99},  # no promise was kept: silence
    ],
)
def test_any_later_or_older_heartbeat_is_read_as_far_as_was_promised(world: World, payload: dict) -> None:
    key = f"heartbeat/{world.other.node}"
    world.bus.handlers["heartbeat/*"](key, msgspec.msgpack.encode(payload))
    said = world.gossip.strangers(time.monotonic())
    assert world.others == set()
    assert all("pc-9 runs Cordée" in each and "update all machines" in each for each in said)
    assert len(said) == (payload["facts"].get("version") != 3)


def test_a_removed_node_is_no_stranger(world: World) -> None:
    removal_of(world.other, world.admin)
    world.me.admit(world.admin.revocations)
    world.hear(world.other.node, wire=99)
    assert world.gossip.strangers(time.monotonic()) == []


def test_what_is_heard_of_members_is_remembered_until_they_leave(world: World) -> None:
    world.hear(world.other.node)
    assert Members(world.me).known[world.other.node].name == world.other.node
    world.hear(world.other.node, farewell="leaves")
    assert Members(world.me).known == {}


def test_the_newer_of_two_machines_with_one_identity_ends_without_a_farewell(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.gossip.speak(Gauges())
    for second in range(8):
        now = time.monotonic() + 1
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        world.controller.observe(facts_of(world.me.node), now, time.time())
        world.hear(world.me.node, age_seconds=1000.0 + second)
    assert world.gossip.cloned.is_set()
    assert world.others == set()
    count = len(world.bus.published)
    world.gossip.say_farewell(Gauges(), "stops")
    assert len(world.bus.published) == count


def test_a_lost_token_is_a_suspicion_but_not_of_oneself(world: World) -> None:
    world.hear(world.other.node)
    world.calls.clear()
    world.bus.handlers["alive/*"](f"alive/{world.me.node}", False)
    assert world.calls == []
    world.bus.handlers["alive/*"](f"alive/{world.other.node}", False)
    assert world.calls == ["changed"]
    assert world.controller.nodes(time.monotonic())[world.other.node][0] == "suspect"
