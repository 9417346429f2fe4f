"""Services on small models for tests: start one, ask it, break it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from cordee.generation.request import Request, SamplingParams
from cordee.models.store import Store, StoredModel
from cordee.serving.interface import Generator
from cordee.serving.local_service import LocalService, ServiceConfig
from tiny import make_tiny

SECONDS = 90.0  # nothing here takes nearly as long, however busy the machine is
GREEDY = SamplingParams(temperature=0.0, top_logprobs=0)


class Answer(NamedTuple):
    """What a client got: the tokens and their log-probabilities where asked for, the text, how it ended."""

    tokens: tuple[tuple[int, float | None], ...]
    text: str
    finish_reason: str


class Model(NamedTuple):
    """A model in a store of its own."""

    store: Store
    stored: StoredModel

    @contextlib.asynccontextmanager
    async def serve(
        self, stages: int = 1, report: Callable[[str], None] = lambda _: None, **config: Any
    ) -> AsyncGenerator[LocalService]:
        """A service of this model, closed afterwards."""
        defaults: dict[str, Any] = {"context": 256, "threads": 1}
        settings = ServiceConfig(**(defaults | config))
        service = await LocalService.start(
            self.stored, self.store, stages=stages, config=settings, report=report
        )
        try:
            yield service
        finally:
            await service.close()


def tiny_model(folder: Path, seed: int = 0) -> Model:
    """A model of a few hundred kB that writes gibberish; it is batch-invariant, and seldom ends an answer."""
    path = make_tiny(
        "llama", folder / "tiny.gguf", seed=seed, quantization=GGMLQuantizationType.Q8_0, tokenizer="bytes"
    )
    store = Store(folder / "store")
    return Model(store, store.add_file(path, "tiny"))


def request(
    name: str,
    prompt: Sequence[int] | int,
    max_tokens: int = 32,
    sampling: SamplingParams = GREEDY,
    **rest: Any,
) -> Request:
    """A request; a number as the prompt gives that many varied tokens of the tiny model's plain text."""
    if isinstance(prompt, int):
        prompt = [3 + (prompt * 31 + 7 * index) % 250 for index in range(prompt)]
    return Request(id=name, prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, **rest)


async def ask(service: Generator, asked: Request, on_token: Callable[[int], None] = lambda _: None) -> Answer:
    """The whole answer; `on_token` is called with how many tokens have come."""
    tokens: list[tuple[int, float | None]] = []
    text = ""
    async with asyncio.timeout(SECONDS):
        async for chunk in service.generate(asked):
            text += chunk.text
            tokens += [(choice.token, choice.logprob) for choice in chunk.choices]
            if chunk.finish_reason is not None:
                return Answer(tuple(tokens), text, chunk.finish_reason)
            on_token(chunk.completion_tokens)
    raise AssertionError("the stream ended without a reason")


async def ask_all(service: Generator, requests: Sequence[Request]) -> list[Answer]:
    """All answers, asked for at once."""
    return list(await asyncio.gather(*(ask(service, each) for each in requests)))


def kill(service: LocalService, stage: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a stage's worker a signal; False if it has no worker just now."""
    pid = service.status()["stages"][stage]["pid"]
    if pid is None:
        return False
    os.kill(pid, number)
    return True


async def until(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SECONDS):
        while not true():
            await asyncio.sleep(0.002)


def kill_at(
    service: LocalService, token: int, stage: int, killed: set[int] | None = None
) -> Callable[[int], None]:
    """For `ask`: when `token` tokens have come, kill the worker of a stage, or the next stage's if that one
    is among the `killed` processes already."""
    killed = set() if killed is None else killed
    done = False

    def on_token(count: int) -> None:
        nonlocal done
        pids = [entry["pid"] for entry in service.status()["stages"]]
        alive = [pid for pid in pids[stage:] + pids[:stage] if pid not in {None, *killed}]
        if count >= token and alive and not done:
            os.kill(alive[0], signal.SIGKILL)
            killed.add(alive[0])
            done = True

    return on_token
