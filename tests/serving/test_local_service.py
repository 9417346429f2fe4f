"""The local service: answers do not depend on other streams, cuts or load; nothing is left behind."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, BadRequest, ContextExceeded, Overloaded, StageFailed
from cordee.generation.request import Grammar, Request, SamplingParams
from cordee.models.store import Store
from cordee.serving.local_service import LocalService, ServiceConfig
from streams import GREEDY, Answer, Model, ask, ask_all, kill, request, tiny_model, until

QUESTIONS = [
    "Why do climbers rope together?",
    "Hi",
    "Name three rivers of Europe and the seas into which they flow.",
    "Write a line about snow.",
    "What is 12 times 12? Think step by step, then give the number.",
    "Once upon a time there was a mountain hut whose keeper",
    "List the planets from the sun outwards, one on each line, with a word about each of them.",
    "def fibonacci(n):",
]
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, top_logprobs=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def starter(starter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    store = Store(tmp_path_factory.mktemp("starter"))
    return Model(store, store.add_file(starter_path, "starter"))


def questions(starter: Model, sampling: SamplingParams) -> list[Request]:
    """Prompts and answers of different lengths."""
    vocabulary = Vocabulary(starter.stored.path)
    asked: list[Request] = []
    for index, text in enumerate(QUESTIONS):
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        asked.append(
            request(
                f"{sampling.temperature}-{index}",
                vocabulary.tokenize(chat, add_bos=True),
                4 + 2 * index,
                msgspec.structs.replace(sampling, seed=index),
            )
        )
    return asked


@pytest.fixture(scope="module")
def alone(starter: Model) -> dict[str, Answer]:
    """Each question's answer when nothing else runs, on the uncut model: greedy, then seeded."""

    async def run() -> dict[str, Answer]:
        async with starter.serve(context=512, threads=None) as service:
            assert service.batch_invariant
            asked = [*questions(starter, GREEDY), *questions(starter, SEEDED)]
            return {each.id: await ask(service, each) for each in asked}

    return asyncio.run(run())


@pytest.mark.parametrize(
    "stages", [pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.slow)]
)
def test_eight_streams_at_once_each_get_what_they_get_alone(
    starter: Model, alone: dict[str, Answer], stages: int
) -> None:
    async def run() -> None:
        async with starter.serve(stages, context=512, threads=None) as service:
            for sampling in (GREEDY, SEEDED):
                asked = questions(starter, sampling)
                for each, answer in zip(asked, await ask_all(service, asked), strict=True):
                    assert answer == alone[each.id], f"{each.id} at {stages} stages"

    asyncio.run(run())
    assert len({answer.text for answer in alone.values()}) >= len(QUESTIONS)


@pytest.mark.parametrize(("stages", "in_flight"), [(1, 1), (3, 1), (3, 3)])
def test_streams_that_come_and_go_do_not_change_each_other(model: Model, stages: int, in_flight: int) -> None:
    asked = [
        request(f"s{index}", 3 + 13 * index % 97, 1 + 17 * index % 60, GREEDY if index % 2 else SEEDED)
        for index in range(40)
    ]

    async def run() -> None:
        async with model.serve(stages, sequences=5, in_flight=in_flight) as service:
            solo = [await ask(service, each) for each in asked]
            tasks: list[asyncio.Task[Answer]] = []
            for each in asked:
                tasks.append(asyncio.create_task(ask(service, each)))
                await asyncio.sleep(0.01)
            assert await asyncio.gather(*tasks) == solo
            assert len({answer.tokens for answer in solo}) > 30

    asyncio.run(run())


def test_a_follow_up_finds_its_beginning_in_the_cache_and_gets_the_same_tokens(model: Model) -> None:
    async def run() -> None:
        async with model.serve(3) as service:
            first = request("first", 100, 8)
            fresh = await ask(service, first)
            chunks = [chunk async for chunk in service.generate(request("again", 100, 8))]
            tokens = tuple((choice.token, choice.logprob) for chunk in chunks for choice in chunk.choices)
            assert tokens == fresh.tokens
            assert chunks[-1].cached_tokens == 99
            assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (100, len(fresh.tokens))

    asyncio.run(run())


@contextlib.contextmanager
def nothing_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Processes, threads, file descriptors and temporary files are the same before and after."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    me = psutil.Process()

    def counted() -> tuple[Any, ...]:
        gc.collect()
        workers = [child for child in me.children(recursive=True) if child.is_running()]
        return workers, me.num_fds(), threading.active_count(), sorted(folder.iterdir())

    before, *others = counted()
    yield
    after, *now = counted()
    assert now == others and set(after) <= set(before)  # of those before, one may have been about to end


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


