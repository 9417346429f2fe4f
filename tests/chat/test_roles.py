"""Conversations as agents send them become such that every template takes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cordee.chat.roles import alternating
from cordee.chat.turn import Message, ToolCall

CALLS = (ToolCall("1", "look", "{}"), ToolCall("2", "look", "{}"))


def test_instructions_before_the_first_turn_are_one_message() -> None:
    given_messages = [Message("system", "A"), Message("developer", "B"), Message("user", "C")]
    assert alternating(given_messages) == [Message("system", "A\n\nB"), Message("user", "C")]


def test_instructions_between_turns_are_marked_in_the_users() -> None:
    given_messages = [
        Message("user", "A"),
        Message("system", "B"),
        Message("assistant", "C"),
        Message("developer", "D"),
        Message("user", "E"),
    ]
    assert [(each.role, each.content) for each in alternating(given_messages)] == [
        ("user", "A\n\n<system-reminder>\nB\n</system-reminder>"),
        ("assistant", "C"),
        ("user", "<system-reminder>\nD\n</system-reminder>\n\nE"),
    ]


def test_the_parts_of_an_assistants_turn_are_one_message() -> None:
    parts = [
        Message("assistant", thinking="hm"),
        Message("assistant", "I look."),
        Message("assistant", tool_calls=CALLS[:1]),
        Message("assistant", tool_calls=CALLS[1:]),
        Message("assistant", thinking="again"),
    ]
    first, second = alternating([Message("user", "A"), *parts])[1:]
    assert (first.content, first.thinking, first.tool_calls) == ("I look.", "hm", CALLS)
    assert (second.thinking, second.tool_calls) == ("again", ())


def test_results_of_calls_stay_apart() -> None:
    results = [Message("tool", "x", tool_call_id="1"), Message("tool", "y", tool_call_id="2")]
    assert alternating([Message("user"), *results])[1:] == results


def test_where_nobody_spoke_the_user_says_nothing() -> None:
    assert alternating([Message("system", "A")]) == [Message("system", "A"), Message("user")]
    assert alternating([]) == [Message("user")]


MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    st.text("ab", max_size=2),
    tool_calls=st.sampled_from([(), CALLS]),
)


@given(st.lists(MESSAGES))
def test_nothing_that_was_said_is_lost(messages: list[Message]) -> None:
    found = alternating(messages)
    said = "".join(each.content for each in found)
    for word in ("<system-reminder>", "</system-reminder>", "\n"):
        said = said.replace(word, "")
    assert said == "".join(each.content for each in messages)
    assert [each.role in ("system", "developer") for each in found[1:]] == [False] * (len(found) - 1)
    assert not any(a.role == b.role == "user" for a, b in pairwise(found))
    assert alternating(found) == found
