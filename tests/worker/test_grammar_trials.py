"""Grammars are tried in another process: what is slow, large or deadly there holds up nothing here."""

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from cordee.errors import BadRequest, CordeeError, Overloaded, StageFailed
from cordee.generation.request import Grammar
from cordee.worker import grammar_trials
from cordee.worker.grammar_trials import GrammarTrials
from tiny import make_tiny


def patterns(count: int) -> Grammar:
    """A schema of a few kilobytes whose time to compile grows with the square of `count`, and faster."""
    properties = {f"^p{number}.*x{number}$": {"type": "integer"} for number in range(count)}
    return Grammar("json_schema", json.dumps({"type": "object", "patternProperties": properties}))


SLOW = patterns(600)
AMBIGUOUS = Grammar("gbnf", "root ::= root root root root | root root root | root root | [a-z]? | [a-f]?")
SOUND = Grammar("json_schema", json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("m") / "m.gguf", layers=1, tokenizer="bytes")


@pytest.fixture(scope="module")
def trials(model: Path) -> GrammarTrials:
    return GrammarTrials.of(model, "tiny")


async def outcome(check: Coroutine[Any, Any, None]) -> CordeeError | None:
    try:
        await check
    except CordeeError as error:
        return error
    return None


def test_a_grammar_that_takes_too_long_is_refused_by_name_with_the_remedy(trials: GrammarTrials) -> None:
    error = asyncio.run(outcome(trials.check(SLOW)))
    assert isinstance(error, BadRequest)
    assert (error.http_status, error.param) == (400, "response_format")
    assert error.message.startswith("the JSON schema cannot be used: it is too complex (2 s ")
    assert "use fewer patterns" in error.message
    assert asyncio.run(outcome(trials.check(SOUND))) is None


def test_a_verdict_is_remembered(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [asyncio.run(outcome(trials.check(each))) for each in (SLOW, SOUND)]

    def never(*_: object) -> None:
        raise AssertionError("it is tried again")

    monkeypatch.setattr(trials, "_asked", never)
    again = [asyncio.run(outcome(trials.check(each))) for each in (SLOW, SOUND)]
    assert list(map(str, first)) == list(map(str, again))


def test_one_that_is_asked_for_twice_at_once_is_tried_once(trials: GrammarTrials) -> None:
    tried: list[Grammar] = []
    asked = trials._asked

    def counted(grammar: Grammar) -> Any:
        tried.append(grammar)
        return asked(grammar)

    async def several() -> list[CordeeError | None]:
        return await asyncio.gather(*(outcome(trials.check(patterns(12))) for _ in range(40)))

    trials._asked = counted
    try:
        assert asyncio.run(several()) == [None] * 40
    finally:
        trials._asked = asked
    assert tried == [patterns(12)]


def test_the_loop_and_known_grammars_do_not_wait_for_one_that_is_tried(trials: GrammarTrials) -> None:
    asyncio.run(trials.check(SOUND))

    async def beside() -> tuple[list[bool], CordeeError | None]:
        slow = asyncio.ensure_future(outcome(trials.check(patterns(601))))
        await asyncio.sleep(0)
        done: list[bool] = []
        for _ in range(20):
            await trials.check(SOUND)
            await asyncio.sleep(0.01)
            done.append(slow.done())
        return done, await slow

    done, error = asyncio.run(beside())
    assert not any(done), "a slow grammar takes 2 s of a core; twenty known ones were answered before"
    assert isinstance(error, BadRequest)


def test_one_asker_cannot_fill_the_line(trials: GrammarTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trials, "WAITING_MAX", 2)

    async def flood() -> list[CordeeError | None]:
        waiting = [asyncio.ensure_future(outcome(trials.check(patterns(30 + n), "a"))) for n in range(5)]
        await asyncio.sleep(0)
        other = await outcome(trials.check(patterns(20), "b"))
        return [*await asyncio.gather(*waiting), other]

    found = asyncio.run(flood())
    assert [type(each) for each in found] == [type(None)] * 2 + [Overloaded] * 3 + [type(None)]


def test_askers_take_turns(trials: GrammarTrials) -> None:
    tried: list[int] = []
    asked = trials._asked

    def noted(grammar: Grammar) -> Any:
        tried.append(len(json.loads(grammar.text)["patternProperties"]))
        return asked(grammar)

    async def both() -> None:
        checks = [trials.check(patterns(count), "a") for count in (40, 41, 42, 43)]
        checks += [trials.check(patterns(50), "b"), trials.check(patterns(51), "b")]
        await asyncio.gather(*checks)

    trials._asked = noted
    try:
        asyncio.run(both())
    finally:
        trials._asked = asked
    assert tried.index(50) <= 2 and tried.index(51) <= 4 and sorted(tried) == [40, 41, 42, 43, 50, 51]


@pytest.mark.parametrize(
    "grammar",
    [
        AMBIGUOUS,
        Grammar("json_schema", '{"type": "strin"}'),
        Grammar("json_schema", json.dumps({"enum": ["a" * 200_000]})),
        Grammar("gbnf", "root ::= " + "(" * 8000 + '"a"' + ")" * 8000),
        Grammar("regex", "(a{1000}){1000}"),
        Grammar("regex", "\ud800"),
        Grammar("lark", "start: ("),
    ],
    ids=lambda grammar: grammar.text[:20],
)
def test_what_cannot_be_used_is_refused_and_the_next_is_taken(
    trials: GrammarTrials, grammar: Grammar
) -> None:
    error = asyncio.run(outcome(trials.check(grammar)))
    if grammar is not AMBIGUOUS:  # which is slow only after many tokens, and perhaps quick enough here
        assert isinstance(error, BadRequest) and "cannot be used" in error.message
    assert asyncio.run(outcome(trials.check(patterns(3)))) is None


def test_a_trial_that_wants_too_much_memory_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cordee.engine.llama.vocabulary import LlamaVocabulary
    from cordee.grammar.grammar import GrammarTokenizer
    from cordee.worker import grammar_child

    monkeypatch.setattr(grammar_child, "check", lambda *_: bytearray(1 << 40))
    tokenizer = GrammarTokenizer(LlamaVocabulary(model))
    verdict = grammar_child._tried_apart(SOUND, tokenizer).as_error()
    assert isinstance(verdict, BadRequest) and "memory" in verdict.message


def test_a_child_that_is_killed_costs_one_trial_and_is_not_the_grammars_fault(trials: GrammarTrials) -> None:
    asyncio.run(trials.check(SOUND))
    assert trials._child is not None
    psutil.Process(trials._child._process.pid).kill()
    error = asyncio.run(outcome(trials.check(patterns(5))))
    assert error is None or isinstance(error, StageFailed)
    assert asyncio.run(outcome(trials.check(patterns(5)))) is None


def test_the_child_ends_with_the_last_user(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(model.read_bytes())
    own = GrammarTrials.of(path, "other")
    assert GrammarTrials.of(path, "other") is own
    asyncio.run(own.check(SOUND))
    assert own._child is not None
    child = psutil.Process(own._child._process.pid)
    del own
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
