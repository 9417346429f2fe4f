"""Processes: how children are started, linked to their parent and ended with it, and given less."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypedDict

import psutil

Command = Callable[[str], list[str]]  # a command line, with what `link_to_parent` is to be given


class Apart(TypedDict, total=False):
    """Options of subprocess, see APART."""

    creationflags: int
    start_new_session: bool


class _Child(TypedDict):
    stdout: int
    stderr: int
    cwd: str


# Options of subprocess: a session, or a console that nobody sees. The terminal's Ctrl-C is the parent's to
# handle.
APART: Apart = (
    {"creationflags": subprocess.CREATE_NO_WINDOW} if sys.platform == "win32" else {"start_new_session": True}
)
CHILD: _Child = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": "/"}
CAN_FORK = hasattr(os, "fork")
NICENESS = 10  # of what may wait: answers that people wait for go first
CLOSED_POLL_SECONDS = 0.5  # where the system cannot tell at once that a link was closed
TAKEN, TAKEN_SECONDS, TAKEN_POLL_SECONDS = b"+", 60.0, 0.2  # an interpreter that starts on a busy machine

if sys.platform == "win32":
    from cordee.system import windows

    @cache
    def _job() -> windows.ChildrenJob:
        return windows.ChildrenJob()

    def ends_with_this(pid: int) -> None:
        """Have a child end when this process ends, however that happens."""
        _job().add(pid)

    def start_with_link(
        command: Callable[[str], list[str]],
        link: socket.socket,
        theirs: socket.socket,
        environment: dict[str, str],
    ) -> "subprocess.Popen[bytes]":
        """Start a child that has one end of a socket pair, `theirs`; this process keeps `link`.

        `command` gives the command line; its argument is what the child hands to `link_to_parent`. What it
        writes to its standard error can be read here; there is nothing else for it.
        """
        process = subprocess.Popen(command("-"), stdin=subprocess.PIPE, env=environment, **CHILD, **APART)
        ends_with_this(process.pid)
        assert process.stdin is not None, "it is a pipe"
        with suppress(OSError), process.stdin:  # it has ended already, which shows soon
            process.stdin.write(theirs.share(process.pid))
        # The socket must stay open here until the child has opened it, and no longer: else nobody would see
        # that the child has ended.
        _await_taken(process, link)
        return process

    def _await_taken(process: "subprocess.Popen[bytes]", link: socket.socket) -> None:
        link.settimeout(TAKEN_POLL_SECONDS)
        ends = time.monotonic() + TAKEN_SECONDS
        while process.poll() is None and time.monotonic() < ends:
            with suppress(TimeoutError):
                link.recv(len(TAKEN))
                return

    def link_to_parent(argument: str) -> socket.socket:
        """In a child: its end of the link."""
        link = socket.fromshare(sys.stdin.buffer.read())
        link.sendall(TAKEN)
        return link

    def was_killed(status: int | None) -> bool:
        """Whether a process ended because the system, or somebody, killed it: Windows does not say."""
        return False

    def wait_for_hangup(link: socket.socket) -> None:
        """Wait until the other side of a link is gone, even if what it sent is not read yet."""
        while True:
            with suppress(BlockingIOError):  # the link is another thread's, which may have made it so
                try:
                    if not link.recv(1, socket.MSG_PEEK):
                        return
                except TimeoutError:
                    pass
                except OSError:
                    return
            time.sleep(CLOSED_POLL_SECONDS)

    def limit_growth(nbytes: int) -> None:
        """Let this process take so much more memory than it has, and no more."""
        windows.limit_memory(psutil.Process().memory_info().private + nbytes)

    def lower_priority() -> None:
        """Let other processes go first."""
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)

    def cores() -> int:
        """How many cores this process may use."""
        return len(psutil.Process().cpu_affinity())

else:
    import resource
    import select

    def ends_with_this(pid: int) -> None:
        """Have a child end when this process ends: it sees that by its link."""

    def start_with_link(
        command: Callable[[str], list[str]],
        link: socket.socket,
        theirs: socket.socket,
        environment: dict[str, str],
    ) -> "subprocess.Popen[bytes]":
        """Start a child that has one end of a socket pair, `theirs`; this process keeps `link`.

        `command` gives the command line; its argument is what the child hands to `link_to_parent`. What it
        writes to its standard error can be read here; there is nothing else for it.
        """
        number = theirs.fileno()
        return subprocess.Popen(
            command(str(number)),
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
            env=environment,
            **CHILD,
            **APART,
        )

    def link_to_parent(argument: str) -> socket.socket:
        """In a child: its end of the link."""
        return socket.socket(fileno=int(argument))

    def was_killed(status: int | None) -> bool:
        """Whether a process ended because the system, or somebody, killed it."""
        return status == -signal.SIGKILL

    def wait_for_hangup(link: socket.socket) -> None:
        """Wait until the other side of a link is gone, even if what it sent is not read yet."""
        hangup = select.poll()
        hangup.register(link, 0)  # POLLHUP alone, which cannot be left out
        hangup.poll()

    def limit_growth(nbytes: int) -> None:
        """Let this process take so much more memory than it has, and no more."""
        with suppress(ValueError, OSError):  # a system that does not limit memory
            bound = psutil.Process().memory_info().vms + nbytes
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

    def lower_priority() -> None:
        """Let other processes go first."""
        os.nice(NICENESS)

    def cores() -> int:
        """How many cores this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
