"""Clients that go away within a stream, after any byte of it: nothing of theirs stays, and others are served.

The four formats of streams, with a real model. A client that is gone has its slot freed, its connection
closed and its tasks ended; the next one gets the whole answer, the same as ever.
"""

import asyncio
import json
import random
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cordee.serving.local_service import ServiceConfig
from serving import SECONDS, Running, running
from tiny import make_tiny

TURNS = [{"role": "user", "content": "Go."}]
STREAMS = ("chat", "Responses", "Anthropic", "Ollama")
FEW, MANY = 4, 24  # tokens; more than a queue between model and client holds
CUTS = 8  # of the short test, for each format
AWAY_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: the connection is reset, not closed


@pytest.fixture(scope="module")
def tiny(
    session_home: Path, tmp_path_factory: pytest.TempPathFactory, starter_path: Path
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("cut")
    model = make_tiny("llama", folder / "tiny.gguf", tokenizer="bytes")
    with running(model, folder / "store", config=ServiceConfig(context=256, sequences=2)) as server:
        yield server


def asked(name: str, tokens: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of a request for so many tokens."""
    given = {"model": "starter", "temperature": 0, "stream": True}
    options = {"num_predict": tokens, "temperature": 0}
    return {
        "chat": ("/v1/chat/completions", {**given, "messages": TURNS, "max_tokens": tokens}),
        "Responses": ("/v1/responses", {**given, "input": "Go.", "max_output_tokens": tokens}),
        "Anthropic": ("/v1/messages", {**given, "messages": TURNS, "max_tokens": tokens}),
        "Ollama": ("/api/chat", {**given, "messages": TURNS, "options": options}),
    }[name]


def sent(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which the request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def length(server: Running, name: str, tokens: int) -> int:
    """How many bytes the whole reply has."""
    total = 0
    with sent(server, *asked(name, tokens)) as connection:
        while data := connection.recv(4096):
            total += len(data)
    return total


def leave_after(server: Running, request: tuple[str, dict[str, Any]], nbytes: int, *, reset: bool) -> None:
    """Read so many bytes, and go."""
    with sent(server, *request) as connection:
        left = nbytes
        while left and (data := connection.recv(left)):
            left -= len(data)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AWAY_RESET)


def held(server: Running) -> tuple[int, int, int]:
    """What the server holds: tasks, threads, files."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    return server.run(tasks()), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def check(server: Running, name: str, tokens: int, cuts: Iterable[int]) -> None:
    request = asked(name, tokens)
    said = server.request("POST", *request).body
    server.until(lambda status: (status["active"], status["queue"]) == (0, 0))
    before = held(server)
    for cut in cuts:
        leave_after(server, request, cut, reset=cut % 2 == 1)
    server.until(lambda status: (status["active"], status["queue"]) == (0, 0))
    settled = threading.Event()
    for _ in range(10 * SECONDS):  # the last connections are closed a moment later
        if not more_than(before, held(server)):
            break
        settled.wait(0.02)
    now = held(server)
    assert not more_than(before, now), (before, now)
    again = server.request("POST", *request).body
    assert len(lines_of(again)) == len(lines_of(said))
    assert server.status()["stages"][0]["restarts"] == 0


def lines_of(body: bytes) -> list[bytes]:
    """The lines of a stream without comments, of which a busy machine sends more."""
    return [line for line in body.splitlines() if line and not line.startswith(b":")]


def more_than(before: Sequence[int], now: Sequence[int]) -> bool:
    return any(held > at_first for held, at_first in zip(now, before, strict=True))


@pytest.mark.parametrize("name", STREAMS)
def test_a_client_that_leaves_within_a_stream_leaves_nothing_behind(tiny: Running, name: str) -> None:
    most = length(tiny, name, MANY)
    check(tiny, name, MANY, sorted(random.Random(16).sample(range(most), CUTS)))


@pytest.mark.long
@pytest.mark.parametrize("name", STREAMS)
def test_a_client_may_leave_after_every_byte(tiny: Running, name: str) -> None:
    check(tiny, name, FEW, range(length(tiny, name, FEW) + 1))
