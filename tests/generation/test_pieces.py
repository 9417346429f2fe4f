"""Long prompts go in pieces that overlap over the stages; in virtual time, with stages that take a second a row."""

import heapq

import pytest

from cordee.generation.batches import Limits
from cordee.generation.request import Choice, Request
from cordee.generation.scheduler import Scheduler

PIECE_ROWS = 64


def seconds(prompts: list[int], stages: int, limits: Limits) -> list[float]:
    """When each prompt's first token comes: stages take one micro-batch at a time, in order."""
    scheduler = Scheduler(limits, ())
    for number, length in enumerate(prompts):
        prompt = tuple(number * 10_000 + place for place in range(length))
        scheduler.submit(Request(id=f"p{number}", prompt=prompt, max_tokens=1))
    free, now = [0.0] * stages, 0.0
    results: list[tuple[float, int, dict[int, Choice]]] = []
    came: dict[str, float] = {}
    while len(came) < len(prompts):
        while (batch := scheduler.next_batch()) is not None:
            rows, moment = sum(len(segment.tokens) for segment in batch.segments), now
            for stage in range(stages):
                moment = free[stage] = max(moment, free[stage]) + rows
            choices = {segment.sequence: Choice(1) for segment in batch.segments if segment.sample}
            heapq.heappush(results, (moment, batch.id, choices))
        now, number, choices = heapq.heappop(results)
        came |= {event.stream: now for event in scheduler.complete(number, choices, {})}
    return [came[f"p{number}"] for number in range(len(prompts))]


def limits_of(stages: int, piece_rows: int = PIECE_ROWS) -> Limits:
    return Limits(4, 8192, 512, 9, in_flight=stages, piece_rows=piece_rows)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [4096, 700, 64])
def test_a_prompt_overlaps_over_the_stages(stages: int, length: int) -> None:
    [took] = seconds([length], stages, limits_of(stages))
    pieces = -(-length // PIECE_ROWS)
    assert took <= (pieces + stages - 1) * PIECE_ROWS
    if length == 4096:
        assert took == (pieces + stages - 1) / (stages * pieces) * (stages * length)


def test_whole_micro_batches_hardly_overlap() -> None:
    """Why there are pieces: 700 tokens in micro-batches of 512 rows."""
    [took] = seconds([700], 4, limits_of(4, piece_rows=0))
    assert took == 4 * 512 + 188
    assert seconds([700], 4, limits_of(4))[0] < took / 2


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    long, short = seconds([4096, 30], 4, limits_of(4))
    assert short <= 4 * PIECE_ROWS and long <= (4096 + 30) + 4 * PIECE_ROWS
