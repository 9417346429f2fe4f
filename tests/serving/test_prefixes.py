"""Prompts are read once: what any slot holds of a new one is copied, and the answer is as if it were not."""

import asyncio

import pytest

from cordee.generation.request import Request, SamplingParams
from cordee.serving.local_service import LocalService
from streams import GREEDY, Answer, Model, ask, ask_all, kill_at, request, tiny_model

SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, top_logprobs=0)
SYSTEM = [3 + (11 * index * index) % 200 for index in range(160)]  # a system prompt that all begin with


def question(number: int, max_tokens: int = 12) -> Request:
    own = [3 + (number * 31 + 7 * index) % 200 for index in range(5 + 3 * number)]
    return request(f"q{number}", SYSTEM + own, max_tokens, GREEDY if number % 2 else SEEDED)


async def cached(service: LocalService, asked: Request) -> int:
    """Tokens of the prompt that were not read anew."""
    chunks = [chunk async for chunk in service.generate(asked)]
    return chunks[-1].cached_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("model"))


def alone(model: Model, stages: int) -> list[Answer]:
    """Each answer of a service that has one slot, where each prompt replaces another one before."""

    async def run() -> list[Answer]:
        answers: list[Answer] = []
        async with model.serve(stages, sequences=1) as service:
            for number in range(4):
                await ask(service, request("other", 50 + number, 1))
                answers.append(await ask(service, question(number)))
        return answers

    return asyncio.run(run())


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_prompt_that_another_slot_holds_is_copied_and_answered_alike(model: Model, stages: int) -> None:
    expected = alone(model, stages)

    async def run() -> None:
        async with model.serve(stages, sequences=4, in_flight=stages) as service:
            assert await ask_all(service, [question(number) for number in range(4)]) == expected
            async with asyncio.TaskGroup() as group:  # they keep their slots meanwhile
                busy = [group.create_task(ask(service, question(number, 60))) for number in (0, 1)]
                await asyncio.sleep(0)
                later = await ask_all(service, [question(number) for number in (2, 3)])
            assert later == expected[2:]
            assert [each.result().tokens[:12] for each in busy] == [each.tokens for each in expected[:2]]

    asyncio.run(run())


def test_cached_tokens_tell_what_was_copied(model: Model) -> None:
    async def run() -> None:
        async with model.serve(3, sequences=4) as service:
            assert await cached(service, question(0)) == 0
            assert await cached(service, question(1)) == len(SYSTEM)
            found = await asyncio.gather(*(cached(service, question(number)) for number in (2, 3)))
            assert found == [len(SYSTEM)] * 2

    asyncio.run(run())


def test_of_prompts_that_come_together_the_first_is_read(model: Model) -> None:
    async def run() -> None:
        async with model.serve(2, sequences=4, in_flight=2) as service:
            found = await asyncio.gather(*(cached(service, question(number)) for number in range(4)))
            assert sorted(found) == [0, *[len(SYSTEM)] * 3]

    asyncio.run(run())


def test_a_stream_with_a_copied_beginning_survives_a_loss(model: Model) -> None:
    expected = alone(model, 2)[3]

    async def run() -> None:
        async with model.serve(2, sequences=4) as service:
            assert await cached(service, question(0)) == 0
            found = await ask(service, question(3), kill_at(service, 4, 1))
            assert found == expected
            assert service.status()["stages"][1]["pid"] is not None

    asyncio.run(run())
