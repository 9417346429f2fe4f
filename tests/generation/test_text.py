"""What a client sees of a stream of bytes: whole characters, and nothing of a stop string or after it."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cordee.errors import BadRequest
from cordee.generation.text import STOP_CHARS_MAX, STOPS_MAX, TextStream, check

few_letters = st.text(alphabet="aé🧗", max_size=24)
stops = st.lists(st.text(alphabet="aé🧗", min_size=1, max_size=4), max_size=4)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def shown(stream: TextStream, pieces: list[bytes]) -> str:
    return "".join([*map(stream.push, pieces), stream.finish()])


def expected(text: str, stop: list[str]) -> str:
    """The text up to the stop string that ends first as the text grows, or of those begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)]
    return text


@given(few_letters, st.lists(st.integers(0, 200), max_size=12), stops)
@example("aab", [1, 2], ["aab", "ab", "b"])
@example("aab", [], ["b", "ab"])
@example("abc", [], ["bc", "b"])
@example("aba", [1], ["abab", "ba"])
def test_any_cut_gives_the_text_up_to_the_first_stop(text: str, cuts: list[int], stop: list[str]) -> None:
    stream = TextStream(stop)
    before = expected(text, stop)
    assert shown(stream, pieces_of(text.encode(), cuts)) == before
    assert (stream.stopped is None) == (before == text)
    assert stream.stopped is None or (stream.stopped in stop and text.startswith(before + stream.stopped))


@given(few_letters, stops)
def test_what_was_given_is_never_taken_back(text: str, stop: list[str]) -> None:
    stream, seen = TextStream(stop), ""
    for place, byte in enumerate(text.encode(), 1):
        seen += stream.push(bytes([byte]))
        so_far = text.encode()[:place].decode(errors="ignore")
        assert expected(text, stop).startswith(seen)
        assert "\ufffd" not in seen
        assert (
            len(so_far) - len(seen) < max(map(len, stop), default=1) or stream.stopped
        )  # no more is held back


@given(st.binary(max_size=40), st.lists(st.integers(0, 200), max_size=8))
def test_broken_utf8_reads_as_python_reads_it(data: bytes, cuts: list[int]) -> None:
    assert shown(TextStream(), pieces_of(data, cuts)) == data.decode("utf-8", "replace")


def test_half_a_character_waits_for_its_other_half() -> None:
    stream = TextStream()
    climber = "🧗".encode()
    assert [stream.push(climber[:2]), stream.push(climber[2:])] == ["", "🧗"]


def test_a_character_cut_by_the_end_shows_as_replaced() -> None:
    stream = TextStream()
    assert stream.push("rope 🧗".encode()[:-1]) == "rope "
    assert stream.finish() == "\ufffd"


def test_a_stop_string_that_straddles_tokens_never_shows() -> None:
    stream = TextStream(["<|end|>"])
    assert [stream.push(piece) for piece in (b"Hold on<", b"|en", b"d|", b"> more")] == [
        "Hold on",
        "",
        "",
        "",
    ]
    assert stream.stopped
    assert (stream.push(b"more"), stream.finish()) == ("", "")


def test_what_only_looked_like_a_stop_string_is_given_late() -> None:
    stream = TextStream(["<|end|>"])
    assert [stream.push(piece) for piece in (b"a <", b"|", b"b")] == ["a ", "", "<|b"]
    assert not stream.stopped
    assert [stream.push(b"c <|"), stream.finish()] == ["c ", "<|"]


@pytest.mark.parametrize(
    "stop",
    [["a"] * (STOPS_MAX + 1), [""], ["a", ""], ["a" * (STOP_CHARS_MAX + 1)]],
    ids=["too many", "empty", "one empty", "too long"],
)
def test_stop_strings_out_of_bounds_are_refused(stop: list[str]) -> None:
    with pytest.raises(BadRequest) as refused:
        check(stop)
    assert refused.value.param == "stop"


def test_the_largest_stop_strings_work() -> None:
    stop = ["é" * (STOP_CHARS_MAX - 1) + chr(ord("a") + place) for place in range(STOPS_MAX)]
    stream = TextStream(stop)
    assert shown(stream, [b"rope ", *(bytes([byte]) for byte in stop[-1].encode()), b"!"]) == "rope "
    assert stream.stopped
