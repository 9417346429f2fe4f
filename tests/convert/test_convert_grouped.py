"""Models with a scale for each group of inputs, in their makers' formats, become files for our engine."""

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from checkpoint_files import (
    bf16,
    config_of,
    from_bf16,
    hub_name,
    vocabulary_size,
    write_safetensors,
    write_tokenizer,
)
from cordee.convert.convert import convert
from cordee.convert.ternary_file import LAYOUTS, unpack, unpack_scales, write
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage, turn
from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.blocks import decoded
from cordee.models.gguf import BlockType, Header, engine_of, read_header
from ternary_models import Weights, assert_computes
from ternary_sources import ENCODERS, grouped_weights, write_grouped, write_source

KINDS = list(BlockType)
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16}
HUB_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
PRISM = {
    "prism.hadamard.version": 1,
    "prism.hadamard.block_size": 64,
    "prism.hadamard.transform": "normalized-sylvester-walsh-hadamard",
    "prism.hadamard.axis": "input-last-dimension",
    "prism.hadamard.sign_mode": "identity",
    "prism.hadamard.gdn_v_grouped": False,
}


def payload_of(header: Header, name: str) -> np.ndarray:
    tensor = header.tensor(name)
    return np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset)


def dense_of(header: Header, name: str, rows: int, cols: int) -> np.ndarray:
    """A matrix of codes in a file of ours, as floats."""
    layout = LAYOUTS[header.get("cordee.ternary.layout")]
    columns = header.get("cordee.ternary.scale_columns")
    weights = unpack(payload_of(header, name).reshape(layout.shape(rows, cols)), layout, rows, cols)
    stored = payload_of(header, name.replace("weight", "scale")).view("<f2")
    scales = unpack_scales(stored.reshape(layout.shape(rows, cols)[0], -1, layout.group_rows), rows)
    return weights * np.repeat(scales, columns, axis=1)[:, :cols]


