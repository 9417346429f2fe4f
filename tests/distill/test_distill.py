"""`cordee distill`: right gradients, a model nearer to its original, runs that survive interruptions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cordee.compress.compress import compress
from cordee.compress.decoder import Decoder, DecoderLayer
from cordee.compress.evaluate import evaluate
from cordee.compress.fitter import CompressOptions
from cordee.compress.source import Source
from cordee.convert.ternary_file import TernaryModel
from cordee.distill import distill as distill_module
from cordee.distill.distill import DistillOptions, distill
from cordee.distill.end_to_end import Head
from cordee.distill.gradients import Arrays, Layer
from cordee.distill.latent import LatentMatrix
from cordee.distill.weights_file import TernaryFile
from cordee.errors import BadModelFile, BadRequest, DoesNotFit, UnsupportedModel
from cordee.models.gguf import read_header
from ordinary_models import make_ordinary, prose
from ternary_models import FAMILIES

TEXT = prose(600)
LENGTH = 7
SHAPES = {
    "llama": {},
    "qwen3": {"head_norms": True, "rope": "neox"},
    "bitnet": {"sub_norms": True, "activation": "relu2"},
}


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ordinary(tmp_path_factory.mktemp("distill") / "m.gguf")


def shape(changes: dict[str, object]) -> TernaryModel:
    small = {"n_embd": 12, "n_ff": 20, "heads": 4, "kv_heads": 2, "head_dim": 6, "layers": 1}
    return replace(FAMILIES["llama"], **(small | changes))


def weights(model: TernaryModel, draw: np.random.Generator) -> tuple[Arrays, Arrays]:
    matrices = {
        name: (draw.standard_normal(size) / np.sqrt(size[1])).astype("f4")
        for name, size in model.matrices().items()
    }
    vectors = {name: draw.uniform(0.5, 1.5, length).astype("f4") for name, length in model.norms().items()}
    return matrices, vectors


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_are_those_of_small_differences(kind: str) -> None:
    draw = np.random.default_rng(3)
    model = shape(SHAPES[kind])
    matrices, vectors = weights(model, draw)
    x, d = (draw.standard_normal((2, LENGTH, model.n_embd)) for _ in range(2))
    layer = Layer(model, LENGTH)
    arrays = {"x": x} | matrices | vectors
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}

    def loss(changed: Arrays) -> float:
        parts = ({n: changed[n] for n in names} for names in (matrices, vectors))
        found, _ = layer.forward(*parts, changed["x"])
        return float((found * d).sum())

    def slope(name: str, at: tuple[int, ...]) -> float:
        step = 1e-4
        values = []
        for sign in (1, -1):
            changed = exact | {name: exact[name].copy()}
            changed[name][at] += sign * step
            values.append(loss(changed))
        return (values[0] - values[1]) / (2 * step)

    parts = ({n: exact[n] for n in names} for names in (matrices, vectors))
    inside, outside = parts
    _, trace = layer.forward(inside, outside, exact["x"])
    found = layer.backward(inside, outside, trace, d)
    gradients = {"x": found.x} | found.matrices | found.vectors
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        for _ in range(6):
            at = tuple(int(draw.integers(size)) for size in gradient.shape)
            assert gradient[at] == pytest.approx(slope(name, at), rel=1e-4, abs=1e-4), (name, at)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_layer_is_the_decoder_s(kind: str) -> None:
    draw = np.random.default_rng(4)
    model = shape(SHAPES[kind])
    matrices, vectors = weights(model, draw)
    x = draw.standard_normal((2, LENGTH, model.n_embd)).astype("f4")
    decoder, whole = Decoder(model, LENGTH), DecoderLayer(matrices, vectors)
    inner = decoder.output_input(whole, decoder.attention_input(whole, x))
    y = x + inner @ matrices["attn_output"].T
    down = decoder.down_input(whole, decoder.feed_forward_input(whole, y))
    found, _ = Layer(model, LENGTH).forward(matrices, vectors, x)
    np.testing.assert_allclose(found, y + down @ matrices["ffn_down"].T, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_a_matrix_in_training_begins_as_it_was(planes: int) -> None:
    draw = np.random.default_rng(5)
    codes = draw.integers(-1, 2, (planes, 5, 150)).astype(np.int8)
    scales = np.sort(draw.uniform(0.1, 1, (planes, 5, 3)).astype(np.float16).astype("f4"), axis=0)[::-1]
    scales *= np.float32(3.0) ** -np.arange(planes)[:, None, None]  # levels apart
    scales = scales.astype(np.float16).astype("f4")
    matrix = LatentMatrix(codes, scales, 64, draw.standard_normal((5, 150)).astype("f4"))
    wide = np.repeat(scales, 64, axis=2)[:, :, :150]
    np.testing.assert_allclose(matrix.value(), (codes * wide).sum(axis=0), rtol=1e-5, atol=1e-6)
    wanted = draw.standard_normal((5, 150)).astype("f4")
    before = np.square(matrix.value() - wanted).sum()
    for _ in range(60):
        matrix.step(matrix.value() - wanted, 0.05, 0.01)
    assert np.square(matrix.value() - wanted).sum() < 0.8 * before


def made(ordinary: Path, out: Path, **changes: object) -> Path:
    compress(ordinary, out, replace(CompressOptions(method="fit", calibration=TEXT), **changes))
    return out


def divergence(ours: Path, original: Path) -> float:
    found = evaluate(read_header(ours), prose(300, seed=5), original=read_header(original), threads=1)
    assert found.kl is not None
    return found.kl


OPTIONS = DistillOptions(text=prose(2000, seed=7), steps=12)


@pytest.mark.parametrize("changes", [{}, {"planes": 2, "keep": ("blk.0.ffn_down",)}], ids=["one", "two"])
def test_training_brings_a_model_nearer_to_its_original(
    ordinary: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    out, said = made(ordinary, tmp_path / "out.gguf", **changes), list[str]()
    before, nbytes = divergence(out, ordinary), out.stat().st_size
    distill(out, ordinary, OPTIONS, report=said.append)
    assert divergence(out, ordinary) < 0.9 * before
    assert out.stat().st_size == nbytes and list(tmp_path.iterdir()) == [out]
    assert said[0].startswith("layer 1 of 2: ") and "less" in said[1]


def test_all_layers_together_come_nearer_still(ordinary: Path, tmp_path: Path) -> None:
    blocks, out = (made(ordinary, tmp_path / name) for name in ("blocks.gguf", "out.gguf"))
    said = list[str]()
    distill(blocks, ordinary, replace(OPTIONS, steps=2))
    distill(out, ordinary, replace(OPTIONS, steps=2, end_to_end=12), report=said.append)
    assert said[-2].startswith("end to end: KL divergence")
    assert divergence(out, ordinary) < 0.97 * divergence(blocks, ordinary)


def test_the_gradient_of_the_divergence_is_that_of_small_differences() -> None:
    draw = np.random.default_rng(6)
    head = Head(draw.uniform(0.5, 1.5, 8), draw.standard_normal((20, 8)), 1e-5)
    ours, theirs = draw.standard_normal((2, 5, 8))

    def divergence(rows: np.ndarray) -> float:
        wanted, found = head.odds(theirs), head.odds(rows)
        return float((wanted * np.log(wanted / found)).sum())

    gradient = head.back(ours, head.odds(ours) - head.odds(theirs))
    for at in np.ndindex(3, 8):
        step = np.zeros_like(ours)
        step[at] = 1e-5
        slope = (divergence(ours + step) - divergence(ours - step)) / 2e-5
        assert gradient[at] == pytest.approx(slope, rel=1e-4, abs=1e-6)


class _Interrupted(BaseException):
    """As a signal would end the run."""


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    ordinary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = (made(ordinary, tmp_path / name) for name in ("whole.gguf", "out.gguf"))
    options, said = replace(OPTIONS, steps=3, end_to_end=4), list[str]()
    monkeypatch.setattr(distill_module, "CHECKPOINT_STEPS", 2)
    distill(whole, ordinary, options)
    untouched = out.read_bytes()

    for place in (3, 12):  # a layer, and three steps of both together

        def stop(done: int, total: int, place: int = place) -> None:
            assert total == 14
            if done == place:
                raise _Interrupted

        with pytest.raises(_Interrupted):
            distill(out, ordinary, options, progress=stop)
        assert out.read_bytes() == untouched
    distill(out, ordinary, options, report=said.append)
    assert said[0] == "going on with step 3 of 4"
    assert out.read_bytes() == whole.read_bytes() != untouched


def test_what_is_read_is_written_as_it_was(ordinary: Path, tmp_path: Path) -> None:
    out = made(ordinary, tmp_path / "out.gguf", planes=3)
    header, model = read_header(out), Source(ordinary, "m", "int8").model
    file = TernaryFile(header, model)
    changed: dict[str, np.ndarray] = {}
    for layer in range(model.layers):
        for name in model.matrices():
            matrix = file.matrix(layer, name)
            changed |= file.packed(layer, name, matrix.codes, matrix.scales)
        changed |= {f"blk.{layer}.{name}.weight": file.vector(layer, name) for name in model.norms()}
    file.write(tmp_path / "again.gguf", changed.items())
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def test_what_cannot_be_trained_is_refused_by_name(ordinary: Path, tmp_path: Path) -> None:
    rows = made(ordinary, tmp_path / "rows.gguf", span=0)
    with pytest.raises(UnsupportedModel, match=r"m\.gguf is not ternary"):
        distill(ordinary, ordinary, OPTIONS)
    with pytest.raises(UnsupportedModel, match=r"rows\.gguf has one scale for a whole row"):
        distill(rows, ordinary, OPTIONS)
    rotated = made(ordinary, tmp_path / "rotated.gguf", rotate=True)
    with pytest.raises(UnsupportedModel, match=r"rotated\.gguf is in a rotated basis"):
        distill(rotated, ordinary, OPTIONS)
    out = made(ordinary, tmp_path / "out.gguf")
    other = make_ordinary(tmp_path / "other.gguf", layers=3)
    with pytest.raises(BadModelFile, match=r"out\.gguf was not made from that model: blk\.2"):
        distill(out, other, OPTIONS)
    with pytest.raises(BadRequest, match=r"The text has .* with --text"):
        distill(out, ordinary, replace(OPTIONS, text="three words only"))
    with pytest.raises(DoesNotFit, match="allow more with --memory"):
        distill(out, ordinary, replace(OPTIONS, memory_bytes=1000))
    names = {"rows.gguf", "rotated.gguf", "out.gguf", "other.gguf"}
    assert {path.name for path in tmp_path.iterdir()} == names
