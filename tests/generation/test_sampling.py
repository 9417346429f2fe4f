"""A row of logits in, a token out: against libllama's own samplers, plain arithmetic, and replays."""

import ctypes
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.engine.llama import libllama
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, StageFailed, UnsupportedModel
from cordee.generation.request import Grammar, SamplingParams
from cordee.generation.sampling import GREEDY_BELOW, LOGIT_BIAS_MAX, RANGES, Sampler, check, draw_seed
from cordee.grammar.grammar import GrammarState, GrammarTokenizer
from cordee.grammar.grammar import check as check_grammar

GREEDY = SamplingParams(temperature=0.0)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "height": {"type": "integer", "minimum": 1, "maximum": 8848},
        "rock": {"enum": ["granite", "limestone", "ice"]},
        "ropes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "height", "rock", "ropes"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Bytes:
    """A vocabulary of the 256 bytes, two ends of generation and a control token that is none."""

    size: int = 259
    bos: int | None = None
    end_of_generation: frozenset[int] = frozenset({256, 257})

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]:
        return list(text.encode())

    def piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else b"<|control|>"

    def is_control(self, token: int) -> bool:
        return token == 258


def bound(
    params: SamplingParams, tokenizer: GrammarTokenizer, prompt: Sequence[int], generated: Sequence[int] = ()
) -> Sampler:
    """A sampler with the state of its grammar, if it has one, after what was generated."""
    state = None if params.grammar is None else GrammarState(params.grammar, tokenizer, generated)
    return Sampler(params, state, prompt, generated)


@pytest.fixture(scope="module")
def of_bytes() -> GrammarTokenizer:
    return GrammarTokenizer(Bytes())


@pytest.fixture(scope="module")
def vocabulary(starter_path: Path):
    loaded = Vocabulary(starter_path)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Vocabulary) -> GrammarTokenizer:
    return GrammarTokenizer(vocabulary)


def row(seed: int, n_vocab: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * spread).astype(np.float32)


def draws(params: SamplingParams, logits: np.ndarray, count: int, history: Sequence[int] = ()) -> list[int]:
    """The first token of `count` streams that differ in their seeds."""
    seeded = (
        SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__} | {"seed": seed})
        for seed in range(count)
    )
    return [Sampler(each, None, history).sample(logits).token for each in seeded]


def text_of(sampler: Sampler, vocabulary: Vocabulary, rows: Callable[[int], np.ndarray], most: int) -> str:
    """What a stream writes until it ends, on rows by index."""
    data = b""
    for index in range(most):
        token = sampler.sample(rows(index)).token
        if token in vocabulary.end_of_generation:
            return data.decode()
        data += vocabulary.piece(token)
    pytest.fail(f"no end after {most} tokens: {data[:200]!r}")


# Without a grammar


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id() -> None:
    logits = np.array([1, 7, 3, 7, 7], dtype=np.float32)
    assert Sampler(GREEDY, None, []).sample(logits).token == 1
    assert Sampler(SamplingParams(temperature=GREEDY_BELOW / 2), None, []).sample(logits).token == 1


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9), SamplingParams(top_k=2)])
@pytest.mark.parametrize(("bad", "where"), [(np.nan, 17), (np.inf, 17), (-np.inf, slice(None))])
def test_a_faulty_row_is_the_stage_s_failure(params: SamplingParams, bad: float, where: int | slice) -> None:
    logits = row(0, 50)
    logits[where] = bad
    with pytest.raises(StageFailed, match="logit"):
        Sampler(params, None, []).sample(logits)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9), SamplingParams(top_k=2)])
def test_a_token_that_the_model_rules_out_is_never_drawn(params: SamplingParams) -> None:
    logits = row(0, 50)
    ruled_out = np.flatnonzero(logits < logits.max())
    logits[ruled_out] = -np.inf
    assert Sampler(params, None, []).sample(logits).token not in ruled_out


