"""One sampler for every engine: a row of logits in, a token out.

The order, which is llama.cpp's common one:

1. grammar: only tokens that may come next are candidates; without one, no end before `min_tokens`;
2. logit bias: added to the logit;
3. penalties over the last `penalty_window` tokens of prompt and answer: a logit is divided (negative:
   multiplied) by `repeat_penalty`, then lowered by count x `frequency_penalty` + `presence_penalty`;
   then DRY lowers the logits of tokens that would go on with a repetition;
4. temperature 0: the highest logit, of equal ones the lowest id;
5. else top-n-sigma, top-k, typical-p, top-p, min-p, XTC, temperature (dynamic, if asked for), and a draw,
   all by libllama's own samplers.

The draw of the i-th token of an answer is seeded by a mix of (seed, i) alone and nothing else is kept but
what the tokens so far imply. So a sampler made with a replayed answer goes on exactly as the first would.
libllama's mirostat and adaptive-p are not here: their state is made of all the probabilities so far.
Log-probabilities are of the model's own distribution: the log-softmax of the row as it came in.
"""

from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from math import isfinite
from typing import Protocol

import numpy as np

from cordee.engine.llama import libllama
from cordee.errors import BadRequest, StageFailed
from cordee.generation import candidates
from cordee.generation.dry import DryPenalty
from cordee.generation.request import Choice, SamplingParams

# Below this a logit difference of a float32's last digits decides: greedy, without overflow by the division.
GREEDY_BELOW = 1e-4
PENALTY_WINDOW_MAX = 8192  # penalties walk the window's distinct tokens at each token
LOGIT_BIAS_MAX = 1024  # entries; OpenAI accepts 300

