"""The keyboard of a terminal: lines that are edited, what is pasted, and keys that are not shown."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

if sys.platform == "win32":
    import msvcrt

    from cordee.system import windows

    def edit_lines() -> None:
        """Line editing for `input`: the console has it."""

    def is_pasting() -> bool:
        """Whether keys wait behind the line that was just read: it was pasted, and is not all."""
        return sys.stdin.isatty() and msvcrt.kbhit()

    @contextmanager
    def hidden() -> Generator[None]:
        """Keys that are typed in this block are not shown."""
        try:
            before = windows.set_echo(False)
        except OSError:  # a terminal that is no console of Windows
            yield
            return
        try:
            yield
        finally:
            windows.set_echo(before)

else:
    import termios

    def edit_lines() -> None:
        """Line editing for `input`. Pasted lines become one line with newlines in it."""
        import readline

        readline.set_auto_history(True)
        if os.environ.get("TERM", "dumb") != "dumb":  # which would show what turns it on
            readline.parse_and_bind("set enable-bracketed-paste on")  # not the default of all versions

    def is_pasting() -> bool:
        """Whether what was pasted goes on behind the line that was just read: it never does."""
        return False

    @contextmanager
    def hidden() -> Generator[None]:
        """Keys that are typed in this block are not shown."""
        before = termios.tcgetattr(sys.stdin)
        quiet = [*before]
        quiet[3] &= ~termios.ECHO
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