def test_the_row_is_only_read() -> None:
    logits = row(1, 500)
    logits.setflags(write=False)
    params = SamplingParams(temperature=0.7, top_k=9, repeat_penalty=1.3, logit_bias={3: 5.0}, top_logprobs=2)
    Sampler(params, None, [1, 2, 3]).sample(logits)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], dtype=np.float32))
    counts = Counter(draws(SamplingParams(), logits, 8000))
    shares = [counts[token] / 8000 for token in range(5)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.0625], abs=0.02)
    counts = Counter(draws(SamplingParams(temperature=0.5), logits, 8000))  # squares the probabilities
    squared = np.array([16, 4, 1, 0.25, 0.25]) / 21.5
    assert [counts[token] / 8000 for token in range(5)] == pytest.approx(squared, abs=0.02)


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], dtype=np.float32))[[3, 0, 4, 1, 2]]
    best_first = [1, 3, 4, 0, 2]
    assert set(draws(SamplingParams(top_k=2), logits, 300)) == set(best_first[:2])
    assert set(draws(SamplingParams(top_p=0.8), logits, 300)) == set(best_first[:3])
    assert set(draws(SamplingParams(top_p=0.0), logits, 50)) == {1}
    assert set(draws(SamplingParams(min_p=0.45), logits, 300)) == set(best_first[:3])
    # top-p counts what top-k left: of 0.4 and 0.3 the first has 57 %
    assert set(draws(SamplingParams(top_k=2, top_p=0.5), logits, 300)) == {1}


def test_typical_p_top_n_sigma_and_xtc_keep_what_they_say() -> None:
    probabilities = np.array([0.5, 0.2, 0.2, 0.05, 0.05], dtype=np.float32)
    logits = np.log(probabilities)
    # Surprise nearest to the entropy (1.29 nats) comes first: 0.2 has 1.61, 0.5 has 0.69.
    assert set(draws(SamplingParams(typical_p=0.35), logits, 300)) == {1, 2}
    assert set(draws(SamplingParams(typical_p=0.85), logits, 300)) == {0, 1, 2}
    assert set(draws(SamplingParams(top_n_sigma=0.5), logits, 300)) == {0}
    assert set(draws(SamplingParams(top_n_sigma=9.0), logits, 500)) == set(range(5))
    # XTC leaves out all but the last of the tokens above its threshold, or nothing.
    always = SamplingParams(xtc_probability=1.0, xtc_threshold=0.3)
    assert set(draws(always, logits, 300)) == set(range(5)), "one alone above the threshold stays"
    both = Counter(draws(SamplingParams(xtc_probability=1.0, xtc_threshold=0.1), logits, 3000))
    assert both[0] == 0 and both[1] * both[2] == 0 and both[1] + both[2] > 1500


def test_xtc_is_drawn_apart_from_the_token() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.3], dtype=np.float32))
    counts = Counter(draws(SamplingParams(xtc_probability=0.5, xtc_threshold=0.35), logits, 8000))
    assert [counts[token] / 8000 for token in range(3)] == pytest.approx([0.4, 0.3, 0.3], abs=0.02)
    counts = Counter(draws(SamplingParams(xtc_probability=0.5, xtc_threshold=0.05), logits, 8000))
    # Half the time only one of the last two is left, else all are.
    assert counts[0] / 8000 == pytest.approx(0.2, abs=0.02)


