"""A model of the cluster through one node: text, stop strings, errors, clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from random import Random
from typing import Any

import pytest

from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, Overloaded, StageFailed
from cordee.generation import streams
from cordee.generation.batches import Limits
from cordee.generation.host import Host
from cordee.generation.request import Request, SamplingParams
from cordee.generation.scheduler import Scheduler
from cordee.generation.streams import Ask, Piece, Said
from cordee.serving.cluster_service import ClusterGateway, ClusterService
from scheduler_world import NEVER, FakePipeline, next_token
from streams import SECONDS, Model, ask, tiny_model, until

LIMITS = Limits(sequences=2, context=200, batch_rows=16, queue=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


class Node:
    """A machine that hosts the model with fake stages, until it is stopped."""

    def __init__(self, name: str, gateway: ClusterGateway, n_vocab: int) -> None:
        self.name = name
        self.stages = FakePipeline(LIMITS)
        self.host = Host(Scheduler(LIMITS, {NEVER}), n_vocab, Random(1))
        self.host.ready = True
        self._gateway = gateway
        self.working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.host.tick(loop.time())
            while (batch := self.host.next_batch()) is not None:
                self.stages.send(batch)
            self.stages.halted.update(self.host.halts())
            if self.stages.under_way:
                batch, choices, failures, last = self.stages.answer(NEVER, lambda _: False)
                self.host.complete(batch.id, choices, failures, last=last)
            for _, said in self.host.drain():
                self._gateway.receive(self.name, said)
            await asyncio.sleep(0.002)


class Cluster:
    """A gateway, and nodes that it can reach."""

    def __init__(self, model: Model) -> None:
        self.gateway = ClusterGateway(self._send)
        self.service = ClusterService(
            model.stored, Vocabulary(model.stored.path), LIMITS.context, self.gateway
        )
        self.nodes: dict[str, Node] = {}

    def _send(self, node: str, data: bytes) -> None:
        if node in self.nodes:
            message = streams.decode(data)
            assert not isinstance(message, Said)
            self.nodes[node].host.receive("here", message)

    def start(self, name: str) -> Node:
        """Start a node, and route the model to it."""
        self.nodes[name] = Node(name, self.gateway, self.service.vocabulary.size)
        self.gateway.follow({self.service.key: name})
        return self.nodes[name]

    async def kill(self, name: str) -> None:
        """End a node without notice."""
        working = self.nodes.pop(name).working
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    def expected(self, asked: Request) -> str:
        """The text of the undisturbed answer."""
        tokens = list(asked.prompt)
        for _ in range(asked.max_tokens or 0):
            tokens.append(next_token(asked.sampling.seed, tokens))
        pieces = map(self.service.vocabulary.piece, tokens[len(asked.prompt) :])
        return b"".join(pieces).decode("utf-8", "replace")


@contextlib.asynccontextmanager
async def cluster(model: Model) -> AsyncGenerator[Cluster]:
    made = Cluster(model)
    try:
        async with asyncio.timeout(SECONDS):
            yield made
    finally:
        await made.gateway.close()
        await made.service.close()
        for name in list(made.nodes):
            await made.kill(name)


def request(name: str, max_tokens: int = 30, **rest: Any) -> Request:
    sampling = SamplingParams(seed=len(name), top_logprobs=0)
    return Request(id=name, prompt=(5, 6, 7), max_tokens=max_tokens, sampling=sampling, **rest)


def test_an_answer_goes_on_when_its_host_dies(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            made.start("first")
            assert made.service.ready
            asked = request("a", 150)
            halfway = asyncio.Event()
            answer = asyncio.create_task(
                ask(made.service, asked, lambda count: halfway.set() if count > 20 else None)
            )
            await halfway.wait()
            await made.kill("first")
            made.gateway.follow({})
            assert not made.service.ready
            made.start("second")
            got = await answer
            assert (got.text, got.finish_reason) == (made.expected(asked), "length")
            assert len(got.tokens) == 150
            assert made.service.status()["host"] == "second"

    asyncio.run(run())


def test_a_request_waits_for_its_host(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            answer = asyncio.create_task(ask(made.service, request("a")))
            await asyncio.sleep(0.1)
            made.start("late")
            assert (await answer).text == made.expected(request("a"))

    asyncio.run(run())


def test_a_stop_string_ends_the_text_and_the_work(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            host = made.start("first").host
            whole = made.expected(request("a", 190))
            stop = whole[20:24]
            got = await ask(made.service, request("a", 190, stop=(stop,)))
            assert (got.text, got.finish_reason) == (whole[: whole.index(stop)], "stop")
            await until(lambda: host.active == 0)

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_place(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            host = made.start("first").host
            chunks = made.service.generate(request("a", 190))
            await anext(chunks)
            assert made.service.status()["active"] == 1
            await chunks.aclose()
            assert made.service.status()["active"] == 0
            await until(lambda: host.active == 0)

    asyncio.run(run())


def test_refusals_reach_the_client(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            node = made.start("first")
            node.host.ready = False  # nothing is computed: two slots and a place in the queue fill up
            running = [asyncio.create_task(ask(made.service, request(name))) for name in "abc"]
            await until(lambda: node.host.waiting == 3)
            with pytest.raises(Overloaded):
                await ask(made.service, request("d"))
            with pytest.raises(BadRequest, match="already running"):
                await ask(made.service, request("a"))
            with pytest.raises(BadRequest, match="token ids"):
                await ask(made.service, Request(id="x", prompt=(1 << 20,)))
            with pytest.raises(BadRequest, match="temperature"):
                await ask(
                    made.service, Request(id="x", prompt=(5,), sampling=SamplingParams(temperature=9.0))
                )
            node.host.ready = True
            assert [(await answer).text for answer in running] == [made.expected(request(n)) for n in "abc"]

    asyncio.run(run())


def test_a_node_that_stops_ends_its_streams_with_a_reason_and_tells_the_hosts(model: Model) -> None:
    async def run() -> None:
        async with cluster(model) as made:
            host = made.start("first").host
            chunks = made.service.generate(request("a", 190))
            await anext(chunks)
            await made.gateway.close()
            with pytest.raises(StageFailed, match="being stopped"):
                while True:
                    await anext(chunks)
            with pytest.raises(StageFailed, match="being stopped"):
                await ask(made.service, request("b"))
            assert host.active == 0

    asyncio.run(run())


def test_no_other_node_than_the_host_has_a_say(model: Model) -> None:
    """Another member may guess all numbers: what it says of a stream is dropped, be it an end or tokens."""

    async def run() -> None:
        async with cluster(model) as made:
            asks: list[Ask] = []
            honest = made.gateway._send

            def overheard(node: str, data: bytes) -> None:
                message = streams.decode(data)
                if isinstance(message, Ask):
                    asks.append(message)
                    ended = Piece(message.number, 0, (5,), finish_reason="stop")
                    made.gateway.receive("second", Said(message.gateway, message.peer, 1, True, (ended,)))
                honest(node, data)

            made.gateway._send = overheard
            made.start("first")
            assert (await ask(made.service, request("a"))).text == made.expected(request("a"))
            assert asks

    asyncio.run(run())


def test_a_host_that_is_called_may_answer_within_the_call(model: Model) -> None:
    """Of the answers that come while messages are being sent, each gets to its client in order."""

    async def run() -> None:
        stages = FakePipeline(LIMITS)
        host = Host(Scheduler(LIMITS, {NEVER}), 320, Random(1))
        host.ready = True

        def call(_: str, data: bytes) -> None:
            message = streams.decode(data)
            assert not isinstance(message, Said)
            host.receive("here", message)
            work(3)

        def work(batches: int) -> None:
            for _ in range(batches):
                while (batch := host.next_batch()) is not None:
                    stages.send(batch)
                if stages.under_way:
                    batch, choices, failures, last = stages.answer(NEVER, lambda _: False)
                    host.complete(batch.id, choices, failures, last=last)
                for _, said in host.drain():
                    gateway.receive("here", said)

        gateway = ClusterGateway(call, by_call=True)
        service = ClusterService(model.stored, Vocabulary(model.stored.path), LIMITS.context, gateway)
        gateway.follow({service.key: "here"})
        asked = [request("a", 40), request("bb", 40)]
        answers = [asyncio.create_task(ask(service, each)) for each in asked]
        for _ in range(200):
            await asyncio.sleep(0)
            work(1)
        for each, answer in zip(asked, await asyncio.gather(*answers), strict=True):
            assert answer.text == Cluster(model).expected(each)
        left = service.generate(request("ccc", 100))
        assert (await anext(left)).text
        assert host.active == 1
        await left.aclose()
        assert host.active == 0  # it was told within the call
        await gateway.close()
        await service.close()

    asyncio.run(run())
