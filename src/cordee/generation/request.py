"""Requests to a model and the pieces of its answers, before any network or wire format."""

from typing import Literal, NamedTuple

import msgspec

FinishReason = Literal["stop", "length", "cancelled"]


class Grammar(msgspec.Struct, frozen=True):
    """A constraint on the text. `text` is the schema (JSON text), the GBNF, the Lark grammar or the regex;
    for `tools` and `thinking` JSON with what chat/binding.py makes of a turn."""

    kind: Literal["json_object", "json_schema", "gbnf", "lark", "regex", "tools", "thinking"]
    text: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from a row of logits. The defaults sample the model's own distribution.

    `temperature` 0 is greedy. `seed` with the token's index fixes the draw, so that a replayed stream
    draws the same tokens. `top_logprobs` None reports no log-probabilities, 0 the chosen token's alone.
    None of the tokens `ends` comes before there are `min_tokens`, unless a grammar has it so.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0  # 0: all
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 256  # last tokens that the penalties look at
    seed: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 8192  # last tokens in which DRY looks for repetitions
    dry_breakers: tuple[int, ...] = ()  # tokens through which no repetition goes
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ends: tuple[int, ...] = ()
    grammar: Grammar | None = None
    top_logprobs: int | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One stream to generate. `max_tokens` None: up to the end of the context.

    `shown_tokens` are control tokens whose names are part of the text; that of the last one never is.
    `scores_prompt`: the prompt's own tokens get log-probabilities, too, and so does the token that ends the
    answer; it needs `sampling.top_logprobs`. `share` names who asks: streams of
    different shares take turns (scheduler.py). `prediction` is what the answer may be: guesses, which change
    no token of it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    shown_tokens: tuple[int, ...] = ()
    scores_prompt: bool = False
    share: str = ""
    prediction: tuple[int, ...] = ()


class Choice(msgspec.Struct, frozen=True):
    """A sampled token; with log-probabilities (natural log) where they were asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class PromptProgress(NamedTuple):
    """How far a stream is before its first token.

    While it waits for a slot it has a `place` in the queue; the next one to get a slot has 1. Then its place
    is 0, and `read_tokens` of its prompt were read.
    """

    place: int = 0
    read_tokens: int = 0


class GuessCounts(NamedTuple):
    """What became of the guesses of an answer's tokens, on the host that answers now."""

    accepted: int = 0
    rejected: int = 0  # they were wrong, or behind one that was


NO_GUESSES = GuessCounts()


class TextChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer as the client may see it: whole characters only, and nothing of a stop string.

    The last chunk of a stream, and only that one, has a `finish_reason`; `text` may be empty.
    `prompt_choices` come with the first chunk that has tokens: the prompt's tokens but the first, where their
    log-probabilities were asked for. A chunk with `progress` has nothing else.
    """

    text: str
    choices: tuple[Choice, ...] = ()  # the tokens behind `text`, where log-probabilities were asked for
    prompt_choices: tuple[Choice, ...] = ()
    progress: PromptProgress | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None  # the stop string that ended the text, if one did
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the KV cache
    completion_tokens: int = 0  # so far
    guesses: GuessCounts = NO_GUESSES
