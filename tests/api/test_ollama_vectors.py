"""Vectors by Ollama's API: those of `/v1/embeddings`, from a tiny model of random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import pytest

from serving import Running, running
from tiny_encoders import CONTEXT, EMBD, make_bert

LONG = "cat " * 2 * CONTEXT


@pytest.fixture(scope="module")
def server(session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("store")
    with running(None, folder, embedding=[make_bert(folder / "vectors.gguf")]) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(f"http://127.0.0.1:{server.port}")


def openai_s(server: Running, text: str, **more: Any) -> np.ndarray:
    reply = server.request("POST", "/v1/embeddings", {"model": "vectors", "input": text, **more})
    return np.array(reply.json["data"][0]["embedding"], np.float32)


def test_vectors_are_those_of_openai_s_endpoint(server: Running, client: ollama.Client) -> None:
    for model in ("vectors", "vectors:latest"):
        reply = client.embed(model, ["a cat", "a dog"])
        assert np.array_equal(np.array(reply.embeddings[1], np.float32), openai_s(server, "a dog"))
        assert reply.prompt_eval_count == 8 and reply.total_duration > 0
    [one] = client.embed("vectors", "a cat", dimensions=8).embeddings
    assert len(one) == 8 and np.array_equal(
        np.array(one, np.float32), openai_s(server, "a cat", dimensions=8)
    )
    older = client.embeddings("vectors", "a cat").embedding
    assert len(older) == EMBD and np.array_equal(np.array(older, np.float32), openai_s(server, "a cat"))
    assert client.embed("vectors", []).embeddings == []


def test_a_long_text_is_cut_unless_that_is_not_wanted(client: ollama.Client) -> None:
    assert client.embed("vectors", LONG).prompt_eval_count <= CONTEXT
    with pytest.raises(ollama.ResponseError) as refused:
        client.embed("vectors", LONG, truncate=False)
    assert refused.value.status_code == 400
    assert len(client.embeddings("vectors", LONG).embedding) == EMBD


def test_models_for_vectors_are_listed_as_such(server: Running, client: ollama.Client) -> None:
    [model] = server.request("GET", "/api/tags").json["models"]
    assert (model["name"], model["capabilities"]) == ("vectors", ["embedding"])
    shown = client.show("vectors:latest")
    assert shown.capabilities == ["embedding"] and shown.modelinfo["bert.context_length"] == CONTEXT
    assert client.ps().models == []
