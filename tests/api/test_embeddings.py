"""Vectors and rankings over HTTP, from tiny models of random weights and from one that writes."""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from serving import Reply, Running, running
from tiny_encoders import CONTEXT, EMBD, POOLING_CLS, POOLING_RANK, make_bert

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One with the starter model, a model for vectors and one that ranks."""
    folder = tmp_path_factory.mktemp("store")
    made = [
        make_bert(folder / "vectors.gguf"),
        make_bert(folder / "classes.gguf", POOLING_CLS),
        make_bert(folder / "ranks.gguf", POOLING_RANK),
    ]
    with running(starter_path, folder, embedding=made) as started:
        yield started


def vectors(reply: Reply) -> np.ndarray:
    """The vectors of a reply, in order."""
    assert reply.status == 200, reply.body
    assert [each["index"] for each in reply.json["data"]] == list(range(len(reply.json["data"])))
    return np.array([each["embedding"] for each in reply.json["data"]], np.float32)


def asked(server: Running, given: Any, model: str = "vectors", **more: Any) -> Reply:
    return server.request("POST", EMBEDDINGS, {"model": model, "input": given, **more})


@pytest.mark.parametrize("model", ["vectors", "classes", "starter"])
def test_a_vector_has_length_one_and_does_not_depend_on_what_else_is_asked(
    server: Running, model: str
) -> None:
    """A model that writes gives vectors, too."""
    texts = ["a cat", "a dog", "the same", "a cat"]
    together = vectors(asked(server, texts, model))
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.array_equal(together[0], together[3])
    assert not np.allclose(together[0], together[1])
    for text, vector in zip(texts, together, strict=True):
        assert np.array_equal(vectors(asked(server, text, model))[0], vector)


def test_the_reply_has_the_shape_that_clients_rely_on(server: Running) -> None:
    reply = asked(server, ["a cat", "dog"]).json
    assert {key: reply[key] for key in ("object", "model")} == {"object": "list", "model": "vectors"}
    assert [each["object"] for each in reply["data"]] == ["embedding", "embedding"]
    assert len(reply["data"][0]["embedding"]) == EMBD
    assert reply["usage"] == {"prompt_tokens": 7, "total_tokens": 7}  # [CLS] a cat [SEP] [CLS] dog [SEP]


def test_token_ids_are_used_as_they_are(server: Running) -> None:
    [text] = vectors(asked(server, "a cat"))
    assert np.array_equal(vectors(asked(server, [2, 5, 31, 3]))[0], text)
    assert np.array_equal(vectors(asked(server, [[2, 5, 31, 3], [2, 32, 3]]))[0], text)


def test_openais_client_reads_them_as_base64(server: Running) -> None:
    """It asks for that by itself."""
    plain = vectors(asked(server, ["a cat"]))
    with openai.OpenAI(base_url=server.base, api_key="none") as client:
        found = client.embeddings.create(model="vectors", input=["a cat"])
        assert np.allclose(found.data[0].embedding, plain[0], atol=1e-7)
    [each] = asked(server, ["a cat"], encoding_format="base64").json["data"]
    data = base64.b64decode(each["embedding"])
    assert np.array_equal(np.array(struct.unpack(f"<{EMBD}f", data), np.float32), plain[0])


def test_fewer_dimensions_are_the_first_of_unit_length(server: Running) -> None:
    [whole], [part] = vectors(asked(server, "a cat")), vectors(asked(server, "a cat", dimensions=16))
    assert np.allclose(part, whole[:16] / np.linalg.norm(whole[:16]), atol=1e-6)
    refusal = asked(server, "a cat", dimensions=EMBD + 1)
    assert (refusal.status, refusal.error["param"]) == (400, "dimensions")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "input"),
        ("", None),
        (["cat", 3], "input"),
        ([2, 9999], "input"),
        ([[2, 3], [-1]], "input[1]"),
        (["cat", "cat " * CONTEXT], "input[1]"),
        ("cat " * CONTEXT, "input"),
        ([None], "input[0]"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_place(server: Running, given: Any, param: str | None) -> None:
    reply = asked(server, given)
    if param is None:
        assert reply.status == 200  # [CLS] [SEP]: a vector of nothing, as from others
    else:
        assert (reply.status, reply.error["param"]) == (400, param)


def test_a_model_that_is_not_here_is_named(server: Running) -> None:
    reply = asked(server, "cat", "nosuch")
    assert reply.status == 404
    assert "'nosuch' is not on this machine" in reply.error["message"]


def test_documents_are_ranked(server: Running) -> None:
    documents = ["a cat", {"text": "a dog"}, "the"]
    body = {"model": "ranks", "query": "cat", "documents": documents}
    reply = server.request("POST", RERANK, body).json
    scores = [each["relevance_score"] for each in reply["results"]]
    assert sorted(scores, reverse=True) == scores
    assert sorted(each["index"] for each in reply["results"]) == [0, 1, 2]
    alone = {
        place: server.request("POST", RERANK, {**body, "documents": [document]}).json["results"][0]
        for place, document in enumerate(documents)
    }
    assert {each["index"]: each["relevance_score"] for each in reply["results"]} == {
        place: each["relevance_score"] for place, each in alone.items()
    }
    best = server.request("POST", RERANK, {**body, "top_n": 1, "return_documents": True}).json["results"]
    assert [each["index"] for each in best] == [reply["results"][0]["index"]]
    assert best[0]["document"]["text"] in ("a cat", "a dog", "the")


def test_a_model_of_the_other_kind_says_so(server: Running) -> None:
    reply = asked(server, "cat", "ranks")
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert "ranks documents" in reply.error["message"]
    reply = server.request("POST", RERANK, {"model": "vectors", "query": "q", "documents": ["d"]})
    assert (reply.status, reply.error["param"]) == (400, "model")


def test_they_are_listed(server: Running) -> None:
    listed = {each["id"] for each in server.request("GET", "/v1/models").json["data"]}
    assert listed == {"starter", "vectors", "classes", "ranks"}
    assert server.request("GET", "/v1/models/vectors").status == 200


def test_a_child_that_dies_is_started_again(server: Running) -> None:
    before = vectors(asked(server, "a cat"))

    async def kill() -> None:
        service = await server.embedders.service("vectors")
        service._child._process.kill()

    server.run(kill())
    replies = [asked(server, "a cat") for _ in range(2)]
    assert replies[0].status in (200, 503)  # it may have died while it was asked
    assert np.array_equal(vectors(replies[1]), before)