# Inclusive ranges; OpenAI's where it has the parameter.
RANGES = {
    "temperature": (0.0, 2.0),
    "top_k": (0, 1 << 30),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (0.0, 100.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dynatemp_range": (0.0, 2.0),
    "dynatemp_exponent": (0.0, 10.0),
    "repeat_penalty": (0.1, 10.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "penalty_window": (0, PENALTY_WINDOW_MAX),
    "dry_multiplier": (0.0, 10.0),
    "dry_base": (1.0, 10.0),
    "dry_allowed_length": (0, PENALTY_WINDOW_MAX),
    "dry_window": (0, PENALTY_WINDOW_MAX),
    "min_tokens": (0, 1 << 30),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "top_logprobs": (0, 20),
}
LOGIT_BIAS_RANGE = (-100.0, 100.0)


def check(params: SamplingParams, n_vocab: int) -> None:
    """Refuse parameters that cannot be honoured, before the request is queued. Grammars are not looked at.

    Raises:
        BadRequest: names the parameter.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(params, name)
        if value is None:
            continue
        if not isfinite(value) or not low <= value <= high:
            raise BadRequest(f"{name} must be from {low} to {high}, not {value}", name)
    for name in ("ends", "dry_breakers"):
        if any(not 0 <= token < n_vocab for token in getattr(params, name)):
            raise BadRequest(f"{name} must hold the model's tokens, 0 to {n_vocab - 1}", name)
    _check_bias(params.logit_bias, n_vocab)


def _check_bias(logit_bias: dict[int, float], n_vocab: int) -> None:
    low, high = LOGIT_BIAS_RANGE
    if len(logit_bias) > LOGIT_BIAS_MAX:
        raise BadRequest(
            f"logit_bias has {len(logit_bias)} entries; at most {LOGIT_BIAS_MAX} are accepted", "logit_bias"
        )
    for token, bias in logit_bias.items():
        if not 0 <= token < n_vocab:
            raise BadRequest(f"logit_bias names token {token}; the model has {n_vocab} tokens", "logit_bias")
        if not low <= bias <= high:  # also refuses NaN
            raise BadRequest(f"logit_bias must be from {low} to {high}, not {bias}", "logit_bias")


class Constraint(Protocol):
    """What binds the tokens of a stream; `grammar.GrammarState` is one."""

    def allowed(self) -> np.ndarray: ...
    def accept(self, token: int) -> None: ...
    def forced(self) -> list[int]: ...


class Sampler:
    """Chooses the tokens of one stream, each when its logits are there. Not thread-safe.

    `params` must have passed `check`; where it has a grammar, `constraint` is its state after `generated`.
    `history` is the prompt; `generated` are tokens of the answer that are already chosen (a replay).
    """

    def __init__(
        self,
        params: SamplingParams,
        constraint: Constraint | None,
        history: Sequence[int],
        generated: Sequence[int] = (),
    ) -> None:
        self.params = params
        self._index = len(generated)
        self._greedy = params.temperature < GREEDY_BELOW
        self._edits = _Edits(params, history, generated)
        has_dry = params.dry_multiplier > 0 and params.dry_window > 0
        self._dry = DryPenalty(params, (*history, *generated)) if has_dry else None
        assert (params.grammar is None) == (constraint is None), "a grammar has a state"
        self._grammar = constraint

    def sample(self, logits: np.ndarray) -> Choice:
        """Choose a token from a (n_vocab,) float32 row, which is only read, and go on to the next index.

        Raises:
            StageFailed: the row holds NaN, or its highest logit is an infinity.
            BadRequest: the grammar passed its limits.
        """
        best = int(logits.argmax())  # the first NaN, if there is one
        highest = logits[best]
        if not isfinite(highest):
            raise StageFailed(f"the model gave the logit {highest}: its weights or this build are faulty")
        allowed = self._grammar.allowed() if self._grammar is not None else None
        row = self._edits.apply(logits)
        if self._dry is not None:
            row = self._dry.apply(row)
        row = self._without_ends(row, logits)
        if not self._greedy:
            token = self._sample(row, allowed)
        else:
            token = self._argmax(row, best if row is logits else int(row.argmax()), allowed)
        if self._grammar is not None:
            self._grammar.accept(token)
        self._edits.accept(token)
        if self._dry is not None:
            self._dry.accept(token)
        self._index += 1
        if self.params.top_logprobs is None:
            return Choice(token)
        return scored(token, logits, self.params.top_logprobs)

    def forced(self) -> list[int]:
        """Tokens of the bytes that a grammar leaves to come next, as they would usually be cut."""
        return [] if self._grammar is None else self._grammar.forced()

    def _without_ends(self, row: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The row without the tokens that would end the answer too early, if others are possible."""
        params = self.params
        if self._index >= params.min_tokens or not params.ends or self._grammar is not None:
            return row
        row = row.copy() if row is logits else row
        ends = list(params.ends)
        before = row[ends]
        row[ends] = -np.inf
        if row.max() == -np.inf:
            row[ends] = before
        return row

    def _argmax(self, row: np.ndarray, best: int, allowed: np.ndarray | None) -> int:
        if allowed is None or allowed[best]:
            return best
        ids = _possible(row, allowed)
        return int(ids[row[ids].argmax()])

    def _sample(self, row: np.ndarray, allowed: np.ndarray | None) -> int:
        ids = None if allowed is None else _possible(row, allowed)
        return _draw(self.params, row, ids, self._index)


def _possible(row: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The ids that a grammar allows.

    Raises:
        StageFailed: the model rules all of them out.
    """
    ids = np.flatnonzero(allowed)
    if row[ids].max() == -np.inf:
        raise StageFailed("the model rules out every token that the grammar allows")
    return ids


def draw_seed(seed: int, index: int) -> int:
    """Mix a stream's seed and a token's index to a seed of 32 bits (SplitMix64's finaliser, Steele 2014).

    Never 0xFFFFFFFF, by which libllama means "seed me from the clock".
    """
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) & 0xFFFFFFFF) % 0xFFFFFFFF


class _Edits:
    """Logit bias and penalties: changes to few logits of a row.

    libllama's own samplers for these look each candidate up in a table; here only the few are touched.
    """

    def __init__(self, params: SamplingParams, history: Sequence[int], generated: Sequence[int]) -> None:
        self._params = params
        self._penalised = params.penalty_window > 0 and (
            params.repeat_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        self.active = bool(params.logit_bias) or self._penalised
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._window: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        if self._penalised:
            for token in (*history, *generated)[-params.penalty_window :]:
                self.accept(token)

    def accept(self, token: int) -> None:
        """Move the penalties' window on by one token."""
        if not self._penalised:
            return
        self._window.append(token)
        self._counts[token] += 1
        if len(self._window) > self._params.penalty_window:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """The row with its edits: a copy, or the row itself where there are none."""
        if not self.active:
            return logits
        row = logits.copy()
        row[self._bias_ids] += self._bias
        if self._counts:
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[ids] = self._penalise(row[ids], counts)
        return row

    def _penalise(self, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        repeat = np.float32(self._params.repeat_penalty)
        values = np.where(values > 0, values / repeat, values * repeat)
        frequency = np.float32(self._params.frequency_penalty)
        return values - (counts * frequency + np.float32(self._params.presence_penalty))


def _draw(params: SamplingParams, row: np.ndarray, ids: np.ndarray | None, index: int) -> int:
    """Draw the token at `index` of the (k,) candidate `ids` (None: all) of a (n_vocab,) row by libllama's
    samplers."""
    if ids is not None:
        row = row[ids]
    top_p = params.top_p
    is_first = not params.top_k and params.typical_p >= 1.0 and not params.top_n_sigma
    if 0.0 < top_p < 1.0 and is_first:
        kept, top_p = _nucleus_bound(row, top_p)
        ids = kept if ids is None else ids[kept]
        row = row[kept]
    tokens = np.empty(len(row), candidates.CANDIDATE)
    tokens["id"] = _every_id(len(row)) if ids is None else ids
    tokens["logit"] = row
    return _drawn(_chain(params, top_p, index), tokens)


def _nucleus_bound(row: np.ndarray, top_p: float) -> tuple[np.ndarray, float]:
    """Leave out tokens that top-p cannot keep, so that libllama need not sort the vocabulary (12 ms at 200k).

    Of k tokens those with less than (1 - top_p) / k of the probability hold less than 1 - top_p together, so
    the nucleus is among the others. Gives their places in the row, and `top_p` as a share of theirs.
    """
    weights = np.exp(row - row.max())
    total = weights.sum(dtype=np.float64)
    kept = np.flatnonzero(weights >= (1.0 - top_p) / len(row) * total)
    return kept, min(1.0, float(top_p * total / weights[kept].sum(dtype=np.float64)))


def _chain(params: SamplingParams, top_p: float, index: int) -> int:
    """libllama's samplers for one draw; `_drawn` frees them. Making them takes microseconds."""
    library = libllama.load()
    made: list[int] = []
    if params.top_n_sigma:
        made.append(library.llama_sampler_init_top_n_sigma(params.top_n_sigma))
    if params.top_k:
        made.append(library.llama_sampler_init_top_k(params.top_k))
    if params.typical_p < 1.0:
        made.append(library.llama_sampler_init_typical(params.typical_p, 1))
    if top_p < 1.0:
        made.append(library.llama_sampler_init_top_p(top_p, 1))
    if params.min_p:
        made.append(library.llama_sampler_init_min_p(params.min_p, 1))
    if params.xtc_probability:
        # By a seed of its own, so that nothing ties which tokens are left out to which one is drawn.
        own = draw_seed(~params.seed, index)
        made.append(library.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, own))
    made.append(
        library.llama_sampler_init_temp_ext(
            params.temperature, params.dynatemp_range, params.dynatemp_exponent
        )
        if params.dynatemp_range
        else library.llama_sampler_init_temp(params.temperature)
    )
    made.append(library.llama_sampler_init_dist(draw_seed(params.seed, index)))
    chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
    for sampler in made:
        library.llama_sampler_chain_add(chain, sampler)
    return chain


def _drawn(chain: int, tokens: np.ndarray) -> int:
    try:
        array = candidates.apply(chain, tokens)
        return array.data[array.selected].id
    finally:
        libllama.load().llama_sampler_free(chain)  # with the samplers in it


@lru_cache(maxsize=4)  # as many vocabularies as one process is likely to serve
def _every_id(n_vocab: int) -> np.ndarray:
    return np.arange(n_vocab, dtype=np.int32)


def scored(token: int, logits: np.ndarray, top: int) -> Choice:
    """A token with the log-softmax of the raw (n_vocab,) row, and of its `top` likeliest tokens; equal logits
    are ranked by id."""
    shifted = logits - logits.max()
    log_sum = np.log(np.exp(shifted).sum(dtype=np.float64))
    best = ()
    if top:
        top = min(top, len(logits))
        bar = np.partition(logits, -top)[-top]
        ids = np.flatnonzero(logits >= bar)
        ids = ids[np.lexsort((ids, -logits[ids]))][:top]
        best = tuple((int(i), float(shifted[i] - log_sum)) for i in ids)
    return Choice(token, float(shifted[token] - log_sum), best)