def test_a_dynamic_temperature_is_between_its_ends() -> None:
    logits = row(11, 50)
    fixed = SamplingParams(temperature=0.8)
    assert draws(
        SamplingParams(temperature=0.8, dynatemp_range=0.0, dynatemp_exponent=3.0), logits, 40
    ) == draws(fixed, logits, 40)
    flat, peaked = np.zeros(50, dtype=np.float32), np.zeros(50, dtype=np.float32)
    peaked[7] = 12.0
    wide = SamplingParams(temperature=1.0, dynatemp_range=0.9)
    assert len(set(draws(wide, flat, 400))) > 40
    assert set(draws(wide, peaked, 2000)) == {7}, "cooler where the model is sure"


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=2)])
def test_no_end_comes_before_there_are_min_tokens(params: SamplingParams) -> None:
    logits = row(12, 40)
    ends = tuple(int(token) for token in np.argsort(-logits)[:3])
    late = msgspec.structs.replace(params, ends=ends, min_tokens=5)
    sampler = Sampler(late, None, [])
    tokens = [sampler.sample(logits).token for _ in range(30)]
    assert not set(tokens[:5]) & set(ends) and set(tokens[5:]) & set(ends)
    replayed = Sampler(late, None, [], tokens[:4])
    assert [replayed.sample(logits).token for _ in range(26)] == tokens[4:]
    only_ends = np.full(40, -np.inf, dtype=np.float32)
    only_ends[list(ends)] = 1.0
    assert Sampler(late, None, []).sample(only_ends).token in ends, "there is nothing else"
    with pytest.raises(BadRequest, match="ends"):
        check(msgspec.structs.replace(late, ends=(40,)), 40)


def test_temperature_comes_last() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    hot = SamplingParams(temperature=2.0, top_p=0.85)  # by its own probabilities 0.6 and 0.3, hot or not
    assert set(draws(hot, logits, 300)) == {0, 1}


def plain_libllama(logits: np.ndarray, top_p: float, seed: int) -> int:
    """libllama's top-p and draw over the whole vocabulary."""
    library = libllama.load()
    candidates = (library.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        candidates[token].id, candidates[token].logit = token, logit
    array = library.llama_token_data_array(data=candidates, size=len(logits), selected=-1, sorted=False)
    for sampler in (library.llama_sampler_init_top_p(top_p, 1), library.llama_sampler_init_dist(seed)):
        library.llama_sampler_apply(sampler, ctypes.byref(array))
        library.llama_sampler_free(sampler)
    return array.data[array.selected].id


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.999])
def test_top_p_leaves_out_nothing_that_libllama_would_keep(top_p: float) -> None:
    for seed in range(20):
        logits = row(seed, 4000, spread=1 + seed / 4)
        ours = Sampler(SamplingParams(top_p=top_p, seed=seed), None, []).sample(logits).token
        assert ours == plain_libllama(logits, top_p, draw_seed(seed, 0))


