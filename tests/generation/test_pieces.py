"""All stages compute: pieces of prompts and groups of streams overlap. In virtual time, a second a row."""

from random import Random

import pytest

from cordee.generation.batches import Limits
from virtual_pipeline import VirtualPipeline

PIECE_ROWS = 64


def limits_of(stages: int, piece_rows: int = PIECE_ROWS, sequences: int = 4) -> Limits:
    in_flight = 1 if stages == 1 else stages + 1
    return Limits(sequences, 8192, 512, 99, in_flight=in_flight, piece_rows=piece_rows)


def first_tokens(prompts: list[int], stages: int, limits: Limits) -> list[float]:
    """When each prompt's first token comes; a row takes one second in each stage."""
    pipeline = VirtualPipeline(limits, stages, call=0, hop=0)
    for number, length in enumerate(prompts):
        pipeline.submit(f"p{number}", tuple(number * 10_000 + place for place in range(length)), 1)
    while pipeline.ended < len(prompts):
        pipeline.step()
    return [pipeline.first[f"p{number}"] * stages for number in range(len(prompts))]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [4096, 700, 64])
def test_a_prompt_overlaps_over_the_stages(stages: int, length: int) -> None:
    [took] = first_tokens([length], stages, limits_of(stages))
    pieces = -(-length // PIECE_ROWS)
    assert took <= (pieces + stages - 1) * PIECE_ROWS + 0.001
    if length == 4096:
        serial = stages * length
        assert took / serial == pytest.approx((pieces + stages - 1) / (stages * pieces))


def test_whole_micro_batches_hardly_overlap() -> None:
    """Why there are pieces: 700 tokens in micro-batches of 512 rows."""
    [took] = first_tokens([700], 4, limits_of(4, piece_rows=0))
    assert took == pytest.approx(4 * 512 + 188)
    assert first_tokens([700], 4, limits_of(4))[0] < took / 2


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    long, short = first_tokens([4096, 30], 4, limits_of(4))
    assert short <= 4 * PIECE_ROWS and long <= (4096 + 30) + 5 * PIECE_ROWS


def tokens_a_second(streams: int, stages: int) -> tuple[float, float]:
    """Of so many streams that ask again and again, and how many rows of decode micro-batches go in a call."""
    random = Random(streams)
    pipeline = VirtualPipeline(limits_of(stages, sequences=32), stages)
    total, asked = 3 * streams, 0
    while pipeline.ended < total:
        while asked < min(
            total, pipeline.ended + streams, 1 + pipeline.now // 6 if asked < streams else total
        ):
            prompt = tuple(random.randrange(1000) for _ in range(random.randint(30, 90)))
            pipeline.submit(f"s{asked}", prompt, random.randint(32, 96))
            asked += 1
        pipeline.step()
    rows, calls = (sum(column) for column in zip(*pipeline.calls, strict=True))
    return pipeline.tokens / pipeline.now, rows / calls


def test_more_streams_give_more_tokens_though_they_come_and_go() -> None:
    """Streams of a group keep neighbouring slots; else each row soon needs a call of its own."""
    few, _ = tokens_a_second(8, 4)
    many, rows_a_call = tokens_a_second(32, 4)
    assert many > 1.4 * few
    assert rows_a_call > 3
