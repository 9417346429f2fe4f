"""OpenAI's own Python client against a real service with the starter model: what its users rely on."""

import asyncio
import gc
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import psutil
import pytest
from pydantic import BaseModel

from cordee.api import schemas
from cordee.serving.local_service import ServiceConfig
from serving import Running, running

CONTEXT = 512
SEQUENCES, QUEUE = 8, 256
ROPE = [{"role": "user", "content": "Why do climbers rope together?"}]


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(context=CONTEXT, sequences=SEQUENCES, queue=QUEUE)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config, stages=2) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base, api_key="none", max_retries=0) as made:
        yield made


@asynccontextmanager
async def asynchronous(server: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.base, api_key="none", max_retries=0, timeout=600) as made:
        yield made


def text_of(stream: openai.Stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


# The client's surface


@pytest.mark.parametrize(
    ("resource", "shape"),
    [
        (openai.resources.chat.Completions, schemas.ChatRequest),
        (openai.resources.Completions, schemas.CompletionRequest),
    ],
)
def test_every_parameter_of_the_client_is_known(resource: type, shape: type) -> None:
    """A parameter that a newer client has must be honoured, ignored with a reason, or refused by name."""
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(resource.create).parameters) - own <= set(schemas.policies(shape))


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == ("starter", "model")
    assert client.models.retrieve("starter") == model


# Answers


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="starter", messages=ROPE, temperature=0, max_tokens=12)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="starter",
        messages=ROPE,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_the_stream_helper_accumulates_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="starter", messages=ROPE, temperature=0, max_completion_tokens=8
    )
    with client.chat.completions.stream(
        model="starter", messages=ROPE, temperature=0, max_completion_tokens=8
    ) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] == "content.done"
    [choice] = stream.current_completion_snapshot.choices
    assert choice.message.content == whole.choices[0].message.content
    assert choice.finish_reason == "length"


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    """Clients append the message object that they got, with all its empty fields."""
    first = client.chat.completions.create(model="starter", messages=ROPE, max_tokens=4, seed=1)
    messages = [*ROPE, first.choices[0].message, {"role": "user", "content": "Go on."}]
    second = client.chat.completions.create(model="starter", messages=messages, max_tokens=4, seed=1)
    assert second.usage.prompt_tokens > first.usage.total_tokens
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_completions_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    asked = {"model": "starter", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.choices[0].text.startswith(" Paris")
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
    stream = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_stop_strings(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="starter", prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=30, stop=["9", "8"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == " 6, 7, "


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="starter", messages=ROPE, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)


class Knot(BaseModel):
    name: str
    strong: bool
    turns: int


def test_a_schema_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="starter",
        messages=[{"role": "user", "content": "Describe a knot."}],
        response_format=Knot,
        temperature=0,
        max_tokens=300,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Knot)


def test_json_mode_gives_json(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="starter",
        messages=[{"role": "user", "content": "Give a JSON object with the key a and the value 1."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def answer(seed: int) -> str:
        done = client.chat.completions.create(
            model="starter", messages=ROPE, seed=seed, temperature=1.5, max_tokens=16
        )
        return done.choices[0].message.content

    assert answer(5) == answer(5) != answer(6)


# Errors


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="starter", messages=ROPE, temperature=9)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", "temperature")
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="starter", messages=[{"role": "user", "content": "word " * 1000}], stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="starter", messages=ROPE, functions=[{"name": "f"}])
    assert caught.value.param == "functions"
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="nosuch", input="x")
    assert caught.value.code == "model_not_found"


def test_a_misspelt_field_is_named(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response
    reply = raw.create(model="starter", messages=ROPE, max_tokens=1, extra_body={"temprature": 1})
    assert reply.headers["x-cordee-ignored"] == "temprature"
    assert reply.parse().model == "starter"


def test_an_error_in_mid_stream_is_raised(starter_path: Path, session_home: Path, tmp_path: Path) -> None:
    with (
        running(starter_path, tmp_path, config=ServiceConfig(context=CONTEXT)) as server,
        openai.OpenAI(base_url=server.base, api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="starter", messages=ROPE, stream=True)
        next(iter(stream))
        server.run(server.service.close())
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "stage_failed"


# Many at once


@pytest.mark.slow
def test_eight_streams_at_once_are_what_each_is_alone(server: Running, client: openai.OpenAI) -> None:
    questions = [f"Tell me about the number {number}. " + "Really. " * number for number in range(8)]

    def arguments(index: int) -> dict:
        messages = [{"role": "user", "content": questions[index]}]
        return {"model": "starter", "messages": messages, "temperature": 0, "max_tokens": 6 + 2 * index}

    alone = [text_of(client.chat.completions.create(**arguments(index), stream=True)) for index in range(8)]

    async def one(asking: openai.AsyncOpenAI, index: int) -> str:
        stream = await asking.chat.completions.create(**arguments(index), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with asynchronous(server) as asking:
            return await asyncio.gather(*(one(asking, index) for index in range(8)))

    assert server.status()["batch_invariant"]
    assert asyncio.run(together()) == alone


def test_leaving_a_stream_ends_it(server: Running, client: openai.OpenAI) -> None:
    ends = {str(token): -100 for token in server.service.vocabulary.end_of_generation}
    stream = client.chat.completions.create(model="starter", messages=ROPE, stream=True, logit_bias=ends)
    next(iter(stream))
    assert server.status()["active"] == 1
    stream.close()
    server.until(lambda status: status["active"] == 0)


def test_a_cancelled_call_ends_its_stream(server: Running) -> None:
    ends = {str(token): -100 for token in server.service.vocabulary.end_of_generation}

    async def cancelled() -> None:
        async with asynchronous(server) as asking:
            call = asking.chat.completions.create(model="starter", messages=ROPE, logit_bias=ends)
            task = asyncio.create_task(call)
            await asyncio.to_thread(server.until, lambda status: status["active"] == 1)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(cancelled())
    server.until(lambda status: status["active"] == 0)


@pytest.mark.long
def test_a_thousand_requests_at_once(server: Running, client: openai.OpenAI) -> None:
    """Each is answered, or refused with 503 and Retry-After; afterwards nothing is left of them."""

    def tasks() -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return server.run(count())

    async def one(asking: openai.AsyncOpenAI, number: int) -> str:
        try:
            answer = await asking.completions.create(model="starter", prompt=f"{number}", max_tokens=1)
            return answer.choices[0].finish_reason
        except openai.InternalServerError as error:
            assert (error.status_code, error.code) == (503, "overloaded")
            assert int(error.response.headers["retry-after"]) > 0
            return "refused"

    async def flood() -> list[str]:
        async with asynchronous(server) as asking:
            return await asyncio.gather(*(one(asking, number) for number in range(1000)))

    client.models.list()
    before = (tasks(), psutil.Process().num_fds())
    outcomes = asyncio.run(flood())
    assert len(outcomes) == 1000
    assert set(outcomes) <= {"length", "stop", "refused"}
    assert 1000 - outcomes.count("refused") >= SEQUENCES + QUEUE
    server.until(lambda status: (status["active"], status["queue"]) == (0, 0))
    gc.collect()
    server.until(lambda _: (tasks(), psutil.Process().num_fds()) <= before)
    assert server.request("GET", "/health").status == 200
    assert client.completions.create(model="starter", prompt="One", max_tokens=1).usage.completion_tokens == 1
