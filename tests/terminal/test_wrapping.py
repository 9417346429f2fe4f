"""An answer on a terminal: words stay whole, whatever pieces they come in."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from cordee.terminal.wrapping import AnswerPrinter


def printed(*pieces: str, cells: int = 20, wrap: bool = True) -> str:
    out: list[str] = []
    printer = AnswerPrinter(wrap=wrap, cells=lambda: cells, write=out.append)
    for piece in pieces:
        printer.add(piece)
    printer.end()
    return "".join(out)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("one two", "one two"),
        ("the quick brown fox jumps", "the quick brown fox\njumps"),
        ("exactly twenty cells", "exactly twenty cells"),
        ("exactly twenty cells more", "exactly twenty cells\nmore"),
        ("a\n\n  - b", "a\n\n  - b"),
        ("山で人々はなぜ綱で結び合うのか", "山で人々はなぜ綱で結\nび合うのか"),
        ("登山者一二三四五六七。八九", "登山者一二三四五六\n七。八九"),
        ("mixed 文字 and 文字 text", "mixed 文字 and 文字\ntext"),
        ("see https://example.org/a/long/address now", "see\nhttps://example.org/a/long/address\nnow"),
        (
            "```\nx = 'a very long line of code'\n```\nand then words again",
            "```\nx = 'a very long line of code'\n```\nand then words again",
        ),
        ("\x1b]0;title\x07\x1b[2Jhello\r\x08", "]0;title[2Jhello"),
        ("un\u202fespace\u00a0fine, trois", "un\u202fespace\u00a0fine,\ntrois"),
        ("👩‍🚀 climbs 🏔️", "👩‍🚀 climbs 🏔️"),
    ],
)
def test_lines_end_between_words(text: str, shown: str) -> None:
    assert printed(text) == shown
    assert printed(*text) == shown, "also letter by letter"
    assert printed(text, wrap=False) == text


def test_a_word_is_held_back_until_it_is_whole() -> None:
    out: list[str] = []
    printer = AnswerPrinter(wrap=True, cells=lambda: 10, write=out.append)
    printer.add("climbers ro")
    assert "".join(out) == "climbers"
    printer.add("ped")
    printer.break_line()
    assert "".join(out) == "climbers\n"
    assert not printer.in_line
    printer.end()
    assert "".join(out) == "climbers\nroped"
    assert printer.in_line


WORDS = st.text(st.sampled_from("ab é\n\t文字。-́"), max_size=120)


@given(WORDS, st.integers(4, 30), st.lists(st.integers(0, 120)))
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(
    text: str, cells: int, cuts: list[int]
) -> None:
    shown = printed(text, cells=cells)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    for line in shown.splitlines():
        words = re.findall(r"\S+", line.expandtabs(8))
        assert cell_len(line.replace("\t", " " * 8)) <= cells or len(words) <= 1 or line[0] in " \t"
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert printed(*pieces, cells=cells) == shown
