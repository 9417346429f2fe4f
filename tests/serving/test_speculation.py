"""Guesses on real stages: answers have the tokens that they have without, and some of them come sooner."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.serving.local_service import ServiceConfig
from cordee.speculation.costs import Costs
from serving import CHAT, running
from streams import GREEDY, Answer, Model, ask, ask_all, kill_at, request, tiny_model
from tiny_recurrent import make_recurrent

TEXT = [5, 9, 30, 31, 77, 4] * 5
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=3, top_logprobs=2)
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "penalties": msgspec.structs.replace(
        SEEDED, repeat_penalty=1.3, frequency_penalty=0.5, dry_multiplier=0.8, seed=4
    ),
    "a grammar": msgspec.structs.replace(SEEDED, grammar=Grammar("regex", "(abcd|abce|[xyz]{3}){1,30}")),
    "no early end": msgspec.structs.replace(SEEDED, min_tokens=30, ends=(2,), seed=5),
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess whether or not it pays: how long a row takes here depends on what else runs."""

    def depth(costs: Costs, rows: int, chances: Sequence[Sequence[float]]) -> list[int]:
        return [min(len(own), 4) for own in chances]

    monkeypatch.setattr(Costs, "depth", depth)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def questions() -> list[Request]:
    return [
        request(name, [*TEXT, 10 + index], 40, each) for index, (name, each) in enumerate(SAMPLINGS.items())
    ]


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> list[Answer]:
    """The answers without a guess, one after the other."""

    async def run() -> list[Answer]:
        async with model.serve(speculates=False) as service:
            answers = [await ask(service, each) for each in questions()]
            assert service.status()["speculation"] == {"on": False, "offered": 0, "accepted": 0}
            return answers

    return asyncio.run(run())


def with_predictions(answers: Sequence[Answer], wrong_every: int) -> list[Request]:
    """The questions, with their answers as predictions, of which each so-and-so-many-th token is wrong."""
    asked: list[Request] = []
    for each, answer in zip(questions(), answers, strict=True):
        tokens = [
            (token + 1) % 250 if index % wrong_every == wrong_every - 1 else token
            for index, (token, _) in enumerate(answer.tokens)
        ]
        asked.append(msgspec.structs.replace(each, prediction=tuple(tokens)))
    return asked


@pytest.mark.parametrize(("stages", "in_flight"), [(1, 1), (3, 3)])
def test_answers_are_the_same_with_right_wrong_and_mixed_guesses(
    model: Model, undisturbed: list[Answer], stages: int, in_flight: int
) -> None:
    async def run() -> None:
        async with model.serve(stages, sequences=5, in_flight=in_flight) as service:
            for wrong_every in (1000, 7, 1):
                asked = with_predictions(undisturbed, wrong_every)
                for each, expected in zip(asked, undisturbed, strict=True):
                    assert await ask(service, each) == expected, f"{each.id}, wrong every {wrong_every}"
                if wrong_every == 1000:
                    said = service.status()["speculation"]
                    assert said["on"]
                    assert 60 < said["accepted"] <= said["offered"]
            assert await ask_all(service, with_predictions(undisturbed, 7)) == undisturbed

    asyncio.run(run())


def test_answers_are_the_same_after_a_stage_was_lost_among_guesses(
    model: Model, undisturbed: list[Answer]
) -> None:
    async def run() -> None:
        async with model.serve(3, in_flight=3) as service:
            killed: set[int] = set()
            for stage, (each, expected) in enumerate(
                zip(with_predictions(undisturbed, 9)[:3], undisturbed, strict=False)
            ):
                assert await ask(service, each, kill_at(service, 8, stage, killed)) == expected

    asyncio.run(run())


def test_what_a_grammar_forces_comes_sooner(model: Model) -> None:
    grammar = Grammar("regex", "([ab]cdefghijkl[mn]opqrstuvw[xy]z[0-9]){7}")
    asked = request("a", TEXT, 180, msgspec.structs.replace(SEEDED, grammar=grammar))

    async def run(**settings: bool) -> tuple[Answer, int]:
        async with model.serve(**settings) as service:
            answer = await ask(service, asked)
            return answer, service.status()["speculation"]["accepted"]

    (expected, _), (answer, accepted) = asyncio.run(run(speculates=False)), asyncio.run(run())
    assert answer == expected
    assert accepted > 20


def test_a_model_whose_state_cannot_be_shortened_guesses_nothing(tmp_path: Path) -> None:
    store_model = tiny_model(tmp_path)
    recurrent = store_model.store.add_file(make_recurrent("mamba", tmp_path / "mamba.gguf"), "mamba")

    async def run() -> None:
        async with Model(store_model.store, recurrent).serve() as service:
            answer = await ask(service, request("a", TEXT, 30))
            again = request("b", TEXT, 30, prediction=tuple(token for token, _ in answer.tokens))
            assert await ask(service, again) == answer
            assert service.status()["speculation"] == {"on": False, "offered": 0, "accepted": 0}

    asyncio.run(run())


def test_a_client_that_predicts_the_answer_is_told_how_much_of_it_was_right(
    starter_path: Path, tmp_path: Path
) -> None:
    with running(starter_path, tmp_path, config=ServiceConfig(context=256)) as server:
        asked = {
            "model": server.service.name,
            "messages": [{"role": "user", "content": "Count from one to twenty in words."}],
            "temperature": 0,
            "max_tokens": 24,
        }
        first = server.request("POST", CHAT, asked).json
        text = first["choices"][0]["message"]["content"]
        for content in (text, [{"type": "text", "text": text}]):
            prediction = {"type": "content", "content": content}
            reply = server.request("POST", CHAT, asked | {"prediction": prediction}).json
            assert reply["choices"] == first["choices"]
            details = reply["usage"]["completion_tokens_details"]
            assert details["accepted_prediction_tokens"] > 8
            assert details["rejected_prediction_tokens"] < 8
