"""Every kernel gives the bits of the scalar one, which gives the exact dot; packing loses nothing."""

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

from cordee.convert.ternary_file import LAYOUTS, Layout, pack, pack_scales, rounded, unpack, unpack_scales
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage, kernels, library, turn
from cordee.errors import StageFailed
from cordee.models.codes import turned_back
from cordee.models.gguf import read_header
from ternary_models import FAMILIES, make_ternary

LAYOUT_LIST = list(LAYOUTS.values())


def dots(name: str, layout: Layout, weights: np.ndarray, x: np.ndarray, shift: int = 0) -> np.ndarray:
    """(n, rows) dots of packed weights with x (n, cols); the payload starts `shift` bytes off alignment."""
    payload = pack(weights, layout)
    groups, quads, _ = payload.shape
    padded = np.zeros((len(x), quads * 4), dtype=np.int8)
    padded[:, : x.shape[1]] = x
    moved = np.empty(payload.nbytes + shift, dtype=np.uint8)
    moved[shift:] = payload.reshape(-1)
    out = np.empty((len(x), groups * layout.group_rows), dtype=np.int32)
    status = library().ternary_kernels_dot(
        *(name.encode(), layout.name.encode(), moved.ctypes.data + shift, groups, quads),
        *(padded.ctypes.data, len(x), out.ctypes.data, None),
    )
    assert status == 0
    return out[:, : len(weights)]


