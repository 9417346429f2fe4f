"""Which models clients may ask a node for: services come and go with what is offered or deployed."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path

import pytest

from clusters import shape_of
from cordee.agent import services as services_module
from cordee.agent.services import Services
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, ModelNotFound, StageFailed
from cordee.generation.request import Request
from cordee.serving.cluster_service import ClusterGateway
from model_files import Original
from streams import Model, tiny_model, until

SHAPE, OTHER = shape_of("m"), shape_of("other")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


class FakeLocalModels:
    """Has the vocabulary of every model, save those that are `missing`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths: dict[str, Path] = {}  # of some models others
        self.missing: set[str] = set()
        self.asked: list[str] = []

    async def vocabulary(self, digest: str, name: str) -> Vocabulary:
        self.asked.append(digest)
        if digest in self.missing:
            raise ModelNotFound("its chunks have not come yet")
        return await asyncio.to_thread(Vocabulary, self.paths.get(digest, self.path), name)


class World:
    """The services of a node, and what they ask of it."""

    def __init__(self, model: Model) -> None:
        self.local_models = FakeLocalModels(model.stored.path)
        self.tasks: set[asyncio.Task[None]] = set()
        self.changes = 0
        self.wanted: list[str] = []
        gateway = ClusterGateway(lambda node, data: None)
        self.services = Services(self.local_models, gateway, self._keep, self._changed, self.wanted.append)

    def _keep(self, coroutine: Coroutine[None, None, None]) -> None:
        self.tasks.add(asyncio.get_running_loop().create_task(coroutine))

    def _changed(self) -> None:
        self.changes += 1


def test_a_service_comes_changes_and_goes_with_what_is_offered_or_deployed(model: Model) -> None:
    async def play() -> None:
        world = World(model)
        services = world.services
        for _ in range(2):  # the second while it opens
            services.follow({"a": (SHAPE, 64, ())}, ())
        await until(lambda: "a" in services)
        assert (world.local_models.asked, world.changes) == (["m"], 1)
        first = services["a"]
        assert (first.context, first.health, services.of_digest("m")) == (64, "idle", first)
        services.follow({"a": (SHAPE, 64, ())}, ("a",))
        assert (services["a"], first.health) == (first, "recovering")

        services.follow({"a": (SHAPE, 32, ())}, ("a",))
        assert not services
        await until(lambda: "a" in services)
        assert services["a"].context == 32
        services.follow({"a": (OTHER, 32, ())}, ())
        await until(lambda: "a" in services)
        assert services["a"].model.digest == "other"

        services.follow({}, ())
        assert (list(services), len(services), services.of_digest("other")) == ([], 0, None)
        await asyncio.gather(*world.tasks)

    asyncio.run(play())


def test_a_model_whose_vocabulary_is_missing_is_tried_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services_module, "RETRY_SECONDS", 0.0)

    async def play() -> None:
        world = World(model)
        world.local_models.missing.add("m")
        models = {"a": (SHAPE, 64, ()), "b": (OTHER, 64, ())}
        world.services.follow(models, ())
        await asyncio.gather(*world.tasks)
        assert list(world.services) == ["b"]
        world.local_models.missing.clear()
        world.services.follow(models, ())
        await until(lambda: "a" in world.services)
        assert world.local_models.asked == ["m", "other", "m"]

    asyncio.run(play())


def test_a_model_whose_vocabulary_ends_libllama_is_refused_once_and_hides_no_other(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = Original(model.stored.path)

    async def play() -> None:
        world = World(model)
        world.local_models.paths["m"] = original.write(tmp_path / "bad.gguf", original.without_bytes())
        models = {"bad": (SHAPE, 64, ()), "good": (OTHER, 64, ())}
        for _ in range(3):
            world.services.follow(models, ())
            await asyncio.gather(*world.tasks)
        assert list(world.services) == ["good"]
        assert sorted(world.local_models.asked) == ["m", "other"]
        refusal = world.services.refusal("bad")
        assert isinstance(refusal, BadModelFile) and refusal.message.startswith("bad: libllama cannot use")
        assert world.services.refusal("good") is None
        assert [record.message for record in caplog.records] == [
            f"bad is not offered here: {refusal.message}"
        ]
        world.services.follow({}, ())
        assert world.services.refusal("bad") is None
        await asyncio.gather(*world.tasks)

    asyncio.run(play())


def test_a_request_says_which_model_is_wanted(model: Model) -> None:
    async def play() -> None:
        world = World(model)
        world.services.follow({"a": (SHAPE, 64, ())}, ())
        await until(lambda: "a" in world.services)
        request = Request(id="s", prompt=(1, 2, 3), max_tokens=1)
        answering = asyncio.ensure_future(anext(world.services["a"].generate(request)))
        await until(lambda: world.wanted == ["a"])
        await world.services.close()
        with pytest.raises(StageFailed, match="no longer answered"):
            await answering

    asyncio.run(play())


def test_a_request_whose_model_is_deployed_anew_with_another_context_is_told_to_ask_again(
    model: Model,
) -> None:
    """As by the request itself, where memory is too short for the usual context."""

    async def play() -> None:
        world = World(model)
        world.services.follow({"a": (SHAPE, 64, ())}, ())
        await until(lambda: "a" in world.services)
        request = Request(id="s", prompt=(1, 2, 3), max_tokens=1)
        answering = asyncio.ensure_future(anext(world.services["a"].generate(request)))
        await until(lambda: world.wanted == ["a"])
        world.services.follow({"a": (SHAPE, 32, ())}, ("a",))
        with pytest.raises(StageFailed, match="a is deployed anew, with 32 tokens of context: ask again"):
            await answering
        await until(lambda: "a" in world.services)
        await world.services.close()
        await asyncio.gather(*world.tasks)

    asyncio.run(play())
