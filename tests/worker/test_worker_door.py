"""A worker's door for other machines: a flood at it costs little, and the stage that is expected comes in."""

import contextlib
import socket
from pathlib import Path

import psutil
import pytest
from test_worker import CONFIG, prompt

from cordee.engine.stage import StageConfig
from cordee.net.address import parse
from cordee.worker import frames, tls_link
from cordee.worker.messages import Join, Loaded, LoadStage, Rows, Tokens, Wire, Wired
from handshakes import hello
from lone_worker import Lone
from members import cluster
from streams import SECONDS, tiny_model

FLOOD = 400
GROWTH_BYTES_MAX = 10_000_000


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


@pytest.mark.parametrize("kind", ["nothing", "a byte", "hello", "plain text"])
def test_a_flood_costs_little_and_keeps_no_stage_out(tmp_path: Path, kind: str) -> None:
    says = {"nothing": b"", "a byte": b"\x16", "hello": hello(), "plain text": b"GET / HTTP/1.1\r\n"}[kind]
    here, there = cluster(tmp_path, 2)
    model = tiny_model(tmp_path).stored.path
    config = StageConfig(context=CONFIG.context, sequences=2, threads=1)
    (tmp_path / "w").mkdir()
    with contextlib.closing(Lone(tmp_path / "w")) as lone, contextlib.ExitStack() as stack:
        load = LoadStage(str(model), config, True, identity=str(here.folder), listen="127.0.0.1")
        loaded = lone.command(load)
        assert isinstance(loaded, Loaded)
        wire = Wire("p", str(lone.tokens), upstream_node=there.node)
        assert lone.command(wire) == Wired("p")
        downstream = lone.accepted(1)
        assert frames.receive(downstream)[0] == Join("p")
        process = psutil.Process(lone.process.pid)
        before = process.memory_info().rss
        token = None
        for batch in range(1, 4):
            for _ in range(FLOOD):
                link = socket.create_connection(parse(loaded.endpoint, 0), SECONDS)
                stack.callback(link.close)
                with contextlib.suppress(OSError):
                    link.sendall(says)
            upstream = tls_link.connect(there.folder, loaded.endpoint, here.node)
            stack.callback(upstream.close)
            frames.send(upstream, Join("p"))
            rows, payload = prompt("p", batch)
            assert isinstance(rows, Rows)
            frames.send(upstream, rows, payload)
            message, _ = frames.receive(downstream)
            assert isinstance(message, Tokens) and message.choices[0].token == (
                token or message.choices[0].token
            )
            token = message.choices[0].token
        assert process.memory_info().rss - before < GROWTH_BYTES_MAX
        assert process.num_fds() < FLOOD
