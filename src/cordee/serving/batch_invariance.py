"""Whether a model is batch-invariant here: a row gives the same bits alone, in a batch, and in a prefill.

Only then is a replayed or batched stream token-identical to an undisturbed run alone. It depends on the
model's tensor types, the build and the devices, so it is measured on the loaded pipeline itself, once, and
kept in the store under `key`. The stages answer with digests of the logits instead of tokens.
"""

from collections.abc import Awaitable, Callable, Sequence

from cordee.engine.stage import StageConfig, StageDescription
from cordee.worker.messages import Run

# 64 and more query rows take ggml's tiled attention where it is not switched off; 66 tokens cover that, a
# chunk below it, and single rows after it. Three sequences are enough to compare one row with several.
TOKENS = 66
CHUNK = 58
COMPANIONS = 3

# Sends rows (runs and their token ids); gives the digest of each output, by sequence.
Measure = Callable[[Sequence[Run], Sequence[int]], Awaitable[dict[int, str]]]


def key(stages: Sequence[StageDescription], config: StageConfig) -> str:
    """What batch invariance depends on besides the model: builds, devices, arithmetic."""
    builds = sorted({f"{stage.build} on {'+'.join(stage.devices)}" for stage in stages})
    arithmetic = "exact" if config.batch_invariant else "fast"
    batched = "batched" if config.sequences > 1 else "alone"
    return f"batch-invariant: {arithmetic}, {batched}, {'; '.join(builds)}"


async def measure(send: Measure, n_vocab: int, config: StageConfig) -> bool | None:
    """Whether 66 tokens end in the same logits as one prefill, in a chunk and single rows, and in a batch.

    None where the context is too small to measure that. Raises what `send` raises.
    """
    if config.context <= TOKENS or config.batch_rows < TOKENS:
        return None
    tokens = [(7919 * index + 11) % n_vocab for index in range(TOKENS)]  # any varied ids will do
    whole = (await send([Run(0, 0, TOKENS, True)], tokens))[0]
    digests = await _stepwise(send, tokens)
    if config.sequences > COMPANIONS:
        digests += await _batched(send, tokens)
    return all(digest == whole for digest in digests)


async def _stepwise(send: Measure, tokens: list[int]) -> list[str]:
    """A chunk, then row by row; the digest of the last row."""
    await send([Run(0, 0, CHUNK, True)], tokens[:CHUNK])
    last: dict[int, str] = {}
    for position in range(CHUNK, TOKENS):
        last = await send([Run(0, position, 1, True)], [tokens[position]])
    return [last[0]]


async def _batched(send: Measure, tokens: list[int]) -> list[str]:
    """The same tokens in several sequences, whose last rows share one batch; the digests of those."""
    sequences = range(COMPANIONS)
    before = TOKENS - 1
    for sequence in sequences:
        await send([Run(sequence, 0, before, True)], tokens[:-1])
    together = [Run(sequence, before, 1, True) for sequence in sequences]
    digests = await send(together, [tokens[-1]] * COMPANIONS)
    return list(digests.values())