def libllama_penalised(logits: np.ndarray, params: SamplingParams, history: Sequence[int]) -> np.ndarray:
    library = libllama.load()
    sampler = library.llama_sampler_init_penalties(
        len(logits),
        params.penalty_window,
        params.repeat_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )
    for token in history:
        library.llama_sampler_accept(sampler, token)
    candidates = (library.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        candidates[token].id, candidates[token].logit = token, logit
    array = library.llama_token_data_array(data=candidates, size=len(logits), selected=-1, sorted=False)
    library.llama_sampler_apply(sampler, ctypes.byref(array))
    library.llama_sampler_free(sampler)
    return np.array([candidate.logit for candidate in candidates], dtype=np.float32)


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 9), max_size=8),
    st.integers(0, 12),
    st.sampled_from([(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (0.8, -0.5, 1.5), (1.0, 0.0, -2.0)]),
)
def test_penalties_are_libllama_s(prompt: list, answer: list, window: int, penalties: tuple) -> None:
    repeat, frequency, presence = penalties
    params = SamplingParams(
        temperature=0.0,
        penalty_window=window,
        repeat_penalty=repeat,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    sampler, seen = Sampler(params, None, prompt), list(prompt)
    for index in range(len(answer)):
        logits = row(index, 10)
        expected = libllama_penalised(logits, params, seen)
        token = sampler.sample(logits).token
        assert expected[token] == pytest.approx(expected.max(), abs=1e-5)
        seen.append(token)


def test_logit_bias_can_force_and_forbid() -> None:
    logits = row(3, 100)
    best = int(logits.argmax())
    assert Sampler(SamplingParams(logit_bias={42: 100.0}), None, []).sample(logits).token == 42
    forbidden = SamplingParams(logit_bias={best: -100.0})
    assert best not in draws(forbidden, logits, 200)


def test_log_probabilities_are_the_model_s_own() -> None:
    logits = row(5, 1000)
    logits[[7, 8]] = 20.0  # equal ones rank by id
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    params = SamplingParams(temperature=1.7, top_k=1, logit_bias={99: 50.0}, top_logprobs=4)
    choice = Sampler(params, None, []).sample(logits)
    assert (choice.token, choice.logprob) == (99, pytest.approx(exact[99], abs=1e-5))
    best = np.argsort(-exact, kind="stable")[:4]
    assert [token for token, _ in choice.top_logprobs] == list(best)
    assert [value for _, value in choice.top_logprobs] == pytest.approx(exact[best], abs=1e-5)
    only_own = Sampler(SamplingParams(temperature=0.0, top_logprobs=0), None, []).sample(logits)
    assert (only_own.logprob is not None, only_own.top_logprobs) == (True, ())
    assert Sampler(GREEDY, None, []).sample(logits).logprob is None


def test_seeds_make_the_draw() -> None:
    logits = row(6, 5000, spread=1.0)
    assert draws(SamplingParams(), logits, 40) == draws(SamplingParams(), logits, 40)
    assert len(set(draws(SamplingParams(), logits, 40))) > 30
    one = Sampler(SamplingParams(seed=1), None, [])
    assert len({one.sample(logits).token for _ in range(40)}) > 30  # the index counts too
    assert Sampler(SamplingParams(seed=-(2**63)), None, []).sample(logits).token < 5000


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20))
def test_no_seed_means_the_clock(seed: int, index: int) -> None:
    assert 0 <= draw_seed(seed, index) < 0xFFFFFFFF


# Replays


REPLAYED = {
    "plain": SamplingParams(seed=11),
    "everything": SamplingParams(
        seed=12,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repeat_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        penalty_window=9,
        logit_bias={5: 2.0},
    ),
    "all of libllama's": SamplingParams(
        seed=12,
        temperature=1.2,
        typical_p=0.95,
        top_n_sigma=3.0,
        top_p=0.97,
        xtc_probability=0.5,
        xtc_threshold=0.02,
        dynatemp_range=0.5,
        dynatemp_exponent=1.3,
    ),
    "greedy with penalties": SamplingParams(temperature=0.0, repeat_penalty=1.5, penalty_window=6),
    "schema": SamplingParams(
        seed=13,
        temperature=0.9,
        top_p=0.95,
        repeat_penalty=1.1,
        grammar=Grammar("json_schema", json.dumps(SCHEMA)),
    ),
}


@pytest.mark.parametrize("params", REPLAYED.values(), ids=REPLAYED)
def test_a_replay_goes_on_as_if_nothing_had_happened(params: SamplingParams, tokenizer) -> None:
    prompt, rows = [3, 4, 5, 5, 6], partial(row, n_vocab=tokenizer.size)
    undisturbed = bound(params, tokenizer, prompt)
    answer = [undisturbed.sample(rows(index)).token for index in range(14)]
    for lost_at in (0, 1, 7, 13):
        replayed = bound(params, tokenizer, prompt, answer[:lost_at])
        assert [replayed.sample(rows(index)).token for index in range(lost_at, 14)] == answer[lost_at:]


# With a grammar


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_binds_whatever_the_model_wants(
    seed: int, temperature: float, vocabulary, tokenizer
) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    sampler = bound(SamplingParams(seed=seed, temperature=temperature, grammar=grammar), tokenizer, [])
    answer = json.loads(
        text_of(sampler, vocabulary, lambda index: row(1000 * seed + index, vocabulary.size), 600)
    )
    assert set(answer) == set(SCHEMA["properties"])
    assert isinstance(answer["name"], str) and len(answer["name"]) <= 12
    assert isinstance(answer["height"], int) and 1 <= answer["height"] <= 8848
    assert answer["rock"] in SCHEMA["properties"]["rock"]["enum"]
    assert len(answer["ropes"]) <= 3 and all(isinstance(rope, bool) for rope in answer["ropes"])


