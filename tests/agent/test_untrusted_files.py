"""Model files that end libllama, or that nobody can read, among sound ones, on real nodes."""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from cluster_processes import SECONDS, Cluster, Node, until
from cordee.models.store import Store
from cordee.serving.local_service import ServiceConfig
from model_files import TOKENS, Field, Fields, Original
from serving import COMPLETIONS, running
from tiny import make_tiny

TEXT, NUMBER, LIST = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.ARRAY
DAMAGED, UNSUPPORTED = 4, 5  # exit codes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    path = tmp_path_factory.mktemp("original") / "tiny.gguf"
    kind = GGMLQuantizationType.Q8_0
    return Original(make_tiny("llama", path, layers=2, quantization=kind, tokenizer="bytes"))


def make_equal(texts: list[str]) -> None:
    texts[300] = texts[301]


def make_empty(texts: list[str]) -> None:
    texts[:] = [""] * len(texts)


def bad_files(original: Original) -> dict[str, tuple[Fields, int]]:
    """Changes that make a file bad, and the exit code of verbs that are to use it, by the model's name."""
    new = {key.replace("llama.", "llama9."): field for key, field in original.fields.items()}
    return {
        "equal-tokens": (original.with_tokens(make_equal), DAMAGED),
        "empty-tokens": (original.with_tokens(make_empty), DAMAGED),
        "no-byte-tokens": (original.without_bytes(), DAMAGED),
        "no-tokens": ({TOKENS: Field(LIST, [], TEXT)}, DAMAGED),
        "new-architecture": (new | {"general.architecture": Field(TEXT, "llama9")}, UNSUPPORTED),
        "new-pre-tokenizer": (
            {
                "tokenizer.ggml.model": Field(TEXT, "gpt2"),
                "tokenizer.ggml.pre": Field(TEXT, "of-tomorrow"),
                "tokenizer.ggml.merges": Field(LIST, ["e t"], TEXT),
            },
            UNSUPPORTED,
        ),
        "odd-context": ({"llama.context_length": Field(TEXT, "many")}, DAMAGED),
        "odd-set": ({"split.count": Field(LIST, [1, 2], GGUFValueType.UINT16)}, DAMAGED),
    }


def plant(home: Path, name: str, path: Path) -> None:
    """Put a file into a store as a program that checked less would have done."""
    store = Store(home / "models")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    (store.root / "blobs" / f"sha256-{digest}").write_bytes(data)
    entry = {
        "name": name,
        "digest": f"sha256:{digest}",
        "nbytes": len(data),
        "source": str(path),
        "added": "2024-01-01T00:00:00+00:00",
        "architecture": "llama",
        "layers": 2,
    }
    (store.root / "names" / f"{name}.json").write_text(json.dumps(entry))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, original: Original) -> Iterator[Cluster]:
    """Node a has a sound model and all bad files before it starts; node b is its neighbour."""
    folder = tmp_path_factory.mktemp("cluster")
    made = Cluster(folder, None, "--scouting", "off")
    try:
        files, home = tmp_path_factory.mktemp("files"), folder / "a"
        plant(home, "sound", original.header.path)
        for name, (changes, _) in bad_files(original).items():
            plant(home, name, original.write(files / f"{name}.gguf", changes))
        made.add("a")
        made.add("b", "--peer", f"127.0.0.1:{made.port}")
        yield made
    finally:
        made.close()


