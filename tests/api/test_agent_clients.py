"""The official clients of Responses and of Anthropic's messages: what their users rely on."""

import asyncio
import inspect
import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.resources import Messages
from anthropic.types import Message, RawMessageStreamEvent
from openai.resources.responses import Responses
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from cordee.api.schemas import policies
from cordee.endpoints.anthropic_schemas import MessagesRequest
from cordee.endpoints.responses_schemas import ResponsesRequest
from cordee.errors import StageFailed
from drip import Drip
from scripted_service import ScriptedService
from serving import Running

ROPE = "Why do climbers rope together?"
ARGUMENTS = {"place": "Chamonix"}
CALL = f"[think]Où ? 🧗[say]Je regarde…[call weather]{json.dumps(ARGUMENTS)}"
TWICE = f'[call weather]{json.dumps(ARGUMENTS)}[call weather]{{"place": "Zürich"}}'
SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
TOOL = {"name": "weather", "description": "The weather of a place.", "input_schema": SCHEMA}
QUESTION = {"role": "user", "content": "What is the weather?"}
TALK = {"model": "scripted", "max_tokens": 100, "messages": [QUESTION], "tools": [TOOL]}


def openai_client(server: Running) -> openai.OpenAI:
    """It receives every answer byte by byte."""
    http = httpx2.Client(transport=Drip())
    return openai.OpenAI(base_url=server.base, api_key="none", max_retries=0, http_client=http)


def anthropic_client(server: Running) -> anthropic.Anthropic:
    """It receives every answer byte by byte."""
    http = httpx2.Client(transport=Drip())
    base = f"http://127.0.0.1:{server.port}"
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, http_client=http)


@pytest.mark.parametrize(
    ("resource", "shape"),
    [
        (Responses, ResponsesRequest),
        (Messages, MessagesRequest),
    ],
)
def test_every_parameter_of_the_clients_is_known(resource: type, shape: type) -> None:
    """A parameter that a newer client has must be honoured, ignored with a reason, or refused by name."""
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    assert set(inspect.signature(resource.create).parameters) - own <= set(policies(shape))


@pytest.mark.parametrize(
    ("path", "body", "event", "reply"),
    [
        ("/v1/responses", {"input": "x", "tools": [FUNCTION]}, ResponseStreamEvent, Response),
        ("/v1/messages", TALK | {"thinking": {"type": "adaptive"}}, RawMessageStreamEvent, Message),
    ],
)
def test_replies_and_events_have_all_that_the_clients_types_require(
    talk: tuple[Running, ScriptedService], path: str, body: dict[str, Any], event: Any, reply: Any
) -> None:
    """The clients themselves do not look, so what is missing would be found by their users."""
    server, service = talk
    service.script = [CALL, CALL]
    TypeAdapter(reply).validate_python(server.request("POST", path, {"model": "scripted"} | body).json)
    streamed = server.request("POST", path, {"model": "scripted", "stream": True} | body)
    data = [
        line.removeprefix("data: ") for line in streamed.body.decode().splitlines() if line[:5] == "data:"
    ]
    events = [each for each in data if json.loads(each)["type"] != "ping"]  # which the type does not have
    assert len(events) > 10
    for each in events:
        TypeAdapter(event).validate_json(each)


# OpenAI's, Responses


def test_responses_whole_and_streamed_are_the_same(server: Running) -> None:
    asked = {"model": "starter", "input": ROPE, "temperature": 0, "max_output_tokens": 8}
    with openai_client(server) as client:
        whole = client.responses.create(**asked)
        assert whole.status == "incomplete"
        assert whole.output_text
        events = list(client.responses.create(**asked, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    last = events[-1].response
    assert text == last.output_text == whole.output_text
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_round_with_responses(talk: tuple[Running, ScriptedService], streamed: bool) -> None:
    """Whatever came, thinking, text and calls, is sent back with the results, as the guide of OpenAI does."""
    server, service = talk
    service.script = [CALL, "Il fait froid."]
    items: list[Any] = [QUESTION]
    asked = {"model": "scripted", "tools": [FUNCTION], "store": False}
    with openai_client(server) as client:
        if streamed:
            with client.responses.stream(**asked, input=items) as stream:
                kinds = [event.type for event in stream]
                first = stream.get_final_response()
            assert "response.function_call_arguments.done" in kinds
        else:
            first = client.responses.create(**asked, input=items)
        thought, said, call = first.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Où ? 🧗")
        assert (said.type, said.content[0].text) == ("message", "Je regarde…")
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", ARGUMENTS)
        items += first.output
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "-4 °C"})
        second = client.responses.create(**asked, input=items)
    assert second.output_text == "Il fait froid."
    question, called, result = service.turns[1].messages
    assert question.content == QUESTION["content"]
    assert (called.thinking, called.content) == ("Où ? 🧗", "Je regarde…")
    assert [each.id for each in called.tool_calls] == [call.call_id] == [result.tool_call_id]
    assert result.content == "-4 °C"


