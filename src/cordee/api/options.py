"""From the fields of a request to how its answer is made: aliases, defaults, limits."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest

from cordee.api import ignored
from cordee.api.bodies import decode
from cordee.api.core import AnswerOptions, random_seed
from cordee.api.schemas import NULL, TOKENS_MAX, Samplers
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest
from cordee.generation.request import Grammar, SamplingParams
from cordee.generation.sampling import PENALTY_WINDOW_MAX
from cordee.grammar.grammar import refusal
from cordee.grammar.json_schema import loosened

DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
TEXTS_MAX = 8  # sets of breakers that are remembered, over all models
ANY_OBJECT = msgspec.json.Decoder(dict[str, Any])
SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dynatemp_range",
    "dynatemp_exponent",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)


def answer_options(
    given: Samplers,
    vocabulary: Vocabulary,
    max_tokens: int | None,
    *,
    grammar: Grammar | None = None,
    logit_bias: Mapping[str, float] | None = None,
    top_logprobs: int | None = None,
    n: int = 1,
    defaults: Mapping[str, Any] | None = None,
) -> AnswerOptions:
    """How tokens are chosen. What a client leaves out, or sends as null, keeps its default: OpenAI's, or
    that of `defaults`.

    Raises:
        BadRequest: names the field.
    """
    chosen = dict(defaults or {})
    chosen |= {name: value for name in SAMPLING if (value := getattr(given, name)) is not None}
    if given.repeat_penalty is None and given.repetition_penalty is not None:
        chosen["repeat_penalty"] = given.repetition_penalty
    if given.top_n_sigma is not None:
        chosen["top_n_sigma"] = max(0.0, given.top_n_sigma)
    if (top_k := whole(given.top_k, "top_k")) is not None:
        chosen["top_k"] = max(0, top_k)
    window = _window(given.repeat_last_n, "repeat_last_n")
    window = _window(given.penalty_last_n, "penalty_last_n") if window is None else window
    if window is not None:
        chosen["penalty_window"] = window
    chosen |= _dry(given, vocabulary)
    min_tokens = TOKENS_MAX if given.ignore_eos else whole(given.min_tokens, "min_tokens") or 0
    seed = whole(given.seed, "seed")
    sampling = SamplingParams(
        **chosen,
        seed=random_seed() if seed is None else seed,
        logit_bias=_logit_bias(logit_bias or {}),
        min_tokens=min_tokens,
        ends=tuple(sorted(vocabulary.end_of_generation)) if min_tokens else (),
        grammar=grammar,
        top_logprobs=top_logprobs,
    )
    return AnswerOptions(sampling=sampling, max_tokens=max_tokens, stop=_stops(given.stop), n=n)


def limit(value: float | None, name: str) -> int | None:
    """A limit of tokens; None where there is none, which is also what less than 0 says.

    Raises:
        BadRequest: it is 0, or no whole number.
    """
    tokens = whole(value, name)
    if tokens is None or tokens < 0:
        return None
    if not 1 <= tokens <= TOKENS_MAX:
        raise BadRequest(f"{name} must be from 1 to {TOKENS_MAX}, or less than 0 for no limit", name)
    return tokens


def whole(value: float | None, name: str) -> int | None:
    """A whole number, whichever way it is written.

    Raises:
        BadRequest: it has a fraction.
    """
    if value is None or isinstance(value, int):
        return value
    if not value.is_integer():
        raise BadRequest(f"{name} must be a whole number, not {value}", name)
    return int(value)


def schema_grammar(request: HttpRequest, raw: msgspec.Raw, field: str, *, strict: bool = False) -> Grammar:
    """The grammar of a JSON schema. What of it cannot be bound is noted as a part of `field`, unless it is
    `strict`: then it is refused when the grammar is tried.

    Raises:
        BadRequest: it is no schema, or nested too deeply.
    """
    try:
        schema = decode(bytes(raw), ANY_OBJECT)
        bindable, names = loosened(schema, strict=strict)
        text = msgspec.json.encode(bindable).decode()
    except RecursionError:
        raise refusal("json_schema", "it is nested too deeply") from None
    except BadRequest as error:
        raise refusal("json_schema", error.message) from None
    ignored.note(request, *(f"{field}.{name}" for name in names))
    return Grammar("json_schema", text)


def is_given(raw: msgspec.Raw) -> bool:
    """Whether a field that is not decoded yet is there, and not null."""
    return bytes(raw) != bytes(NULL)


def _window(value: float | None, name: str) -> int | None:
    """A number of last tokens; less than 0 is as many as there may be."""
    tokens = whole(value, name)
    if tokens is None:
        return None
    return PENALTY_WINDOW_MAX if tokens < 0 else min(tokens, PENALTY_WINDOW_MAX)


def _dry(given: Samplers, vocabulary: Vocabulary) -> dict[str, Any]:
    if not given.dry_multiplier:
        return {}
    breakers = DRY_BREAKERS if given.dry_sequence_breakers is None else given.dry_sequence_breakers
    chosen = {
        "dry_multiplier": given.dry_multiplier,
        "dry_base": given.dry_base,
        "dry_allowed_length": whole(given.dry_allowed_length, "dry_allowed_length"),
        "dry_window": _window(given.dry_penalty_last_n, "dry_penalty_last_n"),
        "dry_breakers": _tokens_with(vocabulary, tuple(filter(None, breakers))),
    }
    return {name: value for name, value in chosen.items() if value is not None}


@lru_cache(TEXTS_MAX)
def _tokens_with(vocabulary: Vocabulary, texts: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens that hold one of the texts, and all control tokens. A large vocabulary takes 0.1 s, once."""
    wanted = [text.encode("utf-8", "surrogatepass") for text in texts]
    return tuple(
        token
        for token in range(vocabulary.size)
        if vocabulary.is_control(token) or any(text in vocabulary.piece(token) for text in wanted)
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    return tuple(text for text in stops if text)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise BadRequest("logit_bias must have token ids for keys, as strings", "logit_bias") from None
