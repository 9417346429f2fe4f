"""What a member can do that somebody has taken over, against real nodes: harm itself, and be named.

Two nodes serve a model together. A third is a member with a true certificate, which says what it wants on the
bus and on links of its own. KINDS is what it tries, one after the other; after each the two see each other,
know of no node that is not there, serve what was deployed, and say what came from whom.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import pytest

from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from clusters import shape_of
from cordee.agent.gossip import HEARTBEAT_BYTES_MAX, HEARTBEATS_MAX
from cordee.cluster.deployments import DEPLOYMENTS_MAX, Deployment
from cordee.cluster.facts import Device, StageReport
from cordee.cluster.membership import Heartbeat
from cordee.generation import streams
from cordee.generation.request import Choice
from cordee.generation.streams import Piece, Said
from cordee.net.enrolment import Renewal
from cordee.net.zenoh_config import MESSAGE_BYTES_MAX
from cordee.worker import frames
from cordee.worker.messages import (
    DrainOrder,
    Halt,
    Hello,
    Join,
    KvAnswer,
    KvRead,
    Promotion,
    ReaderJoin,
    Rows,
    StreamMessage,
    StreamsJoin,
    Tokens,
)
from hostile_member import HostileMember, mutated
from members import founder

QUESTION = "The password of the safe is rosebud. Say it."
QUIET_SECONDS = 0.15  # for what has no answer to arrive
GROWTH_BYTES_MAX = 64 << 20  # of an agent, in all: 43 to 57 MB were measured
RANDOM = 20_000


class World:
    """Nodes a and b, and eve. `a` is the admin, and has the model."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.cluster = Cluster(folder, model, "--memory", MEMORY, "--scouting", "off")
        self.a = self.cluster.add("a")
        self.b = self.cluster.add("b", "--peer", f"127.0.0.1:{self.cluster.port}")
        home = Node(folder / "eve")
        home.home.mkdir()
        home.do("join", self.a.do("invite").strip())
        self.b.do("deploy", "starter", *SERVED)
        until(lambda: all(each.model("starter")["state"] == "serving" for each in self.nodes))
        self.answer = self.asked(self.b)
        self.eve = HostileMember(home.home / "cluster", self.buses)
        until(lambda: set(self.eve.said) == self.ids)
        until(lambda: all(each.states().get("eve") == "alive" for each in self.nodes))
        self.eve.heard.clear()
        self.before = self.memory()
        self.recorded = {node: payload for node, (payload, _) in self.eve.said.items()}
        self.stranger = founder(folder / "stranger")

    @property
    def nodes(self) -> list[Node]:
        return [self.a, self.b]

    @property
    def ids(self) -> set[str]:
        return {each.id for each in self.nodes}

    @property
    def buses(self) -> list[str]:
        """Where a and b listen for the bus."""
        addresses = (self.a.home / "cluster" / "peers").read_text().split()
        return [f"127.0.0.1:{self.cluster.port}", addresses[addresses.index(self.b.id) + 1].split(",")[0]]

    def said_by(self, node: Node) -> Heartbeat:
        return self.eve.said[node.id][1]

    def deployed(self) -> Deployment:
        """What b deployed, as everybody hears it."""
        [found] = [each for each in self.said_by(self.b).deployments if each.model == "starter"]
        return found

    def asked(self, node: Node) -> str:
        with node.client() as client:
            messages = [{"role": "user", "content": QUESTION}]
            done = client.chat.completions.create(
                model="starter", messages=messages, max_tokens=24, temperature=0
            )
        return done.choices[0].message.content

    def memory(self) -> list[int]:
        """Of the agents."""
        return [psutil.Process(each.process.pid).memory_info().rss for each in self.nodes]

    def counted(self, node: Node) -> tuple[int, str]:
        """How many messages of eve a node dropped, and why the last of them."""
        for warning in node.asked("/nodes")["warnings"]:
            if found := re.match(r"(\d+) messages of eve were dropped, .*such things \((.*)\)", warning):
                return int(found[1]), found[2]
        return 0, ""

    def holds(self) -> None:
        """What is so after whatever eve did."""
        for node in self.nodes:
            known = node.asked("/nodes")
            assert {each["id"] for each in known["nodes"]} <= self.ids | {self.eve.node}
            states = {each["id"]: each["state"] for each in known["nodes"]}
            assert {states[each] for each in self.ids} == {"alive"}, states
            assert not [each["id"] for each in known["nodes"] if each["cloned"] and each["id"] in self.ids]
            model = node.model("starter")
            assert (model["state"], model["context"], model["sequences"]) == ("serving", 1024, 4), model
            assert self.eve.node not in {
                stage["node"] for each in model["placements"] for stage in each["stages"]
            }


