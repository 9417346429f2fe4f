"""Requests to a model and the pieces of its answers, before any network or wire format."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Grammar(msgspec.Struct, frozen=True):
    """A constraint on the text. `text` is the schema (JSON text), the GBNF, the Lark grammar or the regex."""

    kind: Literal["json_object", "json_schema", "gbnf", "lark", "regex"]
    text: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from a row of logits. The defaults sample the model's own distribution.

    `temperature` 0 is greedy. `seed` with the token's index fixes the draw, so that a replayed stream
    draws the same tokens. `top_logprobs` None reports no log-probabilities, 0 the chosen token's alone.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 256  # last tokens that the penalties look at
    seed: int = 0
    logit_bias: dict[int, float] = {}
    grammar: Grammar | None = None
    top_logprobs: int | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One stream to generate. `max_tokens` None: up to the end of the context.

    `share` names who asks: streams of different shares take turns (scheduler.py).
    `shows_control_tokens`: their names are part of the text, but for the one that ends it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    shows_control_tokens: bool = False
    share: str = ""


class Choice(msgspec.Struct, frozen=True):
    """A sampled token; with log-probabilities (natural log) where they were asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class TextChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer as the client may see it: whole characters only, and nothing of a stop string.

    The last chunk of a stream, and only that one, has a `finish_reason`; `text` may be empty.
    """

    text: str
    choices: tuple[Choice, ...] = ()  # the tokens behind `text`, where log-probabilities were asked for
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    completion_tokens: int = 0  # so far