def healthy(node: Node) -> set[str]:
    """The models that a node serves, if it is well."""
    with node.client() as client:
        listed = {model.id for model in client.models.list()}
        place = str(client.base_url.join("/health"))
    try:
        urllib.request.urlopen(place, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return set()
    return listed


def answer(node: Node) -> str:
    with node.client() as client:
        done = client.completions.create(model="sound", prompt="é", max_tokens=4, temperature=0)
    return done.choices[0].text


@pytest.mark.slow
def test_bad_files_end_no_node_and_hide_no_sound_model(cluster: Cluster, original: Original) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    for node in (a, b):
        until(lambda node=node: healthy(node) == {"sound"})
    text = answer(a)
    for name, (_, code) in bad_files(original).items():
        deployed = a.cordee("deploy", name)
        assert deployed.returncode in (code, 3), (name, deployed.stderr)  # 3: it is not offered at all
        assert name in deployed.stderr and "sha256" not in deployed.stderr
        with b.client() as client:
            try:
                answered = client.completions.with_raw_response.create(model=name, prompt="é")
                assert answered.headers["x-cordee-ignored"] == "model"  # by the only one that is served
            except openai.APIStatusError as refused:
                assert refused.status_code in (404, 422) and name in str(refused)
    for node in (a, b):
        assert node.process.poll() is None
        assert answer(node) == text
        assert "Traceback" not in node.said


@pytest.mark.long
def test_grammars_travel_to_the_machine_that_samples(cluster: Cluster) -> None:
    """They are tried by the node that is asked, by the host and by the worker, each for itself."""
    patterns = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(3000)}
    slow = {"type": "object", "patternProperties": patterns}
    for node in cluster.nodes.values():
        until(lambda node=node: healthy(node) == {"sound"})
        with node.client() as client:

            def bound(schema: dict, client: openai.OpenAI = client) -> str | None:
                done = client.chat.completions.create(
                    model="sound",
                    messages=[{"role": "user", "content": "x"}],
                    max_tokens=8,
                    response_format={
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": schema, "strict": True},
                    },
                )
                return done.choices[0].message.content

            assert (bound({"const": 7}) or "").strip() == "7"
            with pytest.raises(openai.BadRequestError, match="too complex"):
                bound(slow)
        assert answer(node)
        assert "Traceback" not in node.said


@pytest.mark.long
def test_a_node_with_bad_files_starts_again(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    assert a.down() == 0
    a.up("--name", "a", "--listen", f"127.0.0.1:{cluster.port}", "--scouting", "off")
    until(lambda: healthy(a) == {"sound"})
    assert answer(a)
    assert "Traceback" not in a.said


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "verb", ["run", *(pytest.param(verb, marks=LONG) for verb in ("serve", "show", "plan"))]
)
def test_verbs_refuse_bad_files_by_name_or_do_their_work(
    cluster: Cluster, original: Original, verb: str
) -> None:
    a = cluster.nodes["a"]
    options = {"run": ("hello",), "serve": ("--port", "0")}.get(verb, ())
    for name, (_, code) in bad_files(original).items():
        done = a.cordee(verb, name, *options)
        wanted = {code} if verb in ("run", "serve") else {0, code}
        assert done.returncode in wanted, (name, done.stderr)
        assert "Traceback" not in done.stderr and "sha256-" not in done.stderr
        if done.returncode:
            assert name in done.stderr
            assert ("update cordee" in done.stderr) is (code == UNSUPPORTED) or code == DAMAGED


def test_a_text_that_ends_libllama_costs_its_own_request_alone(original: Original, tmp_path: Path) -> None:
    def name_one_otherwise(texts: list[str]) -> None:
        texts[texts.index("<0x01>")] = "no byte"

    path = original.write(tmp_path / "rare.gguf", original.with_tokens(name_one_otherwise))
    with running(path, tmp_path / "store", config=ServiceConfig(context=256, threads=1)) as server:
        body = {"model": "starter", "prompt": "é", "max_tokens": 3, "temperature": 0}
        text = server.request("POST", COMPLETIONS, body).json["choices"][0]["text"]
        for _ in range(3):
            refused = server.request("POST", COMPLETIONS, body | {"prompt": "a\x01"})
            assert (refused.status, refused.error["code"]) == (422, "bad_model_file")
            assert refused.error["message"].startswith("starter: libllama cannot tokenize this text")
            answered = server.request("POST", COMPLETIONS, body)
            assert answered.json["choices"][0]["text"] == text