def test_a_closed_service_leaves_nothing(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with model.serve(3) as service:
            streams = [asyncio.create_task(ask(service, request(f"s{n}", 20 + n, 60))) for n in range(12)]
            await asyncio.sleep(0.05)
            kill(service, 1)
            await ask(service, request("one", 9))
            left_open = service.generate(request("left", 30, 200))
            await anext(left_open)
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(end, StageFailed | Answer) for end in ends)
        await service.close()
        with pytest.raises(StageFailed, match="closed"):
            await ask(service, request("late", 9))

    asyncio.run(run())  # what the first run loads for good is not left behind
    with nothing_left(folder, monkeypatch):
        asyncio.run(run())


def test_a_start_that_fails_halfway_leaves_nothing(
    model: Model, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = tiny_model(tmp_path, seed=3)
    last = fresh.store.slice_for(fresh.stored, 4, 6).path

    def cuts(*_: object) -> list[int]:
        return [0, 2, 4, 6]

    def is_slice(*_: object) -> bool:
        return True

    monkeypatch.setattr("cordee.serving.local_service.even_cuts", cuts)
    data = last.read_bytes()

    async def run() -> None:
        async with fresh.serve(3):
            pass
        last.unlink()
        last.write_bytes(data[: len(data) // 2])
        monkeypatch.setattr("cordee.models.store._is_slice", is_slice)  # it broke after the check
        with pytest.raises(BadModelFile, match="layers 4 to 5 of tiny"):
            async with fresh.serve(3):
                pass
        last.write_bytes(data)

    asyncio.run(run())
    with nothing_left(folder, monkeypatch):
        asyncio.run(run())


@pytest.mark.parametrize("moment", ["starting", "replacing"])
def test_closing_in_the_middle_leaves_nothing(
    model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async def starting() -> None:
        for steps in (1, 20, 100, 200):
            task = asyncio.create_task(LocalService.start(model.stored, model.store, stages=3))
            for _ in range(steps):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def replacing() -> None:
        async with model.serve(3) as service:
            stream = asyncio.create_task(ask(service, request("a", 10, 100)))
            await asyncio.sleep(0.02)
            kill(service, 2)
            await until(lambda: not service.ready)
        with pytest.raises(StageFailed):
            await stream

    run = {"starting": starting, "replacing": replacing}[moment]
    asyncio.run(run())
    with nothing_left(folder, monkeypatch):
        asyncio.run(run())


def test_a_cancelled_stream_frees_its_slot_at_once(model: Model) -> None:
    async def run() -> None:
        async with model.serve(sequences=1) as service:
            undisturbed = await ask(service, request("a", 12))
            long = service.generate(request("long", 10, 200))
            await anext(long)
            queued = service.generate(request("queued", 11, 200))
            waits = asyncio.ensure_future(anext(queued))
            await until(lambda: service.status()["queue"] == 1)
            waits.cancel()  # a client that leaves while it waits ...
            with pytest.raises(asyncio.CancelledError):
                await waits
            assert service.status()["queue"] == 0
            assert service.status()["active"] == 1
            await long.aclose()  # ... and one that leaves in the middle
            assert service.status()["active"] == 0
            assert await ask(service, request("a", 12)) == undisturbed

    asyncio.run(run())


def test_a_client_that_never_reads_stops_no_other(model: Model) -> None:
    async def run() -> None:
        async with model.serve(3, sequences=2) as service:
            lazy = service.generate(request("lazy", 10, 100))
            first = await anext(lazy)
            others = [request(f"o{n}", 20 + n) for n in range(6)]
            answers = await ask_all(service, others)
            assert [await ask(service, each) for each in others] == answers
            await until(lambda: service.status()["active"] == 0)  # what it asked for is computed, no more
            rest = [chunk async for chunk in lazy]
            text = first.text + "".join(chunk.text for chunk in rest)
            assert text == (await ask(service, request("lazy", 10, 100))).text

    asyncio.run(run())


def test_an_id_may_be_used_again_once_its_stream_has_ended(model: Model) -> None:
    async def run() -> None:
        async with model.serve() as service:
            undisturbed = await ask(service, request("same", 20))
            first = service.generate(request("same", 10, 1))
            await anext(first)  # all of it, but the generator is still open
            second = asyncio.create_task(ask(service, request("same", 20)))
            await until(lambda: service.status()["active"] == 1 or second.done())
            await first.aclose()
            assert await second == undisturbed

    asyncio.run(run())


@pytest.mark.slow
def test_refusals_name_the_fault_and_leave_nothing(model: Model) -> None:
    refused = [
        (request("a", 4096), ContextExceeded, "4096 tokens; the context holds 4096"),
        (request("a", ()), BadRequest, "empty"),
        (request("a", (5, 320)), BadRequest, "token ids"),
        (request("a", (5, -1)), BadRequest, "token ids"),
        (request("a", 5, stop=("",)), BadRequest, "stop"),
        (request("a", 5, sampling=SamplingParams(temperature=-1)), BadRequest, "temperature"),
        (request("a", 5, sampling=SamplingParams(grammar=Grammar("regex", "("))), BadRequest, "regular"),
    ]

    async def run() -> None:
        async with model.serve(sequences=1, queue=2, context=4096) as service:
            endless = SamplingParams(logit_bias=dict.fromkeys(service.vocabulary.end_of_generation, -100.0))
            running = service.generate(request("running", 5, 4000, endless))
            await anext(running)
            waiting = [asyncio.ensure_future(ask(service, request(f"w{n}", 5, 3))) for n in range(2)]
            await until(lambda: service.status()["queue"] == 2)
            with pytest.raises(Overloaded, match="2 requests"):
                await ask(service, request("a", 5))
            for asked, error, message in refused:
                with pytest.raises(error, match=message):
                    await ask(service, asked)
            assert (service.status()["queue"], service.status()["active"]) == (2, 1)
            with pytest.raises(BadRequest, match="already running"):
                await ask(service, request("running", 5))
            await running.aclose()
            for task in waiting:
                assert len((await task).tokens) <= 3
            fits = await ask(service, request("a", 4095, 10))
            assert (len(fits.tokens), fits.finish_reason) == (1, "length")

    asyncio.run(run())


def test_a_thousand_requests_at_once_are_answered_or_refused(model: Model) -> None:
    async def run() -> None:
        async with model.serve(context=64) as service:
            asked = [request(f"s{n}", 1 + n % 50, 3) for n in range(1000)]
            ends = await asyncio.gather(*(ask(service, each) for each in asked), return_exceptions=True)
            refused = [end for end in ends if isinstance(end, Overloaded)]
            answered = [end for end in ends if not isinstance(end, BaseException)]
            assert len(answered) + len(refused) == 1000
            assert len(answered) >= 256
            assert (service.status()["queue"], service.status()["active"]) == (0, 0)
            by_prompt: dict[int, set[object]] = {}
            for each, end in zip(asked, ends, strict=True):
                if not isinstance(end, BaseException):
                    by_prompt.setdefault(len(each.prompt), set()).add(end.tokens)
            assert all(len(tokens) == 1 for tokens in by_prompt.values())

    asyncio.run(run())


def test_a_fault_at_one_stream_stops_no_other(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with model.serve() as service:
            asked = [request(f"s{n}", 10 + n, 20) for n in range(4)]
            good = await ask_all(service, asked)
            answer = service.generate(request("bad", 30, 20))
            others = asyncio.create_task(ask_all(service, asked))
            await anext(answer)

            def fail(*_: object) -> None:
                raise RuntimeError("a fault of ours")

            service._answers["bad"].add = fail
            with pytest.raises(StageFailed, match="turned into text"):
                async for _ in answer:
                    pass
            assert await others == good

    asyncio.run(run())
    assert "a fault of ours" in caplog.text


def test_the_status_shows_model_and_stages(model: Model) -> None:
    async def run() -> None:
        lines: list[str] = []
        async with model.serve(2, lines.append, sequences=3) as service:
            status = service.status()
            assert (status["model"], status["state"], status["context"]) == ("tiny", "ready", 256)
            layers = [stage["layers"] for stage in status["stages"]]
            assert layers[0][0] == 0
            assert layers[0][1] == layers[1][0]
            assert layers[1][1] == 6
            for stage in status["stages"]:
                assert psutil.Process(stage["pid"]).ppid() == psutil.Process().pid
                assert stage["rss_bytes"] > 1 << 20
            assert sum("loaded" in line for line in lines) == 2
        assert service.status()["state"] == "closed"
        assert not service.ready

    asyncio.run(run())


def test_the_context_is_the_models_own_where_memory_allows(model: Model) -> None:
    async def run() -> None:
        service = await LocalService.start(model.stored, model.store, config=ServiceConfig(sequences=16))
        try:
            # Of the model's 4096, so that 16 slots fit CELLS_DEFAULT; all of it where there is much memory.
            assert service.context in (2048, 4096)
        finally:
            await service.close()

    asyncio.run(run())
