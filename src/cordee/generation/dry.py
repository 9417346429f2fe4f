"""DRY, by libllama: lowers the logits of tokens that would go on with a repetition, more the longer it is.

(p-e-w 2024, text-generation-webui, pull request 5677.) It looks at nothing but the last tokens, so a replayed
answer goes on as the first would have.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from cordee.engine.llama import libllama
from cordee.generation import candidates
from cordee.generation.request import SamplingParams

NO_TOKEN = -1  # LLAMA_TOKEN_NULL; below it no token has a number


class DryPenalty:
    """The penalty of one stream, after the tokens of prompt and answer so far.

    No repetition goes through one of `dry_breakers`. libllama would find these in the vocabulary, which is
    elsewhere; here each one that comes is a token of its own, which nothing can repeat.
    """

    def __init__(self, params: SamplingParams, tokens: Sequence[int]) -> None:
        library = libllama.load()
        self._sampler: Any = library.llama_sampler_init_dry(
            None,
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            params.dry_window,
            None,
            0,
        )
        weakref.finalize(self, library.llama_sampler_free, self._sampler)
        self._accept = library.llama_sampler_accept
        self._breakers = frozenset(params.dry_breakers)
        self._breaks = 0
        self._seen: dict[int, None] = {}
        for token in tokens[-params.dry_window :]:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if token in self._breakers:
            self._breaks += 1
            token = NO_TOKEN - self._breaks
        else:
            self._seen[token] = None
        self._accept(self._sampler, token)

    def apply(self, row: np.ndarray) -> np.ndarray:
        """A copy of the row with the penalties: only tokens that were there can go on with a repetition."""
        ids = np.fromiter(self._seen, np.int32, len(self._seen))
        found = np.empty(len(ids), candidates.CANDIDATE)
        found["id"], found["logit"] = ids, row[ids]
        candidates.apply(self._sampler, found)
        row = row.copy()
        row[found["id"]] = found["logit"]
        return row
