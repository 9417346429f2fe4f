"""Children: their link to this process, and what they may use."""

import os
import socket
import subprocess
import sys
import threading

from cordee import children
from cordee.system import processes


def test_a_child_talks_by_its_end_of_the_link_and_its_end_is_seen() -> None:
    program = """
import sys
from cordee.system import processes
link = processes.link_to_parent(sys.argv[1])
link.sendall(link.recv(100).upper())
"""
    here, theirs = socket.socketpair()
    here.settimeout(10)
    environment = os.environ | {"PYTHONPATH": str(children.PACKAGE)}
    process = processes.start_with_link(
        lambda end: [sys.executable, "-c", program, end], here, theirs, environment
    )
    theirs.close()
    here.settimeout(10)
    with here:
        here.sendall(b"hello")
        assert here.recv(100) == b"HELLO"
        assert here.recv(100) == b""
    assert process.wait(10) == 0
    assert process.stderr is not None
    process.stderr.close()


def test_a_hangup_is_seen_behind_what_nobody_has_read() -> None:
    here, there = socket.socketpair()
    with here, there:
        thread = threading.Thread(target=processes.wait_for_hangup, args=(here,))
        thread.start()
        there.sendall(b"unread")
        thread.join(0.1)
        assert thread.is_alive()
        if os.name == "nt":  # where it cannot be
            here.recv(100)
        there.close()
        thread.join(10)
        assert not thread.is_alive()


def test_memory_is_bounded() -> None:
    program = """
from cordee.system import processes
processes.limit_growth(64 << 20)
try:
    bytes(256 << 20)
except MemoryError:
    print("no more")
"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(children.PACKAGE)}
    assert subprocess.run(command, capture_output=True, env=environment).stdout.strip() == b"no more"


def test_cores_are_at_least_one() -> None:
    assert 1 <= processes.cores() <= (os.cpu_count() or 1)
