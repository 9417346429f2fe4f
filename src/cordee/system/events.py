"""What an event loop waits for beside its own: signals, the end of standard input, sockets that are ready.

Windows has two kinds of loop. The one of completion ports, which runs processes and takes any number of
sockets, cannot wait for a socket to become readable. There a listener is watched by a thread, and a link by a
read of no bytes, which completes when there is something to read.
"""

import asyncio
import functools
import os
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

READ_BYTES = 65536
WATCH_SECONDS = 0.5  # until a thread that watches a listener sees that it is to stop
# A thread of Windows that waits runs no handler of Ctrl-C meanwhile.
TAKE_SECONDS = 0.1 if sys.platform == "win32" else None

HANGUP = signal.SIGBREAK if sys.platform == "win32" else signal.SIGHUP  # the terminal is gone

T = TypeVar("T")
Act = Callable[[], object]

if sys.platform == "win32":

    def on_interrupt(act: Act) -> None:
        """Call `act` on the running loop when this process is told to end."""
        loop = asyncio.get_running_loop()

        def handle(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(act)

        for number in (signal.SIGINT, signal.SIGBREAK):
            signal.signal(number, handle)

    def at_eof(act: Act) -> None:
        """Call `act` on the running loop when standard input ends."""
        eof_by_thread(act)

    def on_connection(loop: asyncio.AbstractEventLoop, listener: socket.socket, act: Act) -> Act:
        """Call `act` whenever somebody waits to be accepted, until what is returned is called."""
        return watched_by_thread(loop, listener, act)

    def on_data(loop: asyncio.AbstractEventLoop, link: socket.socket, act: Act) -> Act:
        """Call `act` once a link is readable or gone; what is returned stops waiting."""

        async def wait() -> None:
            with suppress(OSError):
                await loop.sock_recv(link, 0)
            act()

        return loop.create_task(wait()).cancel

else:

    def on_interrupt(act: Act) -> None:
        """Call `act` on the running loop when this process is told to end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, act)

    def at_eof(act: Act) -> None:
        """Call `act` on the running loop when standard input, a pipe or a terminal, ends."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            if not os.read(sys.stdin.fileno(), READ_BYTES):
                loop.remove_reader(sys.stdin)
                act()

        try:
            loop.add_reader(sys.stdin, read)
        except PermissionError:  # a file, or /dev/null: there is nothing to wait for
            loop.call_soon(act)

    def on_connection(loop: asyncio.AbstractEventLoop, listener: socket.socket, act: Act) -> Act:
        """Call `act` whenever somebody waits to be accepted, until what is returned is called."""
        loop.add_reader(listener, act)
        return functools.partial(loop.remove_reader, listener)

    def on_data(loop: asyncio.AbstractEventLoop, link: socket.socket, act: Act) -> Act:
        """Call `act` once a link is readable or gone; what is returned stops waiting."""

        def once() -> None:
            loop.remove_reader(link)
            act()

        loop.add_reader(link, once)
        return functools.partial(loop.remove_reader, link)


def take(items: "queue.SimpleQueue[T]") -> T:
    """The next item; Ctrl-C is handled meanwhile."""
    while True:
        try:
            return items.get(timeout=TAKE_SECONDS)
        except queue.Empty:
            continue


def eof_by_thread(act: Act) -> None:
    """As `at_eof`, where no loop can wait for standard input."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        with suppress(OSError):
            while os.read(sys.stdin.fileno(), READ_BYTES):
                pass
        with suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(act)

    threading.Thread(target=read, name="end of input", daemon=True).start()


def watched_by_thread(loop: asyncio.AbstractEventLoop, listener: socket.socket, act: Act) -> Act:
    """As `on_connection`, where no loop can wait for a listener."""
    stopped, handled = threading.Event(), threading.Event()

    def handle() -> None:
        try:
            if not stopped.is_set():
                act()
        finally:
            handled.set()

    def watch() -> None:
        with suppress(OSError, ValueError, RuntimeError):  # it was closed, or the loop has ended
            while not stopped.is_set():
                if select.select([listener], [], [], WATCH_SECONDS)[0]:
                    handled.clear()
                    loop.call_soon_threadsafe(handle)
                    handled.wait()

    def stop() -> None:
        stopped.set()
        handled.set()

    threading.Thread(target=watch, name="listener", daemon=True).start()
    return stop
