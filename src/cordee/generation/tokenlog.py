"""The token log: all that is needed to go on with a stream after any loss."""

from collections.abc import Sequence

from cordee.generation.request import SamplingParams

BLOCK_TOKENS = 64  # that are compared at once


class TokenLog:
    """Prompt and generated tokens of one stream, with how they are sampled.

    A stage that lost its KV cache gets the tokens again as a prefill, the sampler gets `generated` back, and
    the stream continues as if nothing had happened. `generated` are tokens that another host chose before.
    """

    def __init__(
        self, prompt: Sequence[int], sampling: SamplingParams, generated: Sequence[int] = ()
    ) -> None:
        self.prompt = tuple(prompt)
        self.sampling = sampling
        self.generated = list(generated)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.generated.append(token)

    def token(self, position: int) -> int:
        """The token at a position from 0."""
        edge = len(self.prompt)
        return self.prompt[position] if position < edge else self.generated[position - edge]

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens at positions start (inclusive) to stop (exclusive)."""
        edge = len(self.prompt)
        if stop <= edge:
            return list(self.prompt[start:stop])
        return list(self.prompt[start:edge]) + self.generated[max(0, start - edge) : stop - edge]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two lists begin with alike.

    Blocks are compared as bytes are, and only the first that differs token by token: a document may have a
    hundred thousand tokens, and is compared with each slot.
    """
    left, right = list(left), list(right)
    start, end = 0, min(len(left), len(right))
    while start < end and left[start : start + BLOCK_TOKENS] == right[start : start + BLOCK_TOKENS]:
        start += BLOCK_TOKENS
    for index in range(start, min(start + BLOCK_TOKENS, end)):
        if left[index] != right[index]:
            return index
    return end
