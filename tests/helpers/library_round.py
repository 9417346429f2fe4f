"""A client library, installed by pip, does one whole tool round: `library_round.py LIBRARY BASE_URL`.

Run by the Python of the folder where the libraries are, against a server whose one model is scripted. It asks
how the weather is, with a tool that knows it, and prints the answer.
"""

import asyncio
import sys
from collections.abc import AsyncIterable, Callable

QUESTION = "How is the weather in Bern?"
FACT = "It snows."
KEY = "none"
MODEL = "starter"


def weather(city: str) -> str:
    """Tells the weather of a city.

    Args:
        city: the city's name.
    """
    assert city == "Bern", city
    return FACT


def langchain(base: str) -> str:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    tools = [tool(weather)]
    model = ChatOpenAI(model=MODEL, base_url=base, api_key=KEY, streaming=True).bind_tools(tools)
    messages = [HumanMessage(QUESTION)]
    called = model.invoke(messages)
    [call] = called.tool_calls
    messages += [called, ToolMessage(tools[0].invoke(call["args"]), tool_call_id=call["id"])]
    return model.invoke(messages).text


def pydantic_ai(base: str) -> str:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=base, api_key=KEY))
    agent = Agent(model, tools=[weather])

    async def read(_: object, events: AsyncIterable[object]) -> None:
        """Somebody reads events, so answers are streamed."""
        async for _ in events:
            pass

    return agent.run_sync(QUESTION, event_stream_handler=read).output


def instructor(base: str) -> str:
    """It has no round: it wants an object, which the model gives by a call."""
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str

    client = instructor.from_openai(OpenAI(base_url=base, api_key=KEY))
    question = {"role": "user", "content": QUESTION}
    return client.create(model=MODEL, response_model=Weather, messages=[question], max_retries=0).city


def openai_agents(base: str) -> str:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=base, api_key=KEY))
    agent = Agent("Guide", model=model, tools=[function_tool(weather)])

    async def streamed() -> str:
        running = Runner.run_streamed(agent, QUESTION)
        async for _ in running.stream_events():
            pass
        return running.final_output

    return asyncio.run(streamed())


def smolagents(base: str) -> str:
    """Its answer, too, comes by a call."""
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    model = OpenAIServerModel(MODEL, api_base=base, api_key=KEY)
    agent = ToolCallingAgent([tool(weather)], model, verbosity_level=0)
    return str(agent.run(QUESTION))


def litellm(base: str) -> str:
    from litellm import completion

    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "weather", "description": "Tells the weather.", "parameters": parameters}
    asked = {"model": f"openai/{MODEL}", "api_base": base, "api_key": KEY}
    asked["tools"] = [{"type": "function", "function": function}]
    messages = [{"role": "user", "content": QUESTION}]
    called = completion(messages=messages, **asked).choices[0].message
    [call] = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather("Bern")}
    return completion(messages=[*messages, called, result], **asked).choices[0].message.content


LIBRARIES: dict[str, Callable[[str], str]] = {
    "langchain": langchain,
    "pydantic_ai": pydantic_ai,
    "instructor": instructor,
    "openai_agents": openai_agents,
    "smolagents": smolagents,
    "litellm": litellm,
}

if __name__ == "__main__":
    print(LIBRARIES[sys.argv[1]](sys.argv[2]))
