"""DRY against its own definition, and replays."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadRequest
from cordee.generation.request import SamplingParams
from cordee.generation.sampling import Sampler, check

GREEDY = SamplingParams(temperature=0.0)
DRY = SamplingParams(temperature=0.0, dry_multiplier=2.0, dry_base=1.5, dry_allowed_length=2)
SIZE = 8


def lowered(tokens: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """By how much each next token is lowered: by the longest repetition that it would go on with."""
    tokens = tokens[-params.dry_window :]
    longest: dict[int, int] = {}
    for place in range(1, len(tokens)):
        length = 0
        while length < place and tokens[place - 1 - length] == tokens[len(tokens) - 1 - length]:
            if tokens[place - 1 - length] in params.dry_breakers:
                break
            length += 1
        if length >= max(1, params.dry_allowed_length) and tokens[place] not in params.dry_breakers:
            longest[tokens[place]] = max(longest.get(tokens[place], 0), length)
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in longest.items()
    }


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 4),
    st.sampled_from([5, 12, 64]),
    st.sets(st.integers(0, 3), max_size=2),
)
def test_what_would_go_on_with_a_repetition_is_lowered(
    tokens: list[int], allowed: int, window: int, breakers: set[int]
) -> None:
    params = msgspec.structs.replace(
        DRY, dry_allowed_length=allowed, dry_window=window, dry_breakers=tuple(breakers), top_logprobs=0
    )
    expected = lowered(tokens, params)
    for token in range(4):
        logits = np.full(SIZE, -50.0, dtype=np.float32)
        logits[token], logits[7] = 0.0, -expected.get(token, 0.0) - 0.01
        assert Sampler(params, None, tokens).sample(logits).token == token
        logits[7] += 0.02
        assert Sampler(params, None, tokens).sample(logits).token == 7


@pytest.mark.parametrize("lost_at", [0, 3, 17])
def test_a_replay_goes_on_as_if_nothing_had_happened(lost_at: int) -> None:
    rows = np.random.default_rng(1).standard_normal((20, SIZE)).astype(np.float32)
    params = msgspec.structs.replace(DRY, temperature=0.8, seed=3, dry_breakers=(5,), dry_window=9)
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    sampler = Sampler(params, None, prompt)
    answer = [sampler.sample(row).token for row in rows]
    replayed = Sampler(params, None, prompt, answer[:lost_at])
    assert [replayed.sample(row).token for row in rows[lost_at:]] == answer[lost_at:]


def test_a_model_that_would_loop_does_not() -> None:
    def said(params: SamplingParams) -> list[int]:
        """What a model writes that wants to repeat 1, 2, 3 for ever."""
        tokens = [1, 2, 3]
        sampler = Sampler(params, None, tokens)
        for _ in range(30):
            logits = np.zeros(SIZE, dtype=np.float32)
            logits[tokens[-1] % 3 + 1] = 4.0
            tokens.append(sampler.sample(logits).token)
        return tokens

    assert said(GREEDY) == [1, 2, 3] * 11
    assert said(DRY) != said(GREEDY)


def test_breakers_must_be_tokens() -> None:
    with pytest.raises(BadRequest, match="dry_breakers"):
        check(msgspec.structs.replace(DRY, dry_breakers=(SIZE,)), SIZE)
