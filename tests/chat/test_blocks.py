"""An answer's events as blocks, each opened, grown and closed once, in order."""

from hypothesis import given
from hypothesis import strategies as st

from cordee.chat.blocks import Block, BlockStream, blocks_of
from cordee.chat.events import ArgumentsDelta, CallBegun, Event, TextDelta, ThinkingDelta


def made(events: list[Event], **options: bool) -> list[Block]:
    stream = BlockStream(**options)
    for event in events:
        list(stream.push([event]))
    list(stream.finish())
    return stream.blocks


def short(blocks: list[Block]) -> list[tuple[str, str]]:
    return [(block.kind, block.text) for block in blocks]


def test_text_thinking_and_calls_are_blocks_of_their_own() -> None:
    events = [
        ThinkingDelta("a"),
        ThinkingDelta("b"),
        TextDelta("c"),
        CallBegun("1", "look"),
        ArgumentsDelta('{"x":'),
        ArgumentsDelta("1}"),
        CallBegun("2", "look"),
        TextDelta("d"),
    ]
    blocks = made(events)
    assert short(blocks) == [
        ("thinking", "ab"),
        ("text", "c"),
        ("call", '{"x":1}'),
        ("call", "{}"),
        ("text", "d"),
    ]
    assert [block.place for block in blocks] == list(range(5))
    assert [(block.call_id, block.name) for block in blocks[2:4]] == [("1", "look"), ("2", "look")]


def test_white_space_between_others_is_no_block() -> None:
    events = [
        ThinkingDelta("\n"),
        TextDelta("\n\n"),
        CallBegun("1", "look"),
        TextDelta("\n"),
        CallBegun("2", "x"),
    ]
    assert [block.kind for block in made(events)] == ["call", "call"]
    assert short(made([TextDelta("\n"), TextDelta(" "), TextDelta("word"), TextDelta(" ")])) == [
        ("text", "\n word ")
    ]
    assert short(made([TextDelta(" "), ThinkingDelta("x")])) == [("thinking", "x")]


def test_thinking_that_nobody_asked_for_is_left_out() -> None:
    events = [ThinkingDelta("hm"), TextDelta("a"), ThinkingDelta("hm"), TextDelta("b")]
    assert short(made(events, shows_thinking=False)) == [("text", "ab")]


def test_a_whole_answer_has_the_same_blocks() -> None:
    events = [CallBegun("1", "look"), TextDelta("a"), ThinkingDelta("b"), TextDelta("c")]
    assert (
        short(blocks_of(events))
        == short(made(events))
        == [
            ("call", "{}"),
            ("text", "a"),
            ("thinking", "b"),
            ("text", "c"),
        ]
    )
    assert short(blocks_of(events, shows_thinking=False)) == [("call", "{}"), ("text", "ac")]
    assert blocks_of([]) == []


@given(
    st.lists(
        st.one_of(
            st.builds(TextDelta, st.text(" \nab", max_size=3)),
            st.builds(ThinkingDelta, st.text(" \nab", max_size=3)),
            st.builds(CallBegun, st.just("1"), st.just("x")),
        )
    ),
    st.data(),
)
def test_blocks_open_grow_and_close_in_order(events: list[Event], data: st.DataObject) -> None:
    """And the text does not depend on where it is cut."""
    stream = BlockStream()
    changes = [change for event in events for change in stream.push([event])] + list(stream.finish())
    open_block, grown = None, {}
    for change in changes:
        match change.step:
            case "opened":
                assert open_block is None
                open_block = change.block
                grown[change.block.place] = ""
            case "grown":
                assert open_block is change.block
                assert change.text
                grown[change.block.place] += change.text
            case "closed":
                assert open_block is change.block
                open_block = None
    assert open_block is None
    assert grown == {block.place: block.text for block in stream.blocks}
    at = data.draw(st.integers(0, len(events)))
    cut = BlockStream()
    for part in (events[:at], events[at:]):
        list(cut.push(part))
    list(cut.finish())
    assert short(cut.blocks) == short(stream.blocks)