@dataclass(frozen=True)
class Kind:
    """Something that eve does. `cause`: what a says of it; "" for what does not even arrive."""

    name: str
    does: Callable[[World], object]
    cause: str = ""


IN_ANOTHERS_NAME = "in the name of another node"
NONE = "a heartbeat that is none"
UNSIGNED = "its author did not sign"


def another(w: World, node: Node, **changes: Any) -> bytes:
    """What a node never said, but might have."""
    return msgspec.msgpack.encode(msgspec.structs.replace(w.said_by(node), **changes))


def now() -> dict[str, float]:
    """The stamps of a deployment that is written now."""
    stamp = time.time()
    return {"stamp": stamp, "written": stamp}


def deploys(**changes: Any) -> Callable[[World], None]:
    """b's deployment, altered."""
    return lambda w: w.eve.say(deployments=(msgspec.structs.replace(w.deployed(), **changes),))


def signs(author: str = "", **changes: Any) -> Callable[[World], None]:
    """b's deployment, altered and signed by eve."""

    def does(w: World) -> None:
        named = w.b.id if author == "b" else ""
        w.eve.say(deployments=(w.eve.deployment(w.deployed(), named, **changes),))

    return does


def wishes(w: World) -> None:
    """6,000 deployments, of models that nobody has."""
    for start in range(0, 6000, DEPLOYMENTS_MAX):
        w.eve.say(
            deployments=tuple(
                w.eve.deployment(Deployment(f"wish{n}", shape_of(f"wish{n}"), 64, 1), stamp=time.time() + 30)
                for n in range(start, start + DEPLOYMENTS_MAX)
            )
        )
        time.sleep(0.03)


def facts(**changes: Any) -> Callable[[World], None]:
    return lambda w: w.eve.say(facts=w.eve.facts(**changes))


def flood(w: World) -> None:
    for _ in range(30 * HEARTBEATS_MAX):
        w.eve.say()
    time.sleep(1.2)  # only then it is listened to again


def invented(w: World) -> str:
    """A node of eve's own slot that is not there."""
    return w.eve.node[:2] + "0123456789abcd"


def inbox(*said: Any, of: str = "a") -> Callable[[World], None]:
    """Over a link of eve's own to the inbox of a node, which is where tokens, answers and questions go."""

    def does(w: World) -> None:
        node = w.a if of == "a" else w.b
        messages = [each(w) if callable(each) and not isinstance(each, type) else each for each in said]
        w.eve.send(node.id, w.said_by(node).facts.inbox, *messages)

    return does


def stages(*said: Any) -> Callable[[World], None]:
    """Over links to every stage."""

    def does(w: World) -> None:
        for node in w.nodes:
            for report in serving(w, node):
                w.eve.send(node.id, report.endpoint, *(each(report.wiring) for each in said))

    return does


def serving(w: World, node: Node) -> list[StageReport]:
    """The stages of a node by which the model is served."""
    return [each for each in w.said_by(node).facts.stages if each.state == "wired"]


def wiring(w: World) -> str:
    return serving(w, w.a)[0].wiring


def forged_tokens(w: World) -> Tokens:
    return Tokens(wiring(w), 1, {n: Choice(65) for n in range(4)})


def forged_said(w: World) -> tuple[StreamMessage, bytes]:
    pieces = tuple(Piece(n, 0, (65, 66, 67), finish_reason="stop") for n in range(1, 20))
    return StreamMessage(), streams.encode(Said(1, 1, 1, True, pieces))


def lies(message: int, payload: int) -> bytes:
    return frames.LENGTHS.pack(message, payload) + b"\x00" * 64


def answers(pattern: str, of: str = "") -> Callable[[World], None]:
    """It answers what others are asked, while they are asked."""

    def does(w: World) -> None:
        declared = w.eve.answer(pattern.format(a=w.a.id, b=w.b.id), b"evil")
        time.sleep(0.5)
        declared.undeclare()
        assert not [key for key in w.eve.answered if w.eve.node not in key]

    return does


