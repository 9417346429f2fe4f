"""A conversation at the terminal: pasted lines, messages of several lines, keys during an answer."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cordee.terminal import keyboard
from terminal import Terminal

READER = (
    sys.executable,
    "-c",
    "from cordee.terminal import keyboard\n"
    "keyboard.prepare()\n"
    "while True: print('read', ascii(keyboard.read_message()))",
)
PASTE = "\x1b[200~{}\x1b[201~"  # what terminals send


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("Hello\r", "Hello"),
        ("\r", ""),
        (PASTE.format("Dear Ada,\rhow are you?\r\rBob") + "\r", "Dear Ada,\nhow are you?\n\nBob"),
        ("Translate: " + PASTE.format("un\rdeux") + " into English\r", "Translate: un\ndeux into English"),
        (PASTE.format("/help\ris no command here") + "\r", "/help\nis no command here"),
        ('"""\rDear Ada,\r\rBob\r"""\r', "Dear Ada,\n\nBob"),
        ('"""Dear Ada,\rBob"""\r', "Dear Ada,\nBob"),
        ('"""one line"""\r', "one line"),
        ('"""' + PASTE.format('x = """\ry') + '"""\r', 'x = """\ny'),
        ("été 文字\r", "été 文字"),
    ],
)
def test_a_message_is_what_was_typed_or_pasted(home: Path, typed: str, message: str) -> None:
    terminal = Terminal(home=home, program=READER, term="xterm")
    terminal.until("> ")
    terminal.type(typed)
    terminal.until("read ")
    assert terminal.until("\r\n").strip() == ascii(message)
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 1, "EOFError"


def lines(*typed: str) -> Callable[[str], str]:
    left: Iterator[str] = iter(typed)

    def ask(_: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


def test_an_end_within_a_message_ends_the_conversation() -> None:
    with pytest.raises(EOFError):
        keyboard.read_message(lines('"""', "begun"))


@pytest.mark.parametrize(
    ("message", "is_one"),
    [("/help", True), ("/", True), ("/etc/hosts: what is it?", False), ("/reset\nit", False), ("1/2", False)],
)
def test_a_command_is_one_word(message: str, *, is_one: bool) -> None:
    assert keyboard.is_command(message) == is_one