@pytest.mark.parametrize("layout", ("trit2", "trit5"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_weight_is_lost(kind: BlockType, layout: str, tmp_path: Path) -> None:
    weights = grouped_weights(kind)
    write_grouped(tmp_path / "source.gguf", weights, kind)
    source = read_header(tmp_path / "source.gguf")
    assert {tensor.type for tensor in source.tensors if len(tensor.shape) == 2} == {kind}
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf", layout=layout)
    assert (model.scale_columns, model.embedding, model.head) == (kind.block, "codes", layout)
    ours = read_header(tmp_path / "ours.gguf")
    for name, array in weights.arrays.items():
        if array.ndim == 2:
            assert (dense_of(ours, name, *array.shape) == weights.floats(name)).all(), name
    assert engine_of(ours) == "ternary"
    assert_computes(tmp_path / "ours.gguf", weights)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    weights = grouped_weights(BlockType.PTQ1_0, tied=True)
    write_grouped(tmp_path / "source.gguf", weights, BlockType.PTQ1_0)
    assert convert(tmp_path / "source.gguf", tmp_path / "ours.gguf", layout="trit5").tied
    assert read_header(tmp_path / "ours.gguf").tied
    assert_computes(tmp_path / "ours.gguf", weights)


def plain(stored: bytes, kind: BlockType) -> list[float]:
    """One block, weight by weight, as the page says where each of them lies."""
    if kind is BlockType.PTQ1_0:
        [scale] = np.frombuffer(stored[26:], "<f2")
        places = [(0, m, n, m + 16 * n) for m in range(16) for n in range(5)]
        places += [(16, m, n, 80 + m + 8 * n) for m in range(8) for n in range(5)]
        places += [(24, m, n, 120 + m + 2 * n) for m in range(2) for n in range(4)]
        found = [0.0] * 128
        for first, m, n, at in places:
            value = stored[first + m] * 243 // 256  # of ceil(v * 256 / 243)
            found[at] = float(scale) * (value // 3 ** (4 - n) % 3 - 1)
        return found
    [scale] = np.frombuffer(stored[:2], "<f2")
    if kind is BlockType.Q1_0:
        return [float(scale) * (1 if stored[2 + j // 8] >> j % 8 & 1 else -1) for j in range(128)]
    return [float(scale) * ((stored[2 + j // 4] >> 2 * (j % 4) & 3) - 1) for j in range(kind.block)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_the_page_says(kind: BlockType) -> None:
    draw = np.random.default_rng(kind)
    codes = draw.integers(0, 4 if ENCODERS[kind].__name__ == "q2_0" else 3, (40, kind.block))
    if kind is BlockType.Q1_0:
        codes = codes // 2 * 2
    stored = ENCODERS[kind](codes, draw.random(40))
    assert stored.shape == (40, kind.block_bytes)
    found = decoded(stored.reshape(10, -1), kind).reshape(40, -1)
    assert (found == [plain(block.tobytes(), kind) for block in stored]).all()
    assert (np.sign(found) == np.sign(codes - 1)).all(), "the test's own encoder agrees"


@pytest.mark.parametrize("kind", (BlockType.Q1_0, BlockType.Q2_0), ids=lambda kind: kind.name)
def test_blocks_are_decoded_as_by_ggml(kind: BlockType) -> None:
    draw = np.random.default_rng(1)
    stored = draw.integers(0, 256, (50, kind.block_bytes), dtype=np.uint8)
    stored[:, :2] = draw.random(50).astype("<f2")[:, None].view(np.uint8)
    [library] = Path(llama_cpp.__file__).with_name("lib").glob("libggml-base.so")
    expected = np.empty((50, kind.block), dtype=np.float32)
    dequantize = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{kind.name.lower()}")
    dequantize.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    dequantize(stored.ctypes.data, expected.ctypes.data, expected.size)
    assert (decoded(stored, kind) == expected).all()


@pytest.mark.parametrize("kind", (BlockType.Q2_0, BlockType.PQ2_0, BlockType.Q2_0_OF_128))
def test_a_code_beside_the_three_is_refused_by_name(kind: BlockType, tmp_path: Path) -> None:
    """Files of Bonsai 2 are said to have it in 0.9 % of their weights; AVX2's sums of 16 bits could wrap."""
    weights = grouped_weights(kind)
    weights.arrays["blk.1.ffn_up.weight"][9, 70] = 2
    write_grouped(tmp_path / "source.gguf", weights, kind)
    fault = rf"blk\.1\.ffn_up\.weight is not ternary: row 9 holds .* {kind.block} col"
    with pytest.raises(UnsupportedModel, match=fault):
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()


@pytest.mark.parametrize("kind", (GGMLQuantizationType.TQ2_0, GGMLQuantizationType.F16), ids=("TQ2_0", "F16"))
def test_groups_are_found_in_other_types_too(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    columns = 256 if kind is GGMLQuantizationType.TQ2_0 else 128
    changes = {"n_embd": 512, "n_ff": 768, "head_dim": 128, "scale_columns": columns}
    weights = grouped_weights(BlockType.PQ2_0, **changes)
    dense = {name: weights.floats(name) for name in ("token_embd.weight", "output.weight")}
    weights.arrays |= dense
    write_source(tmp_path / "source.gguf", weights, kind, keys={"qwen3.attention.key_length": 128})
    model = convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert (model.scale_columns, model.embedding) == (columns, "codes")
    ours = read_header(tmp_path / "ours.gguf")
    for layer in range(model.layers):
        for name, (rows, cols) in model.matrices().items():
            full = f"blk.{layer}.{name}.weight"
            assert (dense_of(ours, full, rows, cols) == weights.floats(full)).all()
    for name, expected in dense.items():
        assert (dense_of(ours, name, *expected.shape) == expected).all()


def test_the_header_tells_old_blocks_from_new_ones(tmp_path: Path) -> None:
    for kind in (BlockType.Q2_0, BlockType.Q2_0_OF_128):
        path = tmp_path / f"{kind.name}.gguf"
        write_grouped(path, grouped_weights(kind), kind)
        header = read_header(path)
        assert header.tensor("blk.0.attn_q.weight").type is kind
        assert read_header(path, weights=False).tensors == header.tensors
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadModelFile, match="cut short"):
        read_header(path)
    new = tmp_path / "Q2_0.gguf"
    new.write_bytes(new.read_bytes()[:-100])
    with pytest.raises(BadModelFile, match="cut short"):
        read_header(new)


@pytest.mark.parametrize("kind", (BlockType.PQ2_0, BlockType.PTQ1_0, BlockType.Q2_0_OF_128))
def test_what_no_engine_runs_as_it_is_says_what_to_do(kind: BlockType, tmp_path: Path) -> None:
    write_grouped(tmp_path / "source.gguf", grouped_weights(kind), kind)
    with pytest.raises(UnsupportedModel, match=r"Q.*1?_0.*`cordee pull` converts it"):
        engine_of(read_header(tmp_path / "source.gguf"))


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of rows of logits."""
    shares = [np.exp(rows - rows.max(axis=1, keepdims=True)).astype(float) for rows in (expected, found)]
    left, right = (share / share.sum(axis=1, keepdims=True) for share in shares)
    return (left * np.log(left / right)).sum(axis=1).mean()


def test_one_plane_of_activations_costs_as_little_as_libllamas_rounding(tmp_path: Path) -> None:
    """Against three planes, which round nothing away; native/FORMAT.md states the figures."""
    weights = grouped_weights(BlockType.Q2_0, head_dim=128, n_embd=1024, n_ff=3072, heads=8, layers=3)
    weights.scales("output.weight")[:] *= 0.125  # logits that are spread like a trained model's
    draw = np.random.default_rng(0)
    for name, array in weights.arrays.items():  # a few channels are far larger than the rest there
        if name.endswith(("attn_norm.weight", "ffn_norm.weight")):
            array[draw.choice(len(array), 8, replace=False)] *= 30
    config = StageConfig(context=128, sequences=1, batch_rows=64, threads=1)
    batches = [batch_of_one(np.arange(10, 40)), *(batch_of_one([i], i) for i in range(30, 90))]
    found = {}
    for planes in (3, 2, 1):
        weights.model = replace(weights.model, planes=planes, head_planes=planes)
        write(tmp_path / "ours.gguf", weights.model, weights)
        stage = TernaryStage(tmp_path / "ours.gguf", config)
        found[planes] = np.concatenate([stage.decode(batch) for batch in batches])
        stage.close()
    write_grouped(tmp_path / "source.gguf", weights, BlockType.Q2_0)
    theirs = LlamaStage(tmp_path / "source.gguf", config)
    rounded = divergence(found[3], np.concatenate([theirs.decode(batch) for batch in batches]))
    theirs.close()
    assert 0 < divergence(found[3], found[2]) < 0.01 * rounded
    assert divergence(found[3], found[1]) < 2.5 * rounded


@pytest.mark.parametrize("stretch", [{}, {"rope_scaling": {"rope_type": "yarn"} | HUB_YARN}])
def test_a_checkpoint_of_the_hub_keeps_its_groups(stretch: dict[str, object], tmp_path: Path) -> None:
    """In bfloat16, as the unpacked editions are. YaRN becomes what it is in the same model's GGUF."""
    weights = grouped_weights(BlockType.PQ2_0, n_vocab=vocabulary_size())
    for name, array in weights.arrays.items():
        if array.ndim == 2:
            weights.scales(name)[:] = from_bf16(bf16(weights.scales(name)))
        else:
            array[:] = from_bf16(bf16(array))
    folder = tmp_path / "hub"
    folder.mkdir()
    config = config_of(weights.model, "floats") | {"architectures": ["Qwen3ForCausalLM"]} | stretch
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {hub_name(name): ("BF16", bf16(weights.floats(name))) for name in weights.arrays}
    write_safetensors(folder / "model.safetensors", tensors)
    write_tokenizer(folder)
    model = convert(folder, tmp_path / "ours.gguf")
    assert (model.scale_columns, model.embedding, model.planes) == (128, "codes", 1)
    ours = read_header(tmp_path / "ours.gguf")
    for name, array in weights.arrays.items():
        if array.ndim == 2:
            assert (dense_of(ours, name, *array.shape) == weights.floats(name)).all(), name
    if not stretch:
        assert_computes(tmp_path / "ours.gguf", weights)
        return
    keys = {f"qwen3.rope.scaling.{key}": value for key, value in YARN.items()}
    write_grouped(tmp_path / "source.gguf", weights, BlockType.PQ2_0, keys=keys)
    convert(tmp_path / "source.gguf", tmp_path / "other.gguf")
    other = read_header(tmp_path / "other.gguf")
    for name in ("rope_freqs.weight", "blk.1.attn_q_norm.weight", "blk.0.attn_k_norm.weight"):
        assert (payload_of(ours, name) == payload_of(other, name)).all()
    assert np.ptp(payload_of(ours, "rope_freqs.weight").view("<f4")) == 3


# ---- The rotation ----


def rotated_names(weights: Weights) -> list[str]:
    names = [
        f"blk.{i}.{name}.weight" for i in range(weights.model.layers) for name in weights.model.matrices()
    ]
    return [*names, "output.weight"]


def write_rotated(path: Path, weights: Weights, **changes: object) -> None:
    keys = PRISM | {
        "prism.hadamard.weight_names": rotated_names(weights),
        "prism.hadamard.inverse_weight_names": ["token_embd.weight"],
    }
    given = {f"prism.hadamard.{key}": value for key, value in changes.items()}
    write_grouped(
        path, weights, BlockType.PQ2_0, keys={k: v for k, v in (keys | given).items() if v is not None}
    )


def rotated_weights() -> Weights:
    rotated = ("attn", "attn_output", "ffn", "ffn_down", "head", "embedding")
    return grouped_weights(BlockType.PQ2_0, rotation_block=64, rotated=rotated)


def test_a_model_in_a_rotated_basis_computes_what_it_should(tmp_path: Path) -> None:
    """One vector of signs for each width, and none at all: `identity`."""
    weights = rotated_weights()
    widths, signs = [256, 384], {}
    for width, name in zip(widths, ("attn", "ffn_down"), strict=True):
        signs[width] = weights.arrays[f"rotation_{name}.signs"]
    for name, length in weights.model.rotations().items():
        weights.arrays[name] = signs[length]
    values = np.concatenate([signs[width] for width in widths]).astype(int).tolist()
    write_rotated(
        tmp_path / "source.gguf", weights, sign_mode="explicit", sign_widths=widths, sign_values=values
    )
    with pytest.raises(UnsupportedModel, match="rotated basis"):
        engine_of(read_header(tmp_path / "source.gguf"))
    convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert_computes(tmp_path / "ours.gguf", weights)
    for name, length in weights.model.rotations().items():
        weights.arrays[name] = np.ones(length, dtype=np.float32)
    write_rotated(tmp_path / "source.gguf", weights)
    convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert_computes(tmp_path / "ours.gguf", weights)


def test_a_rotated_model_is_the_plain_one(tmp_path: Path) -> None:
    """Rows of a matrix that are turned into the basis meet turned activations: the same product."""
    draw = np.random.default_rng(2)
    matrix, x = draw.standard_normal((5, 256)).astype("f4"), draw.standard_normal((3, 256)).astype("f4")
    signs = draw.choice(np.array([-1, 1], dtype="f4"), 256)
    product = turn(x, signs, 64) @ turn(matrix, signs, 64).T
    np.testing.assert_allclose(product, x @ matrix.T, atol=1e-4)
    assert np.abs(turn(x, signs, 64) @ matrix.T - product).max() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"prism\.hadamard\.version is 2; 1 is known"),
        ({"transform": "haar"}, r"prism\.hadamard\.transform is 'haar'"),
        ({"axis": "output"}, r"prism\.hadamard\.axis is 'output'"),
        ({"sign_mode": "random"}, r"prism\.hadamard\.sign_mode is 'random'"),
        ({"gdn_v_grouped": True}, r"prism\.hadamard\.gdn_v_grouped is True"),
        ({"blocks": 3}, r"has prism\.hadamard\.blocks, which this program does not know"),
        ({"block_size": 48}, "rotates blocks of 48"),
        ({"version": None}, r"has no prism\.hadamard\.version"),
        ({"block_size": 512}, "rotates rows of 256 in blocks of 512"),
        ({"sign_mode": "explicit", "sign_widths": [256], "sign_values": [1] * 255}, "sign_values are not 1"),
        ({"sign_mode": "explicit", "sign_widths": [256], "sign_values": [1] * 256}, "has no signs"),
        ({"weight_names": ["blk.0.attn_q.weight"]}, r"but not blk\.0\.attn_k\.weight"),
        (
            {"weight_names": ["blk.0.ssm_out.weight"]},
            r"rotates for blk\.0\.ssm_out\.weight",
        ),
        ({"inverse_weight_names": ["output.weight"]}, r"rotates back behind output\.weight"),
    ],
)
def test_what_is_unknown_of_a_rotation_is_refused_by_name(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_rotated(tmp_path / "source.gguf", rotated_weights(), **changes)
    with pytest.raises((UnsupportedModel, BadModelFile), match=message):
        convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    assert not (tmp_path / "ours.gguf").exists()


@pytest.mark.parametrize(
    "scaling",
    [{}, YARN, YARN | {"original_context_length": 4096, "attn_factor": 0.7, "yarn_beta_fast": 20.0}],
    ids=("plain", "yarn", "yarn-slow"),
)
def test_libllama_computes_what_a_converted_model_does(scaling: dict[str, object], tmp_path: Path) -> None:
    """Qwen3 by its own implementation, in Q2_0, which it knows: a reference that shares nothing with ours."""
    weights = grouped_weights(BlockType.Q2_0, head_dim=128, rope_base=500.0)
    keys = {f"qwen3.rope.scaling.{key}": value for key, value in scaling.items()}
    write_grouped(tmp_path / "source.gguf", weights, BlockType.Q2_0, keys=keys)
    convert(tmp_path / "source.gguf", tmp_path / "ours.gguf")
    config = StageConfig(context=64, sequences=1, batch_rows=64, threads=1)
    batches = [batch_of_one(np.arange(10, 40)), *(batch_of_one([i], i) for i in range(30, 50))]
    logits = []
    for engine, name in ((TernaryStage, "ours"), (LlamaStage, "source")):
        stage = engine(tmp_path / f"{name}.gguf", config)
        logits.append(np.concatenate([stage.decode(batch) for batch in batches]))
        stage.close()
    ours, theirs = logits
    assert np.abs(ours - theirs).max() < 0.2 * theirs.std()
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.9