def renews_for_another(w: World) -> None:
    """b's certificate, which everybody has seen, with a key of eve's."""
    certificate = w.said_by(w.b).certificate
    for question in (Renewal(w.eve.identity.request(), certificate), Renewal(b"", b"")):
        assert w.eve.ask(f"renew/{w.a.id}", msgspec.msgpack.encode(question), 0.3) == []


KINDS = [
    # Heartbeats.
    Kind("another's heartbeat", lambda w: w.eve.put(f"heartbeat/{w.b.id}", another(w, w.b, sent=1e9))),
    Kind(
        "another's farewell", lambda w: w.eve.put(f"heartbeat/{w.b.id}", another(w, w.b, farewell="leaves"))
    ),
    Kind("another's session", lambda w: w.eve.put(f"heartbeat/{w.b.id}", another(w, w.b, session="new"))),
    Kind("a replay", lambda w: w.eve.put(f"heartbeat/{w.b.id}", w.recorded[w.b.id])),
    Kind("a replay to everybody", lambda w: w.eve.put("heartbeat/*", w.recorded[w.b.id])),
    Kind("a replay to everything", lambda w: w.eve.put("**", w.recorded[w.b.id])),
    Kind(
        "a replay under eve's key",
        lambda w: w.eve.put(f"heartbeat/{w.eve.node}", w.recorded[w.b.id]),
        IN_ANOTHERS_NAME,
    ),
    Kind(
        "a farewell under eve's key",
        lambda w: w.eve.put(f"heartbeat/{w.eve.node}", another(w, w.b, farewell="leaves")),
        IN_ANOTHERS_NAME,
    ),
    Kind("deletes another's", lambda w: w.eve.session.delete(f"{w.eve.prefix}heartbeat/{w.b.id}")),
    Kind(
        "keys of the whole slot",
        lambda w: w.eve.put(f"heartbeat/{w.eve.node[:2]}$*", w.eve.heartbeat()),
        IN_ANOTHERS_NAME,
    ),
    Kind(
        "an invented node of the slot",
        lambda w: w.eve.put(f"heartbeat/{invented(w)}", w.eve.heartbeat(facts=w.eve.facts(node=invented(w)))),
        IN_ANOTHERS_NAME,
    ),
    Kind(
        "an invented node with another's certificate",
        lambda w: w.eve.put(
            f"heartbeat/{invented(w)}",
            w.eve.heartbeat(facts=w.eve.facts(node=invented(w)), certificate=w.said_by(w.b).certificate),
        ),
        IN_ANOTHERS_NAME,
    ),
    Kind("no certificate", lambda w: w.eve.say(certificate=b""), IN_ANOTHERS_NAME),
    Kind(
        "a certificate of another cluster",
        lambda w: w.eve.say(certificate=w.stranger.member_certificate),
        IN_ANOTHERS_NAME,
    ),
    Kind("escape sequences", facts(name="\x1b]0;eve\x07"), "not printable"),
    Kind("less than no memory", facts(devices=(Device("d", "cpu", -1, 1.0),)), "no count"),
    Kind("a speed that is no number", facts(bytes_per_second={"b": float("nan")}), "bytes_per_second is nan"),
    Kind("5,000 devices", facts(devices=(Device("d", "cpu", 1, 1.0),) * 5000), "5000 items"),
    Kind("a session that is none", lambda w: w.eve.say(session="x" * 5000), "Heartbeat.session"),
    Kind("no heartbeat", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", b"\xc1" * 100), NONE),
    Kind("half a heartbeat", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", w.eve.heartbeat()[:-9]), NONE),
    Kind("nothing", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", b""), NONE),
    Kind("too long", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", bytes(HEARTBEAT_BYTES_MAX + 1)), NONE),
    Kind("far too long", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", bytes(MESSAGE_BYTES_MAX + 1))),
    Kind("nested 100,000 deep", lambda w: w.eve.put(f"heartbeat/{w.eve.node}", b"\x91" * 100_000), NONE),
    Kind("a flood", flood, f"more than {HEARTBEATS_MAX} heartbeats"),
    # Removals.
    Kind(
        "a forged removal",
        lambda w: w.eve.say(revocations=(bytes.fromhex(w.b.id) + b"\x30" * 70,)),
        "a removal that no admin signed",
    ),
    Kind(
        "a removal that eve signed",
        lambda w: w.eve.say(
            revocations=(bytes.fromhex(w.b.id) + w.eve.identity.sign_statement(b"cordee revocation"),)
        ),
        "a removal that no admin signed",
    ),
    Kind(
        "1,000 removals",
        lambda w: w.eve.say(revocations=tuple(n.to_bytes(8) + bytes(70) for n in range(1000))),
        "a removal that no admin signed",
    ),
    Kind("a removal's key", lambda w: w.eve.token(f"removed/{w.b.id}/{w.eve.node}/{w.b.id}{'30' * 70}")),
    Kind("a removal's key of a's", lambda w: w.eve.token(f"removed/{w.b.id}/{w.a.id}/{w.b.id}{'30' * 70}")),
    # Tokens and addresses.
    Kind("a token of a node that is not", lambda w: w.eve.token("alive/0123456789abcdef")),
    Kind("another's token", lambda w: w.eve.token(f"alive/{w.b.id}")),
    Kind("another's token is gone", lambda w: w.eve.tokens.pop().undeclare()),
    Kind("another's address", lambda w: w.eve.token(f"at/{w.b.id}/203.0.113.7:7330")),
    Kind("addresses that are none", lambda w: w.eve.token(f"at/{w.eve.node}/..:-1,\u2028,{'x' * 3000}")),
    Kind("1,000 tokens", lambda w: [w.eve.token(f"alive/{w.eve.node[:2]}{n:014x}") for n in range(1000)]),
    # Questions and answers.
    Kind("answers pings of others", answers("ping/{b}")),
    Kind("answers for chunks of others", answers("chunk/{a}")),
    Kind("answers everything", answers("**")),
    Kind("answers renewals", answers("renew/*")),
    Kind("renews in another's name", renews_for_another),
    Kind("chunks that are none", lambda w: w.eve.ask(f"chunk/{w.a.id}", b"\x93\xa1x" + b"\xff" * 9, 0.3)),
    Kind("a long question", lambda w: w.eve.ask(f"reach/{w.a.id}", bytes(3 << 20), 0.3)),
    Kind("another's reach", lambda w: w.eve.ask(f"reach/{w.a.id}", b"\xff\x00" * 99, 0.3)),
    # Deployments.
    Kind("a deployment altered", deploys(context=2048), UNSIGNED),
    Kind("a deployment renewed", lambda w: deploys(**now())(w), UNSIGNED),
    Kind("an undeployment in b's name", lambda w: deploys(replicas=0, **now())(w), UNSIGNED),
    Kind("a deployment doubted", deploys(stamp=0.0)),
    Kind("a deployment kept on eve", lambda w: deploys(only=(w.eve.node,), **now())(w), UNSIGNED),
    Kind("b's name, eve's signature", signs("b", context=64, model="x"), UNSIGNED),
    Kind("no author", lambda w: w.eve.say(deployments=(Deployment("x", None, 64, 1),)), UNSIGNED),
    Kind("-1 tokens", signs(context=-1, model="x"), "a deployment that is none"),
    Kind("10^9 answers", signs(sequences=10**9, model="x"), "a deployment that is none"),
    Kind("a model with an escape sequence", signs(model="\x1b[2J"), "a deployment that is none"),
    Kind("a deployment of the year 2100", signs(model="later", stamp=4.1e9)),
    Kind("6,000 deployments", wishes),
    # Links.
    Kind("tokens for the host", inbox(lambda w: Join(wiring(w)), forged_tokens)),
    Kind("states for the host", inbox(lambda w: Join(wiring(w)), lambda w: KvAnswer(wiring(w), {}))),
    Kind("answers for a's gateway", inbox(StreamsJoin(), forged_said)),
    Kind("answers for b's gateway", inbox(StreamsJoin(), forged_said, of="b")),
    Kind("nonsense for the host", inbox(StreamsJoin(), (StreamMessage(), b"\xc1" * 999))),
    Kind("a key that is not the authority's", inbox(Promotion(b"-----BEGIN", b"nonce"))),
    Kind("an order that no admin gave", inbox(DrainOrder(True, b"signature"))),
    Kind("a control message", inbox(Hello("w"))),
    Kind("a message of 4 GB", inbox(lies(0xFFFFFFFF, 0))),
    Kind("a payload of 1 GB", inbox(StreamsJoin(), lies(14, 1 << 30))),
    Kind("no message", inbox(lies(64, 0))),
    Kind("bytes", inbox(b"\x16\x03\x01" * 400)),
    Kind("silence", inbox()),
    Kind("rows for stages", stages(Join, lambda wiring: Rows(wiring, 1, (), {}))),
    Kind("a halt for stages", stages(Join, lambda wiring: Halt(wiring, 1))),
    Kind("rows that go round", stages(lambda wiring: Join(wiring, again=True), lambda w: Halt(w, 1))),
    Kind("the states of stages", stages(ReaderJoin, lambda _: KvRead(0, 8, 0, 1))),
    Kind("rows that lie", stages(lambda _: lies(1 << 25, 1 << 29))),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Iterator[World]:
    before = dict(os.environ)
    made = World(tmp_path_factory.mktemp("member"), starter_path)
    yield made
    made.eve.close()
    made.cluster.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_it_changes_nothing_and_is_named(world: World, kind: Kind) -> None:
    before = world.counted(world.a)[0]
    kind.does(world)
    if kind.cause:
        until(lambda: world.counted(world.a)[0] > before and kind.cause in world.counted(world.a)[1])
    else:
        time.sleep(QUIET_SECONDS)
    world.holds()


def test_afterwards_answers_are_the_same_and_nobody_else_read_them(world: World) -> None:
    assert len(KINDS) >= 50
    assert [world.asked(node) for node in world.nodes] == [world.answer] * 2
    heard = b"".join(world.eve.heard)
    assert b"heartbeat/" in heard
    for secret in (b"rosebud", b"password", world.answer.encode()[:12]):
        assert secret not in heard


def test_what_others_deployed_is_all_there(world: World) -> None:
    for node in world.nodes:
        deployments = world.said_by(node).deployments
        assert len(deployments) <= DEPLOYMENTS_MAX
        assert [each.author for each in deployments if each.model == "starter"] == [world.b.id]
        wished = {each.author for each in deployments if each.model.startswith("wish")}
        assert wished <= {world.eve.node}  # none of them where this machine was too busy to read so many


def test_no_exception_is_in_a_log_and_no_memory_is_lost(world: World) -> None:
    clean(world)


def clean(world: World) -> None:
    for node in world.nodes:
        assert "Traceback" not in node.said and "failed" not in node.said, node.said[-4000:]
        assert len(node.said) < 200_000
    grown = [after - before for before, after in zip(world.before, world.memory(), strict=True)]
    assert max(grown) < GROWTH_BYTES_MAX, grown


@pytest.mark.long
def test_random_messages_typed_and_untyped(world: World) -> None:
    random = Random(15)
    world.before = world.memory()
    endpoints = [(node.id, world.said_by(node).facts.inbox) for node in world.nodes]
    templates = [msgspec.msgpack.decode(world.eve.heartbeat(deployments=(world.deployed(),)))]
    templates += [msgspec.msgpack.decode(payload) for payload in world.recorded.values()]
    for number in range(RANDOM):
        typed = msgspec.msgpack.encode(mutated(random, random.choice(templates)))
        untyped = random.randbytes(random.choice((0, 1, 8, 64, 500, 4000)))
        for payload in (typed, untyped):
            key = random.choice((world.eve.node, world.eve.node, invented(world), *world.ids, "*"))
            if number % 20 == 0:
                kind = random.choice(("ping", "chunk", "reach", "renew"))
                world.eve.ask(f"{kind}/{random.choice(sorted(world.ids))}", payload, 0.01)
            elif number % 200 == 1:
                said = random.choice((payload, (StreamMessage(), payload)))
                world.eve.send(*random.choice(endpoints), StreamsJoin(), said)
            else:
                world.eve.put(f"heartbeat/{key}", payload)
        if number % 60 == 0:
            time.sleep(0.1)
    until(lambda: all(each.states().get("eve") == "alive" for each in world.nodes))
    world.holds()
    assert [world.asked(node) for node in world.nodes] == [world.answer] * 2
    clean(world)
