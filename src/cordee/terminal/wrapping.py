"""An answer on a terminal, as it is generated: lines end between words, at the terminal's width."""

import os
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress

import click
from rich.cells import cell_len

FENCE = "```"
# Chinese and Japanese break between any two letters, but no line begins with one of these.
NO_LINE_BEGINS_WITH = frozenset(
    "、。，．：；！？）］｝〉》」』】〕々ー…ゝゞァィゥェォッャュョぁぃぅぇぉっゃゅょ"
)
TAB_CELLS = 8
FALLBACK_CELLS = 80  # of a terminal that does not know its width


def terminal_cells() -> int:
    """The width of the terminal now: it may change during an answer, which COLUMNS would not tell."""
    with suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or FALLBACK_CELLS
    return FALLBACK_CELLS


def show(text: str) -> None:
    """Print text at once."""
    click.echo(text, nl=False)


class AnswerPrinter:
    """Prints the pieces of an answer; with `wrap` for a terminal, else just as they come.

    On a terminal, a word is held back until it is whole. Code (between ``` and ```) keeps its lines, so that
    it can be copied, and control characters are left out: an answer must not move the cursor or set a title.
    """

    def __init__(
        self, *, wrap: bool, cells: Callable[[], int] = terminal_cells, write: Callable[[str], None] = show
    ) -> None:
        self._wrap = wrap
        self._cells = cells
        self._write = write
        self._out = ""  # to be written at the end of the call
        self._column = 0
        self._gap = ""  # spaces between what is printed and the word
        self._word = ""
        self._word_cells = 0
        self._is_long = False  # the word is wider than the terminal, which breaks it itself
        self._line = ""  # the beginning of the text's own line
        self._is_code = False

    @property
    def in_line(self) -> bool:
        """Whether the cursor stands behind something in its line."""
        return self._column > 0

    def add(self, text: str) -> None:
        """Print the next piece."""
        if self._wrap:
            for letter in text:
                self._add(letter)
            self._flush()
        elif text:
            self._write(text)
            self._column = 0 if text.endswith("\n") else 1

    def end(self) -> None:
        """Print what was held back."""
        self._place()
        self._flush()

    def break_line(self) -> None:
        """Go to a new line, for something else than the answer; a word that was held back comes after."""
        if self._column:
            self._newline()
        self._flush()

    def _add(self, letter: str) -> None:
        if letter == "\n":
            self._place()
            self._newline()
            self._is_code ^= self._line.lstrip().startswith(FENCE)
            self._line = ""
            return
        if unicodedata.category(letter) == "Cc" and letter != "\t":
            return
        self._line += letter if len(self._line) < TAB_CELLS else ""
        cells = cell_len(letter)
        if self._is_code:
            self._print(letter, TAB_CELLS if letter == "\t" else cells)
        elif letter in " \t":
            self._place()
            self._is_long = False
            self._gap += letter
        elif self._is_long:
            self._print(letter, cells)
        else:
            is_between_wide = 2 in (cells, cell_len(self._word[-1:])) and cells > 0
            if is_between_wide and letter not in NO_LINE_BEGINS_WITH:
                self._place()
            self._word += letter
            self._word_cells += cells
            if self._word_cells > self._cells():
                self._place()
                self._is_long = True

    def _place(self) -> None:
        """Print the word, in this line if it fits."""
        if not self._word:
            return
        gap_cells = sum(TAB_CELLS if space == "\t" else 1 for space in self._gap)
        if self._column and self._column + gap_cells + self._word_cells > self._cells():
            self._newline()
        else:
            self._print(self._gap, gap_cells)
        self._print(self._word, self._word_cells)
        self._gap, self._word, self._word_cells = "", "", 0

    def _print(self, text: str, cells: int) -> None:
        self._out += text
        self._column += cells

    def _newline(self) -> None:
        self._out += "\n"
        self._column = 0
        self._gap = ""

    def _flush(self) -> None:
        if self._out:
            self._write(self._out)
        self._out = ""
