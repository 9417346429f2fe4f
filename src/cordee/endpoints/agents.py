"""What Responses and Anthropic's messages share: agents ask both for the same things, by other names."""

from collections.abc import Mapping, Sequence
from typing import Literal

from cordee.api.core import random_seed
from cordee.api.schemas import Shape
from cordee.chat.turn import Thinking, Tool, ToolChoice
from cordee.errors import BadRequest
from cordee.generation.request import SamplingParams

# What clients ask for, and what templates know.
EFFORTS: Mapping[str, str] = {
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
NO_EFFORT = "none"


def thinking_by(effort: str | None, param: str) -> Thinking:
    """What an effort asks of the model; None leaves it as it is.

    Raises:
        BadRequest: there is no such effort.
    """
    if effort is None:
        return Thinking()
    if effort == NO_EFFORT:
        return Thinking(enabled=False)
    if effort not in EFFORTS:
        raise BadRequest(f"{param} must be one of {', '.join((NO_EFFORT, *EFFORTS))}", param)
    return Thinking(effort=EFFORTS[effort])


def choice_of(
    mode: Literal["none", "auto", "required"], name: str | None, tools: Sequence[Tool]
) -> ToolChoice:
    """The choice of tools that a request makes.

    Raises:
        BadRequest: it wants a call of a tool that is not there.
    """
    if mode == "required" and not tools:
        raise BadRequest(
            "tool_choice asks for a call, but no tool is given that could be called", "tool_choice"
        )
    if name is not None and name not in {tool.name for tool in tools}:
        raise BadRequest(
            f"tool_choice names {name}, which is none of the tools that can be called", "tool_choice"
        )
    return ToolChoice(mode, name)


def sampling_of(body: Shape, *names: str) -> SamplingParams:
    """How tokens are chosen, by these fields of a body. What a client leaves out, or sends as null, keeps its
    default; the seed is a random one."""
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return SamplingParams(**given, seed=random_seed())
