"""A worker process alone, whose parent and neighbours are played by the test."""

import socket
import subprocess
import sys
from pathlib import Path

from cordee.worker import frames
from cordee.worker.messages import Hello, Join, Message, Wire, Wired
from streams import SECONDS


class Lone:
    """A worker whose pipeline and neighbours the test plays; it has said Hello already."""

    def __init__(self, folder: Path) -> None:
        self.inbox, self.tokens = folder / "inbox", folder / "tokens"
        self._listening = [listening(folder / "control"), listening(self.tokens)]
        names = ["it", str(folder / "control"), str(self.inbox)]
        self.process = subprocess.Popen([sys.executable, "-m", "cordee.worker.worker", *names])
        self.control = self.accepted(0)
        assert frames.receive(self.control)[0] == Hello("it")

    def accepted(self, index: int) -> socket.socket:
        """Who connected to its parent (0), or to who takes its tokens (1)."""
        peer, _ = self._listening[index].accept()
        peer.settimeout(SECONDS)
        return peer

    def command(self, message: Message) -> Message:
        """Say something on its control link; gives the answer."""
        frames.send(self.control, message)
        answer, _ = frames.receive(self.control)
        return answer

    def wire(self, placement: str) -> tuple[socket.socket, socket.socket]:
        """Wire it from the test to the test; gives both links."""
        assert self.command(Wire(placement, str(self.tokens))) == Wired(placement)
        downstream = self.accepted(1)
        assert frames.receive(downstream)[0] == Join(placement)
        upstream = self.connect()
        frames.send(upstream, Join(placement))
        return upstream, downstream

    def connect(self) -> socket.socket:
        """A link to its inbox."""
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(SECONDS)
        peer.connect(str(self.inbox))
        return peer

    def close(self) -> None:
        """End it, as its parent does."""
        self.control.close()
        try:
            assert self.process.wait(SECONDS) == 0
        finally:
            self.process.kill()
            for each in self._listening:
                each.close()


def listening(path: Path) -> socket.socket:
    """A Unix socket that listens."""
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(SECONDS)
    listener.bind(str(path))
    listener.listen()
    return listener
