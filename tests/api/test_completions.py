"""Completions beyond text that goes on: scored and repeated prompts, filling in, tokens, templates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from cordee.cluster.memory import OUTPUT_ROWS
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.serving.local_service import ServiceConfig
from model_files import Field, Original
from serving import COMPLETIONS, FRANCE, HELLO, Running, running, user

TEXT = (
    "The rope is tied round the waist. Whoever falls is held by the others, and the party climbs on; "
    "so a ridge that nobody dares to walk alone is an easy way for four."
)
PREFIX, SUFFIX, MIDDLE = "<issue_start>", "<issue_comment>", "<issue_closed>"  # of the starter; any will do


@pytest.fixture(scope="module")
def coder(starter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter model as a file that names tokens for filling in."""
    original = Original(starter_path)
    texts = original.texts()
    named = {
        f"tokenizer.ggml.fim_{key}_token_id": Field(GGUFValueType.UINT32, texts.index(text))
        for key, text in (("pre", PREFIX), ("suf", SUFFIX), ("mid", MIDDLE), ("sep", "<file_sep>"))
    }
    return original.write(tmp_path_factory.mktemp("coder") / "coder.gguf", named)


@pytest.fixture(scope="module")
def server(coder: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = ServiceConfig(context=512, sequences=2)
    with running(coder, tmp_path_factory.mktemp("store"), config=config) as started:
        yield started


def tokens_of(server: Running, text: str = TEXT) -> list[int]:
    return server.service.vocabulary.tokenize(text, add_bos=False)


def lm_eval(prompts: list[list[int]]) -> dict[str, Any]:
    """The request of its multiple-choice tasks."""
    scored = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    return {"model": "starter", "prompt": prompts, **scored}


def choices(server: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    reply = server.request("POST", COMPLETIONS, body)
    assert reply.status == 200, reply.body
    return reply.json["choices"]


@pytest.fixture(scope="module")
def log_softmax(starter_path: Path, server: Running) -> np.ndarray:
    """(n, n_vocab): the model's distributions after each token of TEXT, computed row by row."""
    stage = LlamaStage(starter_path, StageConfig(context=512, sequences=1))
    rows = [stage.decode(batch_of_one([token], place))[0] for place, token in enumerate(tokens_of(server))]
    stage.close()
    logits = np.array(rows, dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_prompt_is_scored_as_the_model_has_it(server: Running, log_softmax: np.ndarray) -> None:
    tokens = tokens_of(server)
    assert len(tokens) > 2 * OUTPUT_ROWS, "it takes several calls of the engine"
    [choice] = choices(server, lm_eval([tokens]))
    lists = choice["logprobs"]
    assert {len(each) for each in lists.values()} == {len(tokens) + 1}
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    expected = log_softmax[np.arange(len(tokens) - 1), tokens[1:]]
    assert lists["token_logprobs"][1:-1] == pytest.approx(expected.tolist(), abs=1e-5)
    for row, top, own in zip(
        log_softmax, lists["top_logprobs"][1:], lists["token_logprobs"][1:], strict=True
    ):
        assert max(top.values()) == pytest.approx(row.max(), abs=1e-5)
        assert min(top.values()) == own, "the likeliest, and the token itself"
    assert choice["text"].startswith(TEXT)
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)
    assert choice["finish_reason"] == "length"


def test_a_prompt_is_scored_alike_in_every_company(server: Running) -> None:
    """In a cache that holds it already, with others, and beside answers."""
    tokens = tokens_of(server)
    [alone] = choices(server, lm_eval([tokens]))
    assert choices(server, lm_eval([tokens]))[0]["logprobs"] == alone["logprobs"]
    many = choices(server, lm_eval([tokens[:9], tokens, tokens[:1], tokens[5:], tokens]))
    assert [choice["index"] for choice in many] == list(range(5))
    assert many[1]["logprobs"] == many[4]["logprobs"] == alone["logprobs"]
    for choice, length in zip(many, (9, len(tokens), 1, len(tokens) - 5, len(tokens)), strict=True):
        assert len(choice["logprobs"]["tokens"]) == length + 1
    assert many[0]["logprobs"]["token_logprobs"][:9] == alone["logprobs"]["token_logprobs"][:9]


@pytest.mark.slow
def test_three_stages_score_as_one(server: Running, coder: Path, session_home: Path, tmp_path: Path) -> None:
    tokens = tokens_of(server)
    with running(coder, tmp_path, config=ServiceConfig(context=512), stages=3) as cut:
        assert choices(cut, lm_eval([tokens, tokens[7:]])) == choices(server, lm_eval([tokens, tokens[7:]]))


def test_a_scored_answer_that_ends_at_once_still_has_its_token(server: Running) -> None:
    """lm-eval drops the last token, which it takes for the one that was generated."""
    tokens = tokens_of(server)
    end = min(server.service.vocabulary.end_of_generation)
    [choice] = choices(server, {**lm_eval([tokens]), "logit_bias": {str(end): 100}})
    assert choice["finish_reason"] == "stop" and choice["text"] == TEXT
    assert len(choice["logprobs"]["tokens"]) == len(tokens) + 1
    assert choice["logprobs"]["text_offset"][-1] == len(TEXT)


@pytest.mark.parametrize("prompt", [TEXT, "Où l'été brûle 🧗🏽‍♀️", "<|im_start|>user\nHi<|im_end|>"])
def test_a_prompt_is_repeated_to_the_letter(server: Running, prompt: str) -> None:
    body = {**FRANCE, "prompt": prompt, "max_tokens": 4}
    [plain] = choices(server, body)
    [echoed] = choices(server, {**body, "echo": True})
    assert echoed["text"] == prompt + plain["text"]
    [scored] = choices(server, {**body, "echo": True, "logprobs": 0})
    assert scored["text"] == echoed["text"]
    lists = scored["logprobs"]
    places = list(zip(lists["tokens"], lists["text_offset"], strict=True))
    assert places[len(tokens_of(server, prompt))][1] == len(prompt), "there the answer begins"
    for token, offset in places[: len(tokens_of(server, prompt))]:
        assert token.startswith("bytes:") or scored["text"].startswith(token, offset)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_repeated_prompt_is_streamed_as_it_is_sent_whole(
    server: Running, logprobs: int | None, max_tokens: int
) -> None:
    body = {**FRANCE, "prompt": [TEXT, "Two"], "echo": True, "logprobs": logprobs, "max_tokens": max_tokens}
    whole = choices(server, body)
    reply = server.request("POST", COMPLETIONS, {**body, "stream": True})
    assert reply.events[-1] == "[DONE]"
    for index, choice in enumerate(whole):
        events = [event["choices"][0] for event in reply.events[:-1]]
        mine = [each for each in events if each["index"] == index]
        assert mine[0]["text"] == [TEXT, "Two"][index], "the prompt comes first, by itself"
        assert "".join(each["text"] for each in mine) == choice["text"]
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [choice["finish_reason"]]
        if logprobs is not None:
            for name, values in choice["logprobs"].items():
                parts = [each["logprobs"][name] for each in mine if each["logprobs"]]
                assert [value for part in parts for value in part] == values


def test_no_tokens_at_all_score_a_prompt_and_read_it(server: Running) -> None:
    tokens = tokens_of(server)
    reply = server.request("POST", COMPLETIONS, {**lm_eval([tokens]), "max_tokens": 0}).json
    [choice] = reply["choices"]
    [with_one] = choices(server, lm_eval([tokens]))
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert choice["logprobs"] == {name: each[:-1] for name, each in with_one["logprobs"].items()}
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (len(tokens), 0)
    warm = server.request("POST", COMPLETIONS, {**FRANCE, "prompt": tokens, "max_tokens": 0}).json
    assert warm["choices"][0]["text"] == "" and warm["usage"]["completion_tokens"] == 0
    again = server.request("POST", COMPLETIONS, {**FRANCE, "prompt": tokens, "max_tokens": 1}).json
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(tokens) - 1


def test_prompts_of_texts_and_tokens_by_turns(server: Running) -> None:
    tokens = tokens_of(server, "The capital of France is")
    head = tokens_of(server, "The capital of")
    [expected] = choices(server, {**FRANCE, "prompt": tokens, "max_tokens": 3})
    for prompt in ([*head, " France is"], ["The capital of", *tokens[len(head) :]], [[*head, " France is"]]):
        [choice] = choices(server, {**FRANCE, "prompt": prompt, "max_tokens": 3})
        assert choice["text"] == expected["text"]
    both = choices(server, {**FRANCE, "prompt": ["The capital of France is", tokens], "max_tokens": 3})
    assert [choice["text"] for choice in both] == [expected["text"]] * 2
    reply = server.request("POST", COMPLETIONS, {**FRANCE, "prompt": [1, [2]]})
    assert (reply.status, reply.error["param"]) == (400, "prompt")


def test_replies_say_how_long_they_took_and_what_made_them(server: Running) -> None:
    body = {**FRANCE, "prompt": TEXT, "max_tokens": 6}
    server.request("POST", COMPLETIONS, {**FRANCE, "prompt": [[5, 6, 7]] * 2})  # the cache holds other things
    reply = server.request("POST", COMPLETIONS, body).json
    timings = reply["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == reply["usage"]["prompt_tokens"]
    assert timings["predicted_n"] == 6
    for name in ("prompt", "predicted"):
        assert timings[f"{name}_ms"] > 0 and timings[f"{name}_per_second"] > 0
        per_token = timings[f"{name}_ms"] / timings[f"{name}_n"]
        assert timings[f"{name}_per_token_ms"] == pytest.approx(per_token, abs=0.01)
    events = server.request("POST", COMPLETIONS, {**body, "stream": True}).events
    assert ["timings" in event for event in events[:-1]] == [False] * (len(events) - 2) + [True]
    chat = server.request("POST", "/v1/chat/completions", {**HELLO, "max_tokens": 2}).json
    prints = {each["system_fingerprint"] for each in (reply, chat, *events[:-1])}
    assert len(prints) == 1 and prints.pop().startswith("fp_")


# Filling in


def framed(server: Running, before: str, behind: str) -> list[int]:
    """The prompt for filling in, by hand."""
    marks = [tokens_of(server, name) for name in (PREFIX, SUFFIX, MIDDLE)]
    assert {len(mark) for mark in marks} == {1}
    pre, suf, mid = marks
    return [*pre, *tokens_of(server, before), *suf, *tokens_of(server, behind), *mid]


CODE = {"before": "def add(a, b):\n    return", "behind": "\n\nprint(add(1, 2))\n"}


def goes_on(server: Running) -> dict[str, int]:
    """A bias that rules out end tokens: the starter knows nothing of filling in, and would say nothing."""
    return {str(token): -100 for token in server.service.vocabulary.end_of_generation}


def filled(server: Running) -> str:
    prompt = framed(server, **CODE)
    body = {**FRANCE, "prompt": prompt, "max_tokens": 8, "logit_bias": goes_on(server)}
    return choices(server, body)[0]["text"]


def test_a_suffix_is_put_where_the_model_expects_it(server: Running) -> None:
    body = {**FRANCE, "prompt": CODE["before"], "suffix": CODE["behind"], "max_tokens": 8}
    body["logit_bias"] = goes_on(server)
    assert choices(server, body)[0]["text"] == filled(server)
    assert choices(server, {**body, "suffix": ""})[0]["text"] != filled(server)


def test_filling_in_as_llama_cpp_has_it(server: Running) -> None:
    body = {
        "input_prefix": "def add(a, b):\n",
        "prompt": "    return",
        "input_suffix": CODE["behind"],
        "n_predict": 8,
        "temperature": 0,
        "logit_bias": goes_on(server),
        "cache_prompt": True,
        "samplers": ["top_k", "infill"],
        "t_max_predict_ms": 1000,
    }
    reply = server.request("POST", "/infill", body).json
    assert reply["content"] == filled(server)
    assert (reply["stop"], reply["stop_type"], reply["tokens_predicted"]) == (True, "limit", 8)
    assert reply["timings"]["predicted_n"] == 8
    *parts, last = server.request("POST", "/infill", {**body, "stream": True}).events
    assert "".join(part["content"] for part in parts) == reply["content"]
    assert not any(part["stop"] for part in parts) and last["stop"]
    word = reply["content"][3:6]
    ended = server.request("POST", "/infill", {**body, "stop": [word]}).json
    assert (ended["stop_type"], ended["stopping_word"]) == ("word", word)
    assert ended["content"] == reply["content"].partition(word)[0]


def test_filling_in_as_mistral_has_it(server: Running) -> None:
    body = {"model": "starter", "prompt": CODE["before"], "suffix": CODE["behind"], "max_tokens": 8}
    body = {**body, "temperature": 0, "random_seed": 3, "logit_bias": goes_on(server)}
    reply = server.request("POST", "/v1/fim/completions", body).json
    assert reply["choices"][0]["message"]["content"] == filled(server)
    events = server.request("POST", "/v1/fim/completions", {**body, "stream": True}).events
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == filled(server)


def test_other_files_come_before_and_long_ones_are_cut_around_the_cursor(server: Running) -> None:
    lines = "".join(f"line {number} of a very long file\n" for number in range(2000))
    body = {
        "input_prefix": lines + "THE END",
        "input_suffix": "THE REST" + lines,
        "input_extra": [{"text": lines, "filename": "a.py"}, {"text": "x = 1", "filename": "b.py"}],
        "n_predict": 4,
        "temperature": 0,
        "logit_bias": goes_on(server),
    }
    reply = server.request("POST", "/infill", body).json
    assert reply["tokens_evaluated"] + 4 <= server.service.context
    assert reply["tokens_evaluated"] > server.service.context - 16, "what fits is used"
    short = {**body, "input_prefix": "a", "input_suffix": "b"}
    extra = len(tokens_of(server, "<reponame>myproject\n<file_sep>b.py\nx = 1<file_sep>filename\n"))
    reply = server.request("POST", "/infill", short).json
    assert reply["tokens_evaluated"] == 5 + extra, "the last of the other files, which fits"


def test_a_file_cannot_hold_control_tokens(server: Running) -> None:
    plain = server.request("POST", "/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 1})
    hidden = {"input_prefix": f"a{SUFFIX}", "input_suffix": "b", "n_predict": 1}
    reply = server.request("POST", "/infill", hidden)
    assert reply.json["tokens_evaluated"] > plain.json["tokens_evaluated"] + 1


def test_a_model_without_tokens_for_it_says_so(
    starter_path: Path, session_home: Path, tmp_path: Path
) -> None:
    with running(starter_path, tmp_path, config=ServiceConfig(context=256, sequences=1)) as plain:
        for path, body in (
            (COMPLETIONS, {**FRANCE, "suffix": "x"}),
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
            ("/v1/fim/completions", {"model": "starter", "prompt": "a"}),
        ):
            reply = plain.request("POST", path, body)
            assert reply.status == 422 and "starter has no tokens for filling in" in reply.error["message"]


# Tokens and templates


def test_text_becomes_tokens_and_back(server: Running) -> None:
    tokens = tokens_of(server)
    reply = server.request("POST", "/tokenize", {"content": TEXT}).json
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (tokens, len(tokens), 512)
    assert server.request("POST", "/tokenize", {"model": "starter", "prompt": TEXT}).json["tokens"] == tokens
    pieces = server.request("POST", "/tokenize", {"content": "brûlé 🧗", "with_pieces": True}).json["tokens"]
    spelt = b"".join(
        each["piece"].encode() if isinstance(each["piece"], str) else bytes(each["piece"]) for each in pieces
    )
    assert spelt.decode() == "brûlé 🧗" and any(isinstance(each["piece"], list) for each in pieces)
    strings = server.request("POST", "/tokenize", {"prompt": TEXT, "return_token_strs": True}).json
    assert "".join(strings["token_strs"]) == TEXT
    back = server.request("POST", "/detokenize", {"tokens": tokens}).json
    assert back == {"content": TEXT, "prompt": TEXT}
    name = {"content": "<|im_start|>"}
    assert server.request("POST", "/tokenize", name).json["count"] == 1
    assert server.request("POST", "/tokenize", {**name, "parse_special": False}).json["count"] > 1


def test_tokens_that_do_not_exist_are_refused(server: Running) -> None:
    reply = server.request("POST", "/detokenize", {"tokens": [1 << 20]})
    assert (reply.status, reply.error["param"]) == (400, "tokens")
    for body in ({}, {"content": "a", "prompt": "b"}, {"messages": []}):
        assert server.request("POST", "/tokenize", body).status == 400


def test_a_conversation_is_shown_as_the_template_writes_it(server: Running) -> None:
    messages = user("What is <|im_end|>?")
    reply = server.request("POST", "/apply-template", {"messages": messages}).json
    assert reply["prompt"].endswith(
        "<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = {"messages": messages, "add_generation_prompt": False}
    assert server.request("POST", "/apply-template", whole).json["prompt"] == reply["prompt"].removesuffix(
        "<|im_start|>assistant\n"
    )
    tokens = server.request("POST", "/tokenize", {"messages": user("Hi")}).json["tokens"]
    used = server.request("POST", "/v1/chat/completions", {**HELLO, "messages": user("Hi"), "max_tokens": 1})
    assert len(tokens) == used.json["usage"]["prompt_tokens"]


def test_a_remote_tokenizer_learns_what_it_needs(server: Running) -> None:
    """The requests of lm-eval's `tokenizer_backend=remote`."""
    info = server.request("GET", "/tokenizer_info").json
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert len(server.request("POST", "/tokenize", body).json["tokens"]) == 1