def test_json_mode_gives_an_object(vocabulary: Vocabulary, tokenizer: GrammarTokenizer) -> None:
    """On random rows that lean towards closing what is open, or it would write for ever."""
    closing = [
        token for token in range(vocabulary.size) if vocabulary.piece(token) in (b'"', b"}", b"]", b":")
    ]
    closing += list(vocabulary.end_of_generation)
    for seed in range(5):
        params = SamplingParams(
            seed=seed, grammar=Grammar("json_object"), logit_bias=dict.fromkeys(closing, 12.0)
        )
        sampler = bound(params, tokenizer, [])
        text = text_of(sampler, vocabulary, lambda index, s=seed: row(77 * s + index, vocabulary.size), 800)
        assert isinstance(json.loads(text), dict)


WHOLE = {
    "gbnf": ('root ::= "peak " [0-9]+ " m" ("!" | "?")', r"peak [0-9]+ m[!?]"),
    "lark": ('start: "rope" ("s" | " holds")', r"rope(s| holds)"),
    "regex": (r"[a-f]{3}-[0-9]{2,4}", r"[a-f]{3}-[0-9]{2,4}"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_grammars_of_each_kind_bind(kind: str, of_bytes: GrammarTokenizer) -> None:
    text, pattern = WHOLE[kind]
    for seed in range(8):
        sampler, data = bound(SamplingParams(seed=seed, grammar=Grammar(kind, text)), of_bytes, []), []
        while (token := sampler.sample(row(seed + 100 * len(data), 259)).token) < 256:
            data.append(token)
        assert token in Bytes.end_of_generation
        assert re.fullmatch(pattern, bytes(data).decode())


def favouring(token: int) -> np.ndarray:
    logits = np.zeros(259, dtype=np.float32)
    logits[token] = 30.0
    return logits


@pytest.mark.parametrize("end", sorted(Bytes.end_of_generation))
def test_a_complete_text_leaves_only_the_ends(end: int, of_bytes: GrammarTokenizer) -> None:
    grammar = Grammar("regex", "ab")
    for temperature in (0.0, 1.0):
        sampler = bound(SamplingParams(temperature=temperature, grammar=grammar), of_bytes, [])
        assert [sampler.sample(favouring(end)).token for _ in range(3)] == [*b"ab", end]
    stubborn = bound(SamplingParams(grammar=grammar), of_bytes, [], list(b"ab"))
    assert stubborn.sample(favouring(ord("c"))).token in Bytes.end_of_generation


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9), SamplingParams(top_k=2)])
def test_a_model_that_rules_out_all_that_a_grammar_allows_fails(
    params: SamplingParams, of_bytes: GrammarTokenizer
) -> None:
    sampler = bound(msgspec.structs.replace(params, grammar=Grammar("regex", "ab")), of_bytes, [])
    logits = favouring(ord("c"))
    logits[ord("a")] = -np.inf
    with pytest.raises(StageFailed, match="every token that the grammar allows"):
        sampler.sample(logits)


def test_control_tokens_are_no_text(of_bytes: GrammarTokenizer) -> None:
    sampler = bound(SamplingParams(temperature=0.0, grammar=Grammar("regex", r".*")), of_bytes, [])
    assert sampler.sample(favouring(258)).token != 258


def test_a_replay_that_breaks_the_grammar_is_refused(of_bytes: GrammarTokenizer) -> None:
    with pytest.raises(BadRequest):
        bound(SamplingParams(grammar=Grammar("regex", "ab")), of_bytes, [], list(b"xy"))


# What is refused


