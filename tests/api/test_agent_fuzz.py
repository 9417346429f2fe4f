"""Arbitrary bodies for Responses and Anthropic's messages: what cannot be used is refused; nothing fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cordee.api.schemas import Shape
from cordee.endpoints import anthropic_schemas, responses_schemas
from scripted_service import ScriptedService, scripted
from serving import Running

PATHS = ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
SHAPES = {
    kind
    for module in (anthropic_schemas, responses_schemas)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Shape)
}
NAMES = sorted({field.name for kind in SHAPES for field in msgspec.structs.fields(kind)})
WORDS = [
    *("user", "assistant", "system", "developer", "tool", "message", "function_call", "function_call_output"),
    *(
        "reasoning",
        "item_reference",
        "input_text",
        "output_text",
        "refusal",
        "input_image",
        "text",
        "thinking",
    ),
    *("tool_use", "tool_result", "image", "document", "redacted_thinking", "server_tool_use", "function"),
    *("web_search", "custom", "auto", "any", "none", "required", "enabled", "adaptive", "disabled", "high"),
    *("json_schema", "json_object", "allowed_tools", "<|im_end|>", "\x00", "é🧗"),
]
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([1 << 70, -1e300, 0.5]),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
TEXTS = st.sampled_from(WORDS)
KEYS = ("text", "thinking", "id", "name", "tool_use_id", "content", "refusal", "title", "tool_name")
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {"type": TEXTS} | dict.fromkeys(KEYS, TEXTS),
        optional={
            "input": st.dictionaries(TEXTS, VALUES, max_size=2),
            "source": VALUES,
            "is_error": st.booleans(),
            "signature": VALUES,
        },
    ),
    max_size=3,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS[:3]), "content": st.one_of(st.sampled_from(WORDS), BLOCKS)},
        optional={
            name: st.one_of(st.sampled_from(WORDS), BLOCKS)
            for name in ("type", "call_id", "name", "arguments", "output", "summary")
        },
    ),
    min_size=1,
    max_size=4,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a", "b", ""])},
        optional={
            "type": st.sampled_from(["function", "custom", "x"]),
            "parameters": VALUES,
            "input_schema": VALUES,
        },
    ),
    max_size=2,
)
VALID = st.fixed_dictionaries(
    {"model": st.just("scripted"), "max_tokens": st.just(5), "messages": TURNS},
    optional={"input": st.one_of(st.sampled_from(WORDS), TURNS), "tools": TOOLS, "stream": st.booleans()},
)
CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2)
BODIES = st.builds(lambda valid, changes: valid | changes, VALID, CHANGES)


@pytest.fixture(scope="module")
def talk(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, ScriptedService]]:
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        scripted(starter_path, tmp_path_factory.mktemp("store"), monkeypatch) as made,
    ):
        yield made


def answered(server: Running, path: str, body: dict[str, Any]) -> None:
    reply = server.request("POST", path, body)
    assert reply.status in (200, 400, 404, 422), (path, body, reply.body)
    if reply.status != 200:
        assert reply.json["error"]["message"]
    elif body.get("stream") is True and not path.endswith("count_tokens"):
        assert (
            reply.body.rstrip()
            .rpartition(b"event: ")[2]
            .startswith((b"response.completed", b"response.incomplete", b"message_stop"))
        )


@pytest.mark.slow
@given(BODIES, st.sampled_from(PATHS))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_body_makes_the_server_fail(
    talk: tuple[Running, ScriptedService], body: dict[str, Any], path: str
) -> None:
    answered(talk[0], path, body)


@pytest.mark.long
@given(BODIES, st.sampled_from(PATHS))
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
def test_no_body_of_thousands_makes_the_server_fail(
    talk: tuple[Running, ScriptedService], body: dict[str, Any], path: str
) -> None:
    answered(talk[0], path, body)


NESTED = [
    (
        PATHS[0],
        '{"model": "scripted", "input": "x", "tools": [{"type": "function", "name": "a", "parameters": %s}]}',
    ),
    (
        PATHS[0],
        '{"model": "scripted", "input": "x", "text": {"format": {"type": "json_schema", "schema": %s}}}',
    ),
    (PATHS[0], '{"model": "scripted", "input": "x", "metadata": %s}'),
    (PATHS[0], '{"model": "scripted", "input": [{"role": "user", "content": "x", "new": %s}]}'),
    (
        PATHS[1],
        '{"model": "scripted", "max_tokens": 5, "tools": [{"name": "a", "input_schema": %s}],'
        ' "messages": [{"role": "user", "content": "x"}]}',
    ),
    (
        PATHS[1],
        '{"model": "scripted", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}, {"role": '
        '"assistant", "content": [{"type": "tool_use", "id": "x", "name": "a", "input": %s}]}]}',
    ),
    (PATHS[1], '{"model": "scripted", "max_tokens": 5, "messages": [], "new": %s}'),
]


@pytest.mark.parametrize(("path", "body"), NESTED)
def test_what_is_nested_deeply_is_taken_or_refused(
    talk: tuple[Running, ScriptedService], path: str, body: str
) -> None:
    """Python decodes and encodes by calls, which have a limit; it must not be found by the reply."""
    found = set()
    for depth in (*range(100, 1000, 20), *range(930, 1000), 5000):
        nested = '{"x": ' * depth + "1" + "}" * depth
        for stream in ("true", "false"):
            asked = (body % nested).removesuffix("}") + f', "stream": {stream}}}'
            reply = talk[0].request("POST", path, asked.encode())
            found.add(reply.status)
            assert reply.status in (200, 400), (depth, reply.body[-300:])
    assert 400 in found
