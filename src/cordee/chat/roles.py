"""Who speaks in a conversation: agents send roles in any order, and templates want them one after another."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cordee.chat.turn import Message

INSTRUCTING = ("system", "developer")
# How agents mark, within what the user says, what the user did not say.
REMINDER = "<system-reminder>\n{}\n</system-reminder>"


def alternating(messages: Iterable[Message]) -> list[Message]:
    """The messages with one system message at most, at the beginning, and nobody but tools twice in a row.

    Agents send several system or developer messages, also between turns, and a user's message in parts. Many
    templates refuse that, or leave out silently all instructions but the first. So what instructs before the
    first turn becomes one message; what instructs later is marked in the user's; and messages of one role
    that follow one another are joined, as the parts of an assistant's turn are. Where nobody has spoken, the
    user says nothing.
    """
    groups: list[list[Message]] = []
    for message in messages:
        leads = all(group[0].role in INSTRUCTING for group in groups)
        if message.role in INSTRUCTING and not leads:
            message = Message("user", REMINDER.format(message.content))
        if groups and _may_follow(groups[-1][-1], message):
            groups[-1].append(message)
        else:
            groups.append([message])
    if all(group[0].role in INSTRUCTING for group in groups):
        groups.append([Message("user")])
    return [_joined(group) for group in groups]


def _may_follow(last: Message, message: Message) -> bool:
    """Whether they can be one message."""
    if last.role in INSTRUCTING and message.role in INSTRUCTING:
        return True
    if last.role != message.role or last.name != message.name:
        return False
    if message.role == "assistant":  # what was said after calls is a turn of its own
        return not last.tool_calls or not (message.content or message.thinking)
    return message.role == "user"


def _joined(group: Sequence[Message]) -> Message:
    if len(group) == 1:
        return group[0]
    return replace(
        group[0],
        content="\n\n".join(each.content for each in group if each.content),
        thinking="\n\n".join(each.thinking for each in group if each.thinking),
        tool_calls=tuple(call for each in group for call in each.tool_calls),
    )
