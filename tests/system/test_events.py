"""What a loop waits for, also in the ways of systems whose loops cannot: by threads."""

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from cordee import children
from cordee.system import events

ENVIRONMENT = {"PYTHONPATH": str(children.PACKAGE)}


@pytest.mark.parametrize("watch", [events.on_connection, events.watched_by_thread], ids=["loop", "thread"])
def test_each_caller_is_seen_until_watching_stops(watch: Callable[..., Callable[[], object]]) -> None:
    async def watched() -> list[bytes]:
        loop, came = asyncio.get_running_loop(), asyncio.Queue[bytes]()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)

            def accept() -> None:
                link, _ = listener.accept()
                with link:
                    link.setblocking(True)
                    came.put_nowait(link.recv(1))

            stop = watch(loop, listener, accept)
            found: list[bytes] = []
            for sent in (b"a", b"b"):
                with socket.create_connection(listener.getsockname()) as caller:
                    caller.sendall(sent)
                    found.append(await asyncio.wait_for(came.get(), 10))
            stop()
            with socket.create_connection(listener.getsockname()) as caller:
                caller.sendall(b"c")
                await asyncio.sleep(0.05)
            assert came.empty()
            return found

    assert asyncio.run(watched()) == [b"a", b"b"]


@pytest.mark.parametrize("closes", [False, True], ids=["data", "end"])
def test_a_link_is_seen_once(closes: bool) -> None:
    async def watched() -> int:
        here, there = socket.socketpair()
        here.setblocking(False)
        seen: list[int] = []
        events.on_data(asyncio.get_running_loop(), here, lambda: seen.append(1))
        await asyncio.sleep(0.02)
        assert not seen
        there.close() if closes else there.sendall(b"ab")
        await asyncio.sleep(0.05)
        here.close()
        there.close()
        return len(seen)

    assert asyncio.run(watched()) == 1


@pytest.mark.parametrize("how", ["at_eof", "eof_by_thread"])
def test_the_end_of_standard_input(how: str) -> None:
    program = f"""
import asyncio
from cordee.system import events
async def main():
    ended = asyncio.Event()
    events.{how}(ended.set)
    print("waits", flush=True)
    await ended.wait()
asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"waits"
    process.stdin.write(b"nobody reads this\n")
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.stdin.close()
    assert process.wait(10) == 0


def test_an_interrupt_calls_on_the_loop() -> None:
    async def interrupted() -> None:
        came = asyncio.Event()
        events.on_interrupt(came.set)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(came.wait(), 10)

    asyncio.run(interrupted())


def test_items_are_taken_in_order_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "TAKE_SECONDS", 0.01)  # as on Windows
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Timer(0.05, lambda: [items.put(1), items.put(2)]).start()
    assert [events.take(items), events.take(items)] == [1, 2]
