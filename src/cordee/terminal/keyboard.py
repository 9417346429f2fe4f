"""What a person types in a conversation: messages of one line or several, and keys while an answer comes.

Python's readline edits the lines, and takes what is pasted as a whole (terminals mark it: bracketed paste).
Its history lives in memory only. prompt_toolkit would do the same, also where Python has libedit and not GNU
readline (there, pasted lines are messages of their own), for two more packages.
"""

import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from cordee.system import keys

QUOTES = '"""'
MESSAGE_HELP = f"{QUOTES}      begins and ends a message of several lines; what is pasted is one message"


def prepare() -> None:
    """Line editing for `input` on a terminal. Pasted lines become one line with newlines in it."""
    keys.edit_lines()


def read_message(ask: Callable[[str], str] = input) -> str:
    """The next message, which may be empty; `ask` shows a prompt and reads a line.

    Raises:
        EOFError: there are no more.
        KeyboardInterrupt: the person has given up on this one.
    """
    text = _line(ask)
    if not text.startswith(QUOTES):
        return text
    text = text.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + ask("... ")
    return text.rstrip().removesuffix(QUOTES).strip()


def _line(ask: Callable[[str], str]) -> str:
    """A line, with all that was pasted with it."""
    text = ask("> ")
    while keys.is_pasting():
        text += "\n" + ask("")
    return text.strip()


def is_command(message: str) -> bool:
    """Whether a message is a word to the program, like /help. A path or a fraction is none."""
    return re.fullmatch(r"/[a-z]*", message) is not None


@contextmanager
def silent() -> Generator[None]:
    """On a terminal, keys that are typed in this block are not shown: they would stand in the answer.

    They stay in the terminal: whole lines can be read from it, and the rest is there at the next prompt.
    """
    if not sys.stdin.isatty():
        yield
        return
    with keys.hidden():
        yield