def test_two_calls_in_one_response(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [TWICE]
    with (
        openai_client(server) as client,
        client.responses.stream(model="scripted", tools=[FUNCTION], input=[QUESTION]) as stream,
    ):
        calls = stream.get_final_response().output
    assert [json.loads(call.arguments)["place"] for call in calls] == ["Chamonix", "Zürich"]
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2


def test_responses_are_parsed_by_a_class(talk: tuple[Running, ScriptedService]) -> None:
    class Weather(BaseModel):
        place: str

    server, service = talk
    service.script = [json.dumps(ARGUMENTS)]
    with openai_client(server) as client:
        parsed = client.responses.parse(model="scripted", input=[QUESTION], text_format=Weather)
    assert parsed.output_parsed == Weather(place="Chamonix")


def test_errors_of_responses_are_the_clients_own(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [("Je [call", StageFailed("the stage is gone"))]
    with openai_client(server) as client:
        with pytest.raises(openai.BadRequestError, match="nothing is stored here") as refused:
            client.responses.create(model="scripted", input="x", previous_response_id="resp_1")
        assert refused.value.param == "previous_response_id"
        stream = client.responses.create(model="scripted", input="x", stream=True)
        last = list(stream)[-1]
    assert (last.type, last.response.error.message) == ("response.failed", "the stage is gone")


@pytest.mark.parametrize("streamed", [False, True])
def test_openais_agents_run_a_tool(talk: tuple[Running, ScriptedService], streamed: bool) -> None:
    agents = pytest.importorskip("agents", reason="the Python package `openai-agents` is not installed")
    server, service = talk
    service.script = [CALL, "Il fait froid."]
    asked: list[str] = []

    @agents.function_tool
    def weather(place: str) -> str:
        """The weather of a place."""
        asked.append(place)
        return "-4 °C"

    async def run() -> str:
        agents.set_tracing_disabled(True)  # traces would go to OpenAI
        async with openai.AsyncOpenAI(base_url=server.base, api_key="none", max_retries=0) as client:
            model = agents.OpenAIResponsesModel("scripted", client)
            agent = agents.Agent("Guide", tools=[weather], model=model)
            if not streamed:
                return (await agents.Runner.run(agent, "What is the weather?")).final_output
            running = agents.Runner.run_streamed(agent, "What is the weather?")
            async for _ in running.stream_events():
                pass
            return running.final_output

    assert asyncio.run(run()) == "Il fait froid."
    assert asked == ["Chamonix"]
    _, called, result = service.turns[1].messages
    assert (called.thinking, result.content) == ("Où ? 🧗", "-4 °C")


# Anthropic's


def test_messages_whole_and_streamed_are_the_same(server: Running) -> None:
    asked = {"model": "starter", "max_tokens": 8, "messages": [{"role": "user", "content": ROPE}]}
    greedy = {"extra_body": {"temperature": 0}}
    with anthropic_client(server) as client:
        whole = client.messages.create(**asked, **greedy)
        assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 8)
        with client.messages.stream(**asked, **greedy) as stream:
            text = "".join(stream.text_stream)
            last = stream.get_final_message()
        counted = client.messages.count_tokens(model="starter", messages=asked["messages"])
        assert [model.id for model in client.models.list()] == ["starter"]
    assert text == last.content[0].text == whole.content[0].text
    used = last.usage
    assert (used.output_tokens, used.input_tokens + used.cache_read_input_tokens) == (8, counted.input_tokens)
    assert used.cache_read_input_tokens > 0


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_round_with_messages(talk: tuple[Running, ScriptedService], streamed: bool) -> None:
    server, service = talk
    service.script = [CALL, "Il fait froid."]
    asked = TALK | {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    with anthropic_client(server) as client:
        if streamed:
            with client.messages.stream(**asked) as stream:
                kinds = [event.type for event in stream]
                first = stream.get_final_message()
            assert {"thinking", "text", "input_json", "message_stop"} <= set(kinds)
        else:
            first = client.messages.create(**asked)
        assert first.stop_reason == "tool_use"
        thought, said, call = first.content
        assert (thought.type, thought.thinking) == ("thinking", "Où ? 🧗")
        assert thought.signature
        assert (said.type, said.text) == ("text", "Je regarde…")
        assert (call.type, call.name, call.input) == ("tool_use", "weather", ARGUMENTS)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "-4 °C"}
        messages = [
            QUESTION,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        second = client.messages.create(**asked | {"messages": messages})
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "Il fait froid.")
    _, called, answered = service.turns[1].messages
    assert (called.thinking, called.content) == ("Où ? 🧗", "Je regarde…")
    assert [each.id for each in called.tool_calls] == [call.id] == [answered.tool_call_id]
    assert answered.content == "-4 °C"


def test_two_calls_in_one_message(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [TWICE]
    with anthropic_client(server) as client, client.messages.stream(**TALK) as stream:
        calls = stream.get_final_message().content
    assert [call.input["place"] for call in calls] == ["Chamonix", "Zürich"]
    assert len({call.id for call in calls}) == 2


def test_anthropics_tool_runner_runs_a_tool(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [CALL, "Il fait froid."]
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(place: str) -> str:
        """The weather of a place."""
        asked.append(place)
        return "-4 °C"

    with anthropic_client(server) as client:
        runner = client.beta.messages.tool_runner(
            model="scripted", max_tokens=100, messages=[QUESTION], tools=[weather]
        )
        last = runner.until_done()
    assert asked == ["Chamonix"]
    assert last.content[0].text == "Il fait froid."


def test_errors_of_messages_are_the_clients_own(talk: tuple[Running, ScriptedService]) -> None:
    server, service = talk
    service.script = [("Je [call", StageFailed("the stage is gone"))]
    with anthropic_client(server) as client:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}
        with pytest.raises(anthropic.BadRequestError, match="a block of type 'image' cannot be used"):
            client.messages.create(**TALK | {"messages": [{"role": "user", "content": [image]}]})
        with pytest.raises(anthropic.APIStatusError, match="the stage is gone"):
            list(client.messages.create(**TALK, stream=True))
