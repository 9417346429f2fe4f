"""A member that somebody has taken over: its true identity, sessions and links of its own, any bytes."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import zenoh

from cordee.cluster.deployments import Deployment, statement
from cordee.cluster.facts import Facts
from cordee.cluster.membership import Heartbeat
from cordee.net import identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Message
from intruders import intruder

HEARTBEAT_SECONDS = 1.0


class HostileMember:
    """See the module's docstring. `folder` is its identity; `buses` are where the others listen.

    It says once a second who it is, as it must to be a member, hears everything, and says what it is told to.
    """

    def __init__(self, folder: Path, buses: list[str]) -> None:
        self.identity = identity.load(folder)
        self.node = self.identity.node
        self.prefix = f"cordee/{self.identity.cluster}/"
        self.heard: list[bytes] = []  # keys and payloads
        self.said: dict[str, tuple[bytes, Heartbeat]] = {}  # the last heartbeat of each other node
        self.answered: list[str] = []  # keys of the questions that came
        self.tokens: list[zenoh.LivelinessToken] = []
        self.number = 0
        self.session = intruder(folder, folder / "ca.pem", buses, 0)
        self.session.declare_subscriber("cordee/**", self._hear)
        self._ended = threading.Event()
        self._speaker = threading.Thread(target=self._speak, daemon=True)
        self._speaker.start()

    def close(self) -> None:
        self._ended.set()
        self._speaker.join()
        self.session.close()

    def _speak(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self.put(f"heartbeat/{self.node}", self.heartbeat())

    def _hear(self, sample: zenoh.Sample) -> None:
        key, payload = str(sample.key_expr), sample.payload.to_bytes()
        self.heard.append(key.encode() + b" " + payload)
        node = key.rpartition("/")[2]
        if "/heartbeat/" in key and node != self.node:
            with contextlib.suppress(msgspec.MsgspecError, ValueError):
                self.said[node] = payload, msgspec.msgpack.decode(payload, type=Heartbeat)

    # What it says on the bus.

    def facts(self, **changes: Any) -> Facts:
        own = Facts(self.node, "eve", "", (), 0, "", {}, {}, (), (), certificate_ends=time.time() + 1e6)
        return msgspec.structs.replace(own, **changes)

    def true(self, **changes: Any) -> Heartbeat:
        """A heartbeat of its own, with some fields changed."""
        facts = changes.pop("facts", self.facts())
        certificate = self.identity.member_certificate
        own = Heartbeat("its session", time.monotonic(), time.time(), facts, certificate=certificate)
        return msgspec.structs.replace(own, **changes)

    def heartbeat(self, **changes: Any) -> bytes:
        return msgspec.msgpack.encode(self.true(**changes))

    def say(self, **changes: Any) -> None:
        """A heartbeat under its own key."""
        self.put(f"heartbeat/{self.node}", self.heartbeat(**changes))

    def put(self, key: str, payload: bytes) -> None:
        self.session.put(self.prefix + key, payload)

    def token(self, key: str) -> None:
        self.tokens.append(self.session.liveliness().declare_token(self.prefix + key))

    def ask(self, key: str, payload: bytes, seconds: float = 1.0) -> list[bytes]:
        """The answers to a question."""
        replies = self.session.get(self.prefix + key, payload=payload, timeout=seconds)
        return [reply.ok.payload.to_bytes() for reply in replies if reply.ok is not None]

    def answer(self, pattern: str, payload: bytes) -> Any:
        """Answer all questions of a pattern; what is returned undeclares it."""

        def reply(query: zenoh.Query) -> None:
            self.answered.append(str(query.key_expr))
            query.reply(query.key_expr, payload)

        return self.session.declare_queryable(self.prefix + pattern, reply)

    # What it deploys.

    def deployment(self, other: Deployment, author: str = "", **changes: Any) -> Deployment:
        """One with its own signature, in its own name or another's."""
        made = msgspec.structs.replace(
            other,
            author=author or self.node,
            certificate=self.identity.member_certificate,
            **({"written": changes.get("stamp", other.stamp)} | changes),
        )
        return msgspec.structs.replace(made, signature=self.identity.sign_statement(statement(made)))

    # Links.

    def link(self, node: str, endpoint: str) -> socket.socket:
        return tls_link.connect(self.identity.folder, endpoint, node)

    def send(self, node: str, endpoint: str, *said: Message | bytes | tuple[Message, bytes]) -> bytes:
        """Open a link, send messages (with payloads) or bytes; what came back, if anything did at once."""
        with contextlib.closing(self.link(node, endpoint)) as link, contextlib.suppress(OSError, LinkClosed):
            for each in said:
                if isinstance(each, bytes):
                    link.sendall(each)
                else:
                    frames.send(link, *(each if isinstance(each, tuple) else (each,)))
            link.settimeout(0.3)
            return link.recv(1 << 16)
        return b""


def mutated(random: Random, value: Any, depth: int = 0) -> Any:
    """A message with a few of its values replaced by any others."""
    if random.random() < 0.03 * (depth > 0):
        return random.choice(
            (None, True, -1, 0, 1 << 60, 1e308, -1e-9, "", "x" * 3000, "\x1b[2J", b"", b"\xff" * 99, [], {})
        )
    if isinstance(value, dict):
        return {key: mutated(random, each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        items = [mutated(random, each, depth + 1) for each in value]
        return items * random.choice((0, 2, 40)) if random.random() < 0.03 else items
    return value