@pytest.mark.parametrize(("name", "low", "high"), [(name, *bounds) for name, bounds in RANGES.items()])
def test_parameters_out_of_range_are_refused_by_name(name, low, high) -> None:
    check(SamplingParams(**{name: low}), 259)
    check(SamplingParams(**{name: high}), 259)
    for value in (low - 1, high + 1, float("nan"), float("inf")):
        with pytest.raises(BadRequest, match=name) as refused:
            check(SamplingParams(**{name: value}), 259)
        assert refused.value.param == name


@pytest.mark.parametrize(
    "bias",
    [{259: 1.0}, {-1: 1.0}, {5: 100.5}, {5: float("nan")}, dict.fromkeys(range(LOGIT_BIAS_MAX + 1), 1.0)],
)
def test_a_bias_out_of_bounds_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(BadRequest) as refused:
        check(SamplingParams(logit_bias=bias), 259)
    assert refused.value.param == "logit_bias"


def nested(depth: int) -> str:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return json.dumps(schema)


BAD_SCHEMAS = {
    "no JSON": "{nope",
    "no object": "[1]",
    "unknown type": '{"type": "strin"}',
    "not supported": '{"not": {"type": "object"}}',
    "unsatisfiable": '{"type": "integer", "minimum": 5, "maximum": 3}',
    "itself": '{"$ref": "#"}',
    "remote": '{"$ref": "http://127.0.0.1:9/schema.json"}',
    "look-ahead": r'{"type": "string", "pattern": "(?=a)b"}',
    "deep": nested(200),
    "deep text": '{"enum": [' + "[" * 50_000 + "]" * 50_000 + "]}",
    "long": json.dumps({"enum": ["a" * 200_000]}),
    "product": json.dumps(
        {"allOf": [{"anyOf": [{"properties": {f"{a}{b}": {}}} for b in range(12)]} for a in range(12)]}
    ),
    "half a surrogate pair": r'{"enum": ["\ud800"]}',
}
BAD_GRAMMARS = {
    "gbnf without root": ("gbnf", 'other ::= "a"'),
    "gbnf with a missing rule": ("gbnf", "root ::= other"),
    "gbnf nested": ("gbnf", "root ::= " + "(" * 8000 + '"a"' + ")" * 8000),
    "gbnf repeated": ("gbnf", 'root ::= "a"{1000000000}'),
    "gbnf that never ends": ("gbnf", "root ::= root"),
    "lark": ("lark", "start: ("),
    "lark import": ("lark", '%import /etc/passwd\nstart: "a"'),
    "regex": ("regex", "("),
    "regex product": ("regex", "(a{1000}){1000}"),
    "regex of nothing": ("regex", r"[^\s\S]"),
    "regex with half a surrogate pair": ("regex", "\ud800"),
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_bad_schemas_are_refused_before_they_are_queued(schema: str, of_bytes: GrammarTokenizer) -> None:
    with pytest.raises(BadRequest, match="JSON schema") as refused:
        check_grammar(Grammar("json_schema", schema), of_bytes)
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(("kind", "text"), BAD_GRAMMARS.values(), ids=BAD_GRAMMARS)
def test_bad_grammars_are_refused_before_they_are_queued(kind: str, text: str, of_bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        check_grammar(Grammar(kind, text), of_bytes)
    assert refused.value.param == "grammar"


def test_large_but_sound_schemas_are_taken(of_bytes: GrammarTokenizer) -> None:
    names = json.dumps({"enum": [f"value {number}" for number in range(5000)]})
    properties = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(500)}}
    for schema in (names, json.dumps(properties), "{}"):
        check_grammar(Grammar("json_schema", schema), of_bytes)


def test_a_model_that_never_ends_cannot_be_bound() -> None:
    endless = GrammarTokenizer(Bytes(end_of_generation=frozenset()))
    with pytest.raises(UnsupportedModel, match="end-of-generation"):
        check_grammar(Grammar("json_object"), endless)
