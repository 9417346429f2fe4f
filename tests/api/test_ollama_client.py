"""Ollama's own Python client against a real service with the starter model: what its users rely on."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import ollama
import pytest
from pydantic import BaseModel, Field

from cordee.serving.local_service import ServiceConfig
from serving import Running, running

CONTEXT = 256
ROPE = [{"role": "user", "content": "Why do climbers rope together?"}]
SHORT = {"num_predict": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(context=CONTEXT)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(f"http://127.0.0.1:{server.port}")


def test_models_are_listed_shown_and_running(client: ollama.Client) -> None:
    [model] = client.list().models
    assert model.model == "starter" and model.details.family == "llama" and model.modified_at
    [loaded] = client.ps().models
    assert loaded.digest == model.digest and loaded.context_length == CONTEXT
    shown = client.show(model.model)
    assert "completion" in shown.capabilities and "{% for message in messages %}" in shown.template
    assert shown.modelinfo["llama.context_length"] == CONTEXT


def test_chat_whole_and_streamed_are_the_same(client: ollama.Client) -> None:
    whole = client.chat("starter", ROPE, options=SHORT)
    *said, last = client.chat("starter:latest", ROPE, options=SHORT, stream=True)
    assert "".join(part.message.content for part in said) == whole.message.content
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 6)
    assert last.total_duration >= last.eval_duration > 0
    again = client.chat(
        "starter", [*ROPE, whole.message, {"role": "user", "content": "Go on."}], options=SHORT
    )
    assert again.prompt_eval_count > whole.prompt_eval_count


def test_generate_whole_streamed_and_raw(client: ollama.Client) -> None:
    asked = {"model": "starter", "prompt": "The capital of France is", "raw": True, "options": SHORT}
    whole = client.generate(**asked)
    assert whole.response.startswith(" Paris")
    assert "".join(part.response for part in client.generate(**asked, stream=True)) == whole.response
    assert client.generate(
        "starter", system="Be brief.", prompt="Hi", options=ollama.Options(**SHORT)
    ).response
    assert client.generate("starter", keep_alive="10m").done_reason == "load"


class Knot(BaseModel):
    name: str = Field(max_length=8)
    strong: bool


def test_a_schema_gives_an_object(client: ollama.Client) -> None:
    answer = client.chat(
        "starter", ROPE, format=Knot.model_json_schema(), options={"temperature": 0, "num_predict": 60}
    )
    assert Knot.model_validate_json(answer.message.content)
    assert client.chat("starter", ROPE, format="json", options=SHORT).message.content.startswith("{")


def test_fields_of_its_options_and_tools_are_taken(client: ollama.Client) -> None:
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return "fine in " + city

    every = ollama.Options(
        num_ctx=CONTEXT, num_batch=8, num_gpu=0, num_thread=1, num_keep=4, seed=1, num_predict=2, top_k=5,
        top_p=0.5, tfs_z=1.0, typical_p=0.9, repeat_last_n=8, temperature=0.5, repeat_penalty=1.1, mirostat=0,
        presence_penalty=0.1, frequency_penalty=0.1, mirostat_tau=5.0, mirostat_eta=0.1, stop=["x"],
        numa=False, main_gpu=0, low_vram=False, f16_kv=True, use_mmap=True, use_mlock=False,
        penalize_newline=True,
    )  # fmt: skip
    assert client.chat("starter", ROPE, options=every, keep_alive=60, think=False).done
    called = ollama.Message.ToolCall(
        function=ollama.Message.ToolCall.Function(name="weather", arguments={"city": "Sion"})
    )
    history = [
        *ROPE,
        ollama.Message(role="assistant", tool_calls=[called]),
        {"role": "tool", "tool_name": "weather", "content": "fine"},
    ]
    assert client.chat("starter", history, tools=[weather], options=SHORT).done


def test_errors_are_the_client_s_own(client: ollama.Client) -> None:
    def refused(ask, *arguments, **options) -> ollama.ResponseError:
        with pytest.raises(ollama.ResponseError) as caught:
            ask(*arguments, **options)
        assert "{" not in caught.value.error and caught.value.error
        return caught.value

    assert refused(client.show, "nosuch").status_code == 404
    assert refused(client.chat, "starter", ROPE, options={"temperature": 9}).status_code == 400
    assert refused(client.embed, "nosuch", "x").status_code == 404
    assert "cordee pull" in refused(client.pull, "llama3.2").error
    assert "cordee rm" in refused(client.delete, "starter").error
    assert "cordee pull" in refused(client.copy, "starter", "other").error
    assert refused(
        list, client.chat("starter", [{"role": "user", "content": "word " * CONTEXT}], stream=True)
    )


def test_what_is_here_is_pulled(client: ollama.Client) -> None:
    assert client.pull("starter").status == "success"
    assert [step.status for step in client.pull("starter", stream=True)][-1] == "success"


def test_the_asynchronous_client_and_one_that_leaves(server: Running) -> None:
    async def both() -> None:
        client = ollama.AsyncClient(f"http://127.0.0.1:{server.port}")
        assert (await client.chat("starter", ROPE, options=SHORT)).done
        endless = await client.chat("starter", ROPE, options={"ignore_eos": True}, stream=True)
        async for _ in endless:
            break
        await endless.aclose()

    asyncio.run(both())
    server.until(lambda status: status["active"] == 0)
