"""Codes and scales: GPTQ loses less than fitting, and the engine computes what was fitted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from cordee.compress.compress import compress
from cordee.compress.decoder import Decoder, DecoderLayer
from cordee.compress.evaluate import evaluate
from cordee.compress.fitter import CompressOptions, Fitter
from cordee.compress.gptq import compressed, damp, inverse_factor
from cordee.compress.source import Source
from cordee.compress.trits import fitted, nearest
from cordee.convert.ternary_file import EMBEDDING, HEAD, OUTPUT_NORM
from cordee.engine.stage import Batch, StageConfig
from cordee.engine.ternary import TernaryStage
from cordee.models.gguf import read_header
from ordinary_models import make_ordinary, prose
from plain import Plain

TOKENS = np.arange(40, 104, dtype=np.int32)


def inputs(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Random weights, and the damped H of inputs that go together."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((4 * cols, cols)) @ draw.standard_normal((cols, cols))
    hessian = (x.T @ x / len(x)).astype(np.float32)
    damp(hessian)
    return draw.standard_normal((rows, cols)).astype(np.float32), hessian


@pytest.mark.parametrize("planes", [1, 2])
def test_gptq_loses_less_than_fitting(planes: int) -> None:
    weights, hessian = inputs(48, 160)

    def error(found: np.ndarray) -> float:
        lost = weights - found
        return float(np.einsum("rc,cd,rd->", lost, hessian, lost))

    ours = compressed(weights, hessian, planes, 64)
    assert ours.codes.shape == (planes, 48, 160) and ours.scales.shape == (planes, 48, 3)
    assert error(ours.dense()) < 0.5 * error(fitted(weights, planes, 64).dense())


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = inputs(1, 40)
    upper = inverse_factor(hessian)
    assert np.allclose(upper, np.triu(upper), atol=1e-6)
    inverse = np.linalg.inv(hessian.astype(np.float64))
    assert np.allclose(upper.T @ upper, inverse, atol=1e-3 * np.abs(inverse).max())


def test_weights_become_the_nearest_sum_of_planes() -> None:
    scales = np.array([[1.0], [0.25]], dtype=np.float32)
    codes, values = nearest(np.array([[0.8, -1.2, 0.1, 0.2, -9]], dtype=np.float32), scales)
    assert values.tolist() == [[0.75, -1.25, 0, 0.25, -1.25]]
    assert (codes.astype(np.float32) * scales[:, :, None]).sum(axis=0).tolist() == values.tolist()


def logits(source: Source, layers: list[DecoderLayer]) -> np.ndarray:
    """(n, n_vocab) by the decoder in numpy."""
    decoder, model = Decoder(source.model, len(TOKENS), source.divisors()), source.model
    table = source.rows(EMBEDDING, 0, model.n_vocab)
    hidden = table[TOKENS][None]
    for layer in layers:
        inner = decoder.output_input(layer, decoder.attention_input(layer, hidden))
        hidden = hidden + inner @ layer.matrices["attn_output"].T
        inner = decoder.down_input(layer, decoder.feed_forward_input(layer, hidden))
        hidden = hidden + inner @ layer.matrices["ffn_down"].T
    head = source.rows(HEAD, 0, model.n_vocab)
    return (decoder.norm(hidden, source.vector(OUTPUT_NORM)) @ head.T)[0]


@pytest.fixture
def stretched(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Tiny llamas of a test have these divisors of RoPE's angles, as those since 3.1."""
    divisors = np.linspace(1, 8, tiny.HEAD // 2, dtype=np.float32)

    def add(maker: tiny.Maker) -> None:
        maker.writer.add_tensor("rope_freqs.weight", divisors)

    monkeypatch.setitem(tiny.RECIPES, "llama", replace(tiny.RECIPES["llama"], extra=add))
    return divisors


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "stretched"])
def test_the_decoder_computes_what_libllama_does(
    tmp_path: Path, architecture: str, request: pytest.FixtureRequest
) -> None:
    divisors = request.getfixturevalue("stretched") if architecture == "stretched" else None
    path = make_ordinary(tmp_path / "m.gguf", "llama" if architecture == "stretched" else architecture)
    source = Source(path, "m", "int8")
    layers = [
        DecoderLayer({name: source.matrix(n, name) for name in source.model.matrices()}, source.vectors(n))
        for n in range(source.model.layers)
    ]
    assert divisors is None or np.array_equal(source.divisors(), divisors)
    whole = Plain(path, context=64, sequences=1, batch_rows=64, threads=1)
    expected = whole.decode([(int(token), place, 0, True) for place, token in enumerate(TOKENS)])
    whole.close()
    assert np.abs(logits(source, layers) - expected).max() < 0.03 * expected.std()


def test_the_engine_divides_the_angles(tmp_path: Path, stretched: np.ndarray) -> None:
    path, out = make_ordinary(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    compress(path, out, CompressOptions("fit", keep=("*",)))
    found = evaluate(read_header(out), prose(300), original=read_header(path), threads=1)
    assert found.kl is not None and found.kl < 0.01
    tensor = read_header(out).tensor("rope_freqs.weight")
    assert tensor is not None and tensor.shape == stretched.shape


@pytest.mark.parametrize(
    "changes",
    [
        {"span": 0},
        {"span": 64, "planes": 2, "rotate": True},
        {"planes": 3, "keep": ("blk.0.attn_v", "*.ffn_down")},
    ],
)
def test_the_engine_computes_what_was_fitted(tmp_path: Path, changes: dict[str, object]) -> None:
    path = make_ordinary(tmp_path / "m.gguf")
    options = replace(CompressOptions("fit"), **changes)
    compress(path, tmp_path / "out.gguf", options)
    source = Source(path, "m", "int8")
    fitter = Fitter(source.model, options)
    layers = [
        DecoderLayer(
            {
                name: fitter.by_itself(n, name, source.matrix(n, name)).dense()
                for name in source.model.matrices()
            },
            source.vectors(n),
        )
        for n in range(source.model.layers)
    ]
    expected = logits(source, layers)
    config = StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
    stage = TernaryStage(tmp_path / "out.gguf", config)
    places = np.arange(len(TOKENS), dtype=np.int32)
    found = stage.decode(Batch(TOKENS, places, np.zeros_like(places), np.ones(len(places), bool)))
    stage.close()
    # Embedding and head are rounded to 8 bits.
    assert np.sqrt(np.square(found - expected).mean()) < 0.05 * expected.std()
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
