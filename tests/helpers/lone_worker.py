"""A worker process alone; the test plays its parent and its neighbours."""

import socket
import subprocess
from pathlib import Path

from cordee import children
from cordee.worker import frames
from cordee.worker.messages import Hello, Join, Message, Wire, Wired
from streams import SECONDS


class Lone:
    """A worker whose parent and neighbours the test plays; its Hello was read."""

    def __init__(self, folder: Path) -> None:
        self.inbox, self.tokens = folder / "inbox", folder / "tokens"
        self._listening = [listening(folder / "control"), listening(self.tokens)]
        names = ["it", str(folder / "control"), str(self.inbox)]
        self.process = subprocess.Popen(children.command("cordee.worker.worker", *names))
        self.control = self.accepted(0)
        assert frames.receive(self.control)[0] == Hello("it")

    def accepted(self, index: int) -> socket.socket:
        """The next connection to its parent (0), or to where it sends its tokens (1)."""
        peer, _ = self._listening[index].accept()
        peer.settimeout(SECONDS)
        return peer

    def command(self, message: Message) -> Message:
        """Send a message on its control link; gives the answer."""
        frames.send(self.control, message)
        answer, _ = frames.receive(self.control)
        return answer

    def wire(self, wiring: str) -> tuple[socket.socket, socket.socket]:
        """Wire it with the test on both sides; gives the links upstream and downstream."""
        assert self.command(Wire(wiring, str(self.tokens))) == Wired(wiring)
        downstream = self.accepted(1)
        assert frames.receive(downstream)[0] == Join(wiring)
        upstream = self.connect()
        frames.send(upstream, Join(wiring))
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
