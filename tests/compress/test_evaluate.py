"""`cordee eval`: the figures are those of a plain computation, and texts that prove nothing are refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cordee.cli.main import cordee
from cordee.compress.compress import compress
from cordee.compress.evaluate import default_text, evaluate, size_of_model, tokens_of
from cordee.compress.fitter import CompressOptions
from cordee.errors import BadRequest
from cordee.models.gguf import read_header
from ordinary_models import make_ordinary, prose
from plain import Plain
from tiny import make_tiny

CONTEXT = 512


def plain_logits(path: Path, window: np.ndarray) -> np.ndarray:
    """(n, n_vocab) of libllama with its defaults, as llama-perplexity has it."""
    whole = Plain(path, context=CONTEXT, sequences=1, batch_rows=CONTEXT, threads=1, batch_invariant=False)
    logits = whole.decode([(int(token), place, 0, True) for place, token in enumerate(window)])
    whole.close()
    return logits.astype(np.float64)


def llama_perplexity(path: Path, text: str) -> float:
    """The formula of llama.cpp's tools/perplexity/perplexity.cpp, one token after another."""
    tokens, bos = tokens_of(read_header(path), text)
    loss, count = 0.0, 0
    for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
        window = np.array(tokens[start : start + CONTEXT])
        window[0] = window[0] if bos is None else bos
        logits = plain_logits(path, window)
        for place in range(CONTEXT // 2, CONTEXT - 1):
            row = logits[place] - logits[place].max()
            loss -= row[window[place + 1]] - np.log(np.exp(row).sum())
            count += 1
    return float(np.exp(loss / count))


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ordinary(tmp_path_factory.mktemp("eval") / "m.gguf")


def test_the_perplexity_is_llama_cpps(ordinary: Path) -> None:
    text = prose(400)
    found = evaluate(read_header(ordinary), text)
    assert found.perplexity == pytest.approx(llama_perplexity(ordinary, text), rel=0.005)
    assert found.tokens % (CONTEXT - 1 - CONTEXT // 2) == 0
    assert found.kl is None


def test_a_model_is_no_further_from_itself_than_from_another(ordinary: Path, tmp_path: Path) -> None:
    header, other = read_header(ordinary), read_header(make_ordinary(tmp_path / "n.gguf", seed=7))
    same = evaluate(header, prose(300), original=header)
    assert same.kl == pytest.approx(0, abs=1e-9)
    assert same.same_top1 == 1
    assert same.perplexity == same.perplexity_original
    apart = evaluate(header, prose(300), original=other)
    assert apart.kl is not None and apart.kl > 0.01
    assert apart.same_top1 is not None and apart.same_top1 < 0.9


def test_the_size_counts_all_tensors(ordinary: Path) -> None:
    header = read_header(ordinary)
    size = size_of_model(header)
    assert size.nbytes == sum(tensor.nbytes for tensor in header.tensors)
    assert size.bits_per_weight == pytest.approx(32)
    assert size.bits_per_layer_weight == pytest.approx(32)


def test_a_text_that_is_too_short_is_refused_with_the_need(ordinary: Path) -> None:
    with pytest.raises(BadRequest, match="at least 1024"):
        evaluate(read_header(ordinary), "three little words")


def test_models_with_other_vocabularies_are_not_compared(ordinary: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    make_tiny("llama", other, tokenizer="bytes", layers=2, control=("<|rope|>", "<|snow|>"))
    text = prose(300) + " 9,"
    if tokens_of(read_header(ordinary), text) == tokens_of(read_header(other), text):
        pytest.skip("the vocabularies do not differ in this text")
    with pytest.raises(BadRequest, match="different tokens"):
        evaluate(read_header(ordinary), text, original=read_header(other))


def test_the_last_line_is_the_object_that_others_rely_on(ordinary: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(300))
    asked = ["eval", str(ordinary), "--against", str(ordinary), "--text", str(text), "--json"]
    result = CliRunner().invoke(cordee, asked, catch_exceptions=False)
    assert result.exit_code == 0
    facts = json.loads(result.stdout.splitlines()[-1])
    assert {"perplexity", "perplexity_original", "kl", "same_top1", "bytes", "bits_per_weight"} <= set(facts)
    assert facts["same_top1"] == 1


@pytest.mark.slow
def test_several_models_are_drawn(ordinary: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'cordee[plot]'")
    text, small = tmp_path / "text.txt", tmp_path / "small.gguf"
    text.write_text(prose(300))
    compress(ordinary, small, CompressOptions(method="fit"))
    asked = ["eval", str(small), str(ordinary), "--against", str(ordinary), "--text", str(text)]
    picture = tmp_path / "picture.svg"
    result = CliRunner().invoke(cordee, [*asked, "--plot", str(picture)], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.count("KL divergence") == 2
    drawn = picture.read_text()
    assert drawn.startswith("<?xml") and "KL divergence from the original" in drawn and "small.gguf" in drawn
    refused = CliRunner().invoke(cordee, [*asked, "--plot", str(tmp_path / "picture.doc")])
    assert refused.exit_code == 2 and "ends in .svg or .png" in refused.stderr


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = ["eval", __file__, "--plot", str(tmp_path / "picture.svg")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not installed
    refused = CliRunner().invoke(cordee, missing)
    assert refused.exit_code == 2 and "pip install 'cordee[plot]'" in refused.stderr


def test_the_default_text_is_english_and_french() -> None:
    text = default_text()
    assert "Stratford-upon-Avon" in text and "Phileas Fogg" in text
