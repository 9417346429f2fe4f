"""Models whose state cannot be shortened answer turn after turn, and no worker is lost over it."""

import asyncio
from pathlib import Path

import psutil
import pytest

from cluster_processes import Cluster, until
from cordee.generation.request import Request, TextChunk
from cordee.models.store import Store
from cordee.serving.local_service import LocalService, ServiceConfig
from serving import COMPLETIONS, running
from streams import SECONDS, Model, request
from tiny_recurrent import make_recurrent

ARCHITECTURES = ("mamba", "jamba")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    store = Store(folder / "store")
    return Model(store, store.add_file(make_recurrent(request.param, folder / "tiny.gguf"), "tiny"))


async def answer(service: LocalService, asked: Request, most: int | None = None) -> tuple[list[int], int]:
    """The tokens of an answer, of which a client may hear only the first ones; and the cached ones."""
    tokens: list[int] = []
    chunks: list[TextChunk] = []
    async with asyncio.timeout(SECONDS):
        stream = service.generate(asked)
        async for chunk in stream:
            chunks.append(chunk)
            tokens += [choice.token for choice in chunk.choices]
            if most is not None and len(tokens) >= most:
                await stream.aclose()
                break
    return tokens, chunks[-1].cached_tokens


def conversation(model: Model, *, fresh: bool) -> list[tuple[list[int], int]]:
    """Four turns, on one service or on a new one each; what it has loaded is never lost."""

    async def run() -> list[tuple[list[int], int]]:
        found: list[tuple[list[int], int]] = []
        first = list(request("", 40).prompt)
        async with model.serve(sequences=1) as service:
            found.append(await answer(service, request("1", first, 8)))
            longer = [*first, *found[0][0], *range(100, 110)]
            turns = {
                "it goes on": longer,
                "the first one again": first,
                "another after the same beginning": [*first[:30], *range(200, 220)],
            }
            for name, prompt in turns.items():
                if fresh:
                    async with model.serve(sequences=1) as other:
                        found.append(await answer(other, request(name, prompt, 8)))
                else:
                    found.append(await answer(service, request(name, prompt, 8)))
            assert [each["restarts"] for each in service.status()["stages"]] == [0]
        return found

    return asyncio.run(run())


def test_turns_are_answered_as_if_each_were_the_first(model: Model) -> None:
    turns, alone = conversation(model, fresh=False), conversation(model, fresh=True)
    assert [tokens for tokens, _ in turns] == [tokens for tokens, _ in alone]
    # 40 tokens of the prompt and 7 of the answer, whose last one was never computed; then nothing.
    assert [cached for _, cached in turns] == [0, 47, 0, 0]


def test_a_turn_after_one_that_was_broken_off(model: Model) -> None:
    """What the worker computes until it is halted is part of the state, too."""

    async def run() -> None:
        async with model.serve(sequences=1) as service:
            prompt = list(request("", 20).prompt)
            heard, _ = await answer(service, request("1", prompt, 200), most=5)
            again, _ = await answer(service, request("2", [*prompt, *heard], 8))
            async with model.serve(sequences=1) as other:
                assert again == (await answer(other, request("2", [*prompt, *heard], 8)))[0]
            assert [each["restarts"] for each in service.status()["stages"]] == [0]

    asyncio.run(run())


def test_the_api_says_truly_what_was_cached(tmp_path: Path) -> None:
    path = make_recurrent("mamba", tmp_path / "tiny.gguf")
    with running(path, tmp_path, config=ServiceConfig(context=256)) as server:
        pids = [stage["pid"] for stage in server.status()["stages"]]
        for prompt in ("a beginning that both share", "a beginning that both share, and go on"):
            body = {"model": "starter", "prompt": prompt, "max_tokens": 4, "temperature": 0}
            reply = server.request("POST", COMPLETIONS, body)
            assert reply.status == 200, reply.body
            assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert [stage["pid"] for stage in server.status()["stages"]] == pids


@pytest.mark.slow
def test_a_cluster_answers_every_turn_with_the_same_worker(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, make_recurrent("jamba", tmp_path / "tiny.gguf"), "--scouting", "off")
    try:
        node = cluster.add("a")
        node.do("deploy", "starter", "--context", 256, "--sequences", 1)
        until(lambda: "serving" in [each["state"] for each in node.model("starter").get("placements", [])])
        workers = psutil.Process(node.process.pid).children()
        with node.client() as client:
            for prompt in ("once upon a time", "once upon a mountain", "once upon a time"):
                done = client.completions.create(model="starter", prompt=prompt, max_tokens=6, temperature=0)
                assert done.usage.completion_tokens == 6
                assert done.usage.prompt_tokens_details.cached_tokens == 0
        assert psutil.Process(node.process.pid).children() == workers, node.said
    finally:
        cluster.close()