def exact(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ weights.astype(np.int64).T


def test_the_truth_is_always_there() -> None:
    assert kernels()[-1] == "scalar"
    assert len(set(kernels())) == len(kernels())


@pytest.mark.parametrize("layout", LAYOUT_LIST, ids=LAYOUTS)
def test_packing_loses_nothing(layout: Layout) -> None:
    draw = np.random.default_rng(2)
    for rows, cols in ((1, 1), (layout.group_rows, 16), (3 * layout.group_rows - 1, 77)):
        weights = draw.integers(-layout.zero, layout.largest + 1, (rows, cols)).astype(np.int8)
        assert (unpack(pack(weights, layout), layout, rows, cols) == weights).all()
    assert len(np.unique(weights)) == layout.zero + layout.largest + 1, "every weight was tried"


@pytest.mark.parametrize("layout", [LAYOUTS["trit2"], LAYOUTS["trit5"]], ids=["trit2", "trit5"])
def test_scales_of_spans_lie_beside_their_rows(layout: Layout) -> None:
    rows, spans = 3 * layout.group_rows - 7, 5
    scales = np.random.default_rng(6).random((rows, spans)).astype(np.float16)
    packed = pack_scales(scales, layout)
    assert packed.shape == (3, spans, layout.group_rows)
    for row, span in ((0, 0), (layout.group_rows + 2, 3), (rows - 1, 4)):
        assert packed[row // layout.group_rows, span, row % layout.group_rows] == scales[row, span]
    assert (packed[2, :, -7:] == 0).all()
    assert (unpack_scales(packed, rows) == scales).all()


def test_five_weights_a_byte_with_scales_of_128_are_at_most_1_73_bits_a_weight(tmp_path: Path) -> None:
    """All of a matrix, as it lies in a file; its rows fill groups."""
    changes = {"n_embd": 640, "n_ff": 1280, "heads": 5, "kv_heads": 5, "head_dim": 128, "scale_columns": 128}
    make_ternary("bonsai-tied", tmp_path / "model.gguf", layers=1, n_vocab=640, **changes)
    header = read_header(tmp_path / "model.gguf")
    weights = 4 * 640 * 640 + 3 * 640 * 1280 + 640 * 640
    nbytes = sum(tensor.nbytes for tensor in header.tensors if "norm" not in tensor.name)
    assert 1.72 < 8 * nbytes / weights <= 1.73


@pytest.mark.parametrize("block", (16, 32, 1024))
def test_rows_are_turned_as_the_definition_says(block: int) -> None:
    draw = np.random.default_rng(block)
    rows = draw.standard_normal((3, 2 * block)).astype(np.float32)
    signs = draw.choice(np.array([-1, 1], dtype=np.float32), 2 * block)
    matrix = np.ones((1, 1))
    while len(matrix) < block:  # Sylvester's construction
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    expected = ((rows * signs).reshape(-1, block) @ matrix / np.sqrt(block)).reshape(rows.shape)
    turned = turn(rows, signs, block)
    np.testing.assert_allclose(turned, expected, atol=1e-5)
    np.testing.assert_allclose(turn(turned, signs, block, back=True), rows, atol=1e-5)
    assert turned_back(turned, signs, block).tobytes() == turn(turned, signs, block, back=True).tobytes()
    with pytest.raises(StageFailed, match="no blocks of"):
        turn(rows[:, 1:], signs[1:], block)


@pytest.mark.parametrize("layout", LAYOUT_LIST, ids=LAYOUTS)
@pytest.mark.parametrize("name", kernels())
def test_dots_of_random_rows_are_exact(name: str, layout: Layout) -> None:
    draw = np.random.default_rng(3)
    sizes = itertools.product((1, 5 * layout.group_rows + 3, 9 * layout.group_rows), (1, 60, 333))
    for (rows, cols), count in zip(sizes, itertools.cycle((1, 2, 3, 4, 5, 6, 7, 23)), strict=False):
        weights = draw.integers(-layout.zero, layout.largest + 1, (rows, cols)).astype(np.int8)
        x = draw.integers(-127, 128, (count, cols)).astype(np.int8)
        found = dots(name, layout, weights, x, shift=count % 3)
        assert (found == exact(weights, x)).all(), (rows, cols, count)
    assert len(np.unique(found)) > 100, "the last inputs vary"


@pytest.mark.parametrize("layout", LAYOUT_LIST, ids=LAYOUTS)
@pytest.mark.parametrize("name", kernels())
def test_dots_of_extreme_rows_are_exact(name: str, layout: Layout) -> None:
    """What wraps in 16 bits, or nearly in 32: the longest rows, everything at its largest."""
    cols = 32_768
    ends = np.array([-layout.zero, layout.largest], dtype=np.int8)
    alternating = np.resize(ends, cols)
    weights = np.stack([np.full(cols, ends[0]), np.full(cols, ends[1]), alternating, np.roll(alternating, 1)])
    signs = np.resize(np.array([127, -127], dtype=np.int8), cols)
    x = np.stack([np.full(cols, 127, dtype=np.int8), np.full(cols, -127, dtype=np.int8), signs])
    x = np.tile(x, (6, 1))  # as many as a prompt: kernels treat those in another way
    expected = exact(weights, x)
    assert (dots(name, layout, weights, x) == expected).all()
    assert np.abs(expected).max() >= 127 * cols and len(np.unique(expected)) >= 3


@pytest.mark.parametrize("kv_cache", ("f16", "int8"))
@pytest.mark.parametrize("family", FAMILIES)
def test_all_kernels_give_the_same_logits(family: str, kv_cache: str, tmp_path: Path) -> None:
    """Norms, rotations, attention and gates too: the same bits on every instruction set."""
    make_ternary(family, tmp_path / "model.gguf")
    found = {}
    for name in kernels():
        stage = TernaryStage(
            tmp_path / "model.gguf",
            StageConfig(context=80, sequences=1, batch_rows=64, threads=1, kv_cache=kv_cache),
            kernels=name,
        )
        prefill = stage.decode(batch_of_one(np.arange(3, 53)))
        found[name] = [prefill, *(stage.decode(batch_of_one([9 + i], 50 + i)) for i in range(16))]
        stage.close()
    logits = {name: np.concatenate(rows).tobytes() for name, rows in found.items()}
    assert set(logits.values()) == {logits["scalar"]}
    assert np.ptp(found["scalar"]) > 1


@pytest.mark.parametrize("shared", (1, 2, 3, 4, 5, 9))
def test_all_kernels_attend_alike_however_many_heads_share_keys(shared: int, tmp_path: Path) -> None:
    changes = {"heads": 2 * shared, "kv_heads": 2, "head_dim": 24, "layers": 1}
    make_ternary("llama", tmp_path / "model.gguf", **changes)
    config = StageConfig(context=300, sequences=1, batch_rows=300, threads=1)
    stages = [TernaryStage(tmp_path / "model.gguf", config, kernels=name) for name in kernels()]
    logits = [stage.decode(batch_of_one(np.arange(3, 270))) for stage in stages]
    assert len({rows.tobytes() for rows in logits}) == 1
    for stage in stages:
        stage.close()


def test_rounded_weights_are_the_nearest() -> None:
    rows = np.random.default_rng(4).standard_normal((50, 64)).astype(np.float32)
    for name, layout in LAYOUTS.items():
        weights, scales = rounded(rows, layout)
        assert np.abs(weights).max() == layout.largest
        assert (np.abs(rows - weights * scales[:, None]) <= scales[:, None] * 0.5001).all(), name


def test_unknown_kernels_are_refused() -> None:
    nothing = ctypes.create_string_buffer(64)
    status = library().ternary_kernels_dot(b"mmx", b"trit2", nothing, 1, 1, nothing, 1, nothing, None)
    assert status == 3
