"""A worker's grammars: compiled beside what it computes, shared by streams, given up where they creep."""

import json
import queue
from pathlib import Path

import pytest

from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.errors import BadRequest
from cordee.generation.request import Grammar
from cordee.worker import grammars
from cordee.worker.grammars import WorkerGrammars
from tiny import make_tiny

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
SOUND = Grammar("json_schema", json.dumps(SCHEMA | {"additionalProperties": False}))
AMBIGUOUS = Grammar("gbnf", "root ::= word*\nword ::= [a-z]+ | word word | [a-z]+ word")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "m.gguf", layers=1, tokenizer="bytes")


@pytest.fixture
def own(path: Path) -> WorkerGrammars:
    return WorkerGrammars(path, "tiny")


def prepared(own: WorkerGrammars, grammar: Grammar) -> str:
    """What `prepare` says of a grammar."""
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    own.prepare(grammar, done.put)
    return done.get(timeout=60)


def test_a_prepared_grammar_is_compiled_once_for_all_its_streams(
    own: WorkerGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared(own, SOUND) == ""

    def never(*_: object) -> None:
        raise AssertionError("it is compiled again")

    monkeypatch.setattr(grammars, "GrammarState", never)
    first, second = own.open(SOUND, []), own.open(SOUND, [])
    before = second.allowed().copy()
    for _ in range(4):
        first.accept(int(first.allowed().argmax()))
    assert (second.allowed() == before).all(), "streams do not share what they have said"


def test_a_stream_that_goes_on_elsewhere_is_where_it_was(path: Path, own: WorkerGrammars) -> None:
    vocabulary = LlamaVocabulary(path)
    said = vocabulary.tokenize('{"a":"', special=False, add_bos=False)
    here, elsewhere = own.open(SOUND, []), WorkerGrammars(path, "tiny").open(SOUND, said)
    for token in said:
        here.accept(token)
    assert (here.allowed() == elsewhere.allowed()).all()
    texts = {vocabulary.piece(int(token)) for token in elsewhere.allowed().nonzero()[0]}
    assert {b"b", b"c"} <= texts and b"d" not in texts


@pytest.mark.parametrize("grammar", [Grammar("regex", "("), Grammar("json_schema", "{nope")])
def test_a_bad_grammar_costs_its_own_stream_alone(own: WorkerGrammars, grammar: Grammar) -> None:
    assert "cannot be used" in prepared(own, grammar)
    assert prepared(own, SOUND) == ""


def test_few_compiled_grammars_are_kept(own: WorkerGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "COMPILED_MAX", 2)
    for count in range(1, 6):
        assert prepared(own, Grammar("regex", "a" * count)) == ""
    assert [grammar.text for grammar in own._compiled] == ["aaaa", "aaaaa"]


def test_a_grammar_that_used_its_budget_ends_its_stream_and_is_not_begun_again(
    path: Path, own: WorkerGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "SPARE_SECONDS", 0.1)
    vocabulary = LlamaVocabulary(path)
    letters = vocabulary.tokenize("a", special=False, add_bos=False)[-1:]
    stream, others = own.open(AMBIGUOUS, []), own.open(SOUND, [])
    with pytest.raises(BadRequest, match=r"GBNF grammar .* too long for each token") as ended:
        for _ in range(100_000):
            assert stream.allowed()[letters[0]]
            stream.accept(letters[0])
    assert ended.value.param == "grammar"
    assert prepared(own, AMBIGUOUS) == ended.value.message
    with pytest.raises(BadRequest, match="too long"):
        own.open(AMBIGUOUS, [])
    assert others.allowed().any()


def test_grammars_from_other_machines_are_tried_first(path: Path) -> None:
    """The host that sends them may be one that somebody has taken over: nothing slow is compiled here."""
    properties = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(3000)}
    slow = Grammar("json_schema", json.dumps({"type": "object", "patternProperties": properties}))
    careful = WorkerGrammars(path, "tiny", from_elsewhere=True)
    assert "too complex" in prepared(careful, slow)
    with pytest.raises(BadRequest, match="too complex"):
        careful.open(slow, [])
    assert careful.open(SOUND, []).allowed().any()


def test_a_flood_of_grammars_is_bounded(own: WorkerGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "PREPARING_MAX", 3)
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    with own._lock:
        own._preparing = 3
    own.prepare(SOUND, done.put)
    assert "try again" in done.get(timeout=60)
    with own._lock:
        own._preparing = 0
    assert prepared(own, SOUND) == ""
