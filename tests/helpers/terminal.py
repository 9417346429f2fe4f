"""The program on a pseudo-terminal, for tests that type."""

import os
import pty
import signal
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

PROGRAM = (sys.executable, "-m", "cordee.cli.main")
SECONDS = 120  # a command that takes longer hangs


class Terminal:
    """A program on a pseudo-terminal of 80 columns, as at a keyboard; `term` is the terminal's kind."""

    def __init__(
        self,
        *arguments: str,
        home: Path,
        program: Sequence[str] = PROGRAM,
        term: str = "dumb",
        columns: int = 80,
    ) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"CORDEE_HOME": str(home), "TERM": term}
            termios.tcsetwinsize(0, (24, columns))
            os.execv(program[0], [*program, *arguments])
        signal.alarm(SECONDS)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        while text not in self.shown:
            try:
                piece = os.read(self._fd, 4096)
            except OSError:  # Linux: the other side has closed
                piece = b""
            assert piece, f"ended without {text!r}: {self.shown!r}"
            self.shown += piece.decode("utf-8", "replace")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def exit_code(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        signal.alarm(0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)
