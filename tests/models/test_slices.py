"""Slices as files: every layer once and unchanged, everything that depends on its position rewritten."""

import errno
import hashlib
import os
import subprocess
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.errors import BadModelFile, BadRequest, StorageFailed, UnsupportedModel
from cordee.models import slices
from cordee.models.architectures import architecture, roster
from cordee.models.gguf import Array, Header, Tensor, read_header
from cordee.models.slices import cut, even_cuts, plan_slice
from tiny import ARCHITECTURES, make_tiny

LAYERS = 9
IN_STEPS = {"smollm3": [0, 4, 8, 9], "smallthinker": [0, 8, 17]}  # the rest may be cut anywhere


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Reads tiny models, each made once."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def read(name: str, layers: int = LAYERS) -> Header:
        if (name, layers) not in made:
            path = make_tiny(name, folder / f"{name}-{layers}.gguf", layers=layers, tokenizer="bytes")
            made[name, layers] = read_header(path)
        return made[name, layers]

    return read


def content(tensor: Tensor) -> bytes:
    with tensor.path.open("rb") as file:
        return os.pread(file.fileno(), tensor.nbytes, tensor.offset)


def may_cut(header: Header, first: int, last: int) -> bool:
    try:
        plan_slice(header, first, last)
    except UnsupportedModel:
        return False
    return True


def edited(header: Header, path: Path, **metadata: int) -> Header:
    """The same model with further or other uint32 metadata; '__' stands for '.', after the prefix."""
    source, writer = gguf.GGUFReader(header.path), GGUFWriter(path, header.architecture)
    own = {f"{header.architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    for key, value in own.items():
        writer.add_uint32(key, value)
    for key, value in header.metadata.items():
        if key in own or key == "general.architecture":
            continue
        kind = header.types[key]
        item_kind = value.type if isinstance(value, Array) else None
        writer.add_key_value(key, header.get(key), kind, sub_type=item_kind)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


# --- what a slice holds -----------------------------------------------------------------------------


def check_slice(source: Header, first: int, last: int, path: Path) -> None:
    made = cut(source, first, last, path)
    data = path.read_bytes()
    assert made.nbytes == len(data) == plan_slice(source, first, last).nbytes
    assert made.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    header, is_last = read_header(path), last == source.layers
    assert header.architecture == source.architecture
    assert (header.layers, header.extra_layers) == (last - first, 0)
    for tensor in header.tensors:
        if tensor.name.startswith("blk."):
            _, layer, name = tensor.name.split(".", 2)
            origin = source.tensor(f"blk.{int(layer) + first}.{name}")
        elif tensor.name in slices.HEAD | {slices.EMBEDDING}:
            continue
        else:
            origin = source.tensor(tensor.name)
        assert (tensor.shape, tensor.type) == (origin.shape, origin.type)
        assert content(tensor) == content(origin)
    wanted = [t for t in source.tensors if t.name.split(".")[1] in map(str, range(first, last))]
    assert len(wanted) == sum(t.name.startswith("blk.") for t in header.tensors)
    check_ends(source, header, is_last)


def check_ends(source: Header, header: Header, is_last: bool) -> None:
    """The vocabulary and the head are in the last slice and nowhere else."""
    embedding = header.tensor(slices.EMBEDDING)
    assert (header.get("tokenizer.ggml.tokens") is not None) is is_last
    assert (header.get("tokenizer.ggml.model") == "none") is not is_last
    assert header.tied is source.tied
    for name in sorted(slices.HEAD):
        tensor, origin = header.tensor(name), source.tensor(name)
        if origin is None:
            assert tensor is None
        elif is_last:
            assert content(tensor) == content(origin)
        else:
            assert tensor.shape == (*origin.shape[:-1], header.get(".vocab_size"))
    if is_last and source.tied:
        assert content(embedding) == content(source.tensor(slices.EMBEDDING))
    else:
        assert not any(content(embedding))
        assert embedding.nbytes <= source.tensor(slices.EMBEDDING).nbytes
        rows = source.get(".vocab_size") if is_last else header.get(".vocab_size")
        assert embedding.shape == (source.get(".embedding_length"), rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slices_hold_every_layer_once_and_unchanged(tiny, tmp_path, name):
    boundaries = IN_STEPS.get(name, [0, 2, 5, LAYERS])
    source = tiny(name, boundaries[-1])
    for first, last in pairwise(boundaries):
        check_slice(source, first, last, tmp_path / "slice.gguf")


@given(data=st.data())
@settings(max_examples=40)
def test_any_range_of_layers_is_a_slice(tiny, tmp_path_factory, data):
    source = tiny(data.draw(st.sampled_from(["gpt-oss", "apertus", "deepseek2", "gemma4", "phi2"])))
    first = data.draw(st.integers(0, source.layers - 1))
    last = data.draw(st.integers(first + 1, source.layers))
    if (first, last) == (0, source.layers) or not may_cut(source, first, last):
        return
    check_slice(source, first, last, tmp_path_factory.mktemp("range") / "slice.gguf")


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("gpt-oss", lambda layer: layer % 2 == 1),
        ("gemma3", lambda layer: layer % 6 == 5),
        ("olmo2", lambda layer: layer % 4 == 3),
        ("gemma4", lambda layer: layer % 5 in (1, 3)),
    ],
)
def test_the_window_pattern_does_not_restart_at_a_cut(tiny, tmp_path, name, dense):
    for first, last in pairwise([0, 2, 5, LAYERS]):
        cut(tiny(name), first, last, tmp_path / "slice.gguf")
        pattern = read_header(tmp_path / "slice.gguf").get(".attention.sliding_window_pattern")
        assert pattern == [not dense(layer) for layer in range(first, last)]


def test_a_dense_first_pattern_and_a_period_from_the_file(tiny, tmp_path):
    source = tiny("smallthinker", 17)
    cut(source, 8, 17, tmp_path / "slice.gguf")
    pattern = read_header(tmp_path / "slice.gguf").get(".attention.sliding_window_pattern")
    assert pattern == [layer % 4 != 0 for layer in range(8, 17)]
    source = edited(tiny("gpt-oss"), tmp_path / "edited.gguf", attention__sliding_window_pattern=3)
    cut(source, 1, 6, tmp_path / "slice.gguf")
    pattern = read_header(tmp_path / "slice.gguf").get(".attention.sliding_window_pattern")
    assert pattern == [layer % 3 != 2 for layer in range(1, 6)]


def test_arrays_by_layer_are_cut_and_others_are_not(tiny, tmp_path):
    source = tiny("apertus")
    cut(source, 3, 5, tmp_path / "slice.gguf")
    header = read_header(tmp_path / "slice.gguf")
    for key in slices.PER_LAYER_UNPREFIXED:
        assert header.get(key) == source.get(key)[3:5]
    cut(source, 5, LAYERS, tmp_path / "slice.gguf")
    header = read_header(tmp_path / "slice.gguf")
    assert header.get("tokenizer.ggml.tokens") == source.get("tokenizer.ggml.tokens")


def test_leading_dense_layers_are_counted_from_the_slices_own_start(tiny, tmp_path):
    source = tiny("deepseek2")
    assert source.get(".leading_dense_block_count") == 3
    for first, last, expected in [(0, 2, 2), (0, 5, 3), (2, 5, 1), (3, 6, 0), (5, LAYERS, 0)]:
        cut(source, first, last, tmp_path / "slice.gguf")
        assert read_header(tmp_path / "slice.gguf").get(".leading_dense_block_count") == expected


def test_a_slice_says_where_it_comes_from(tiny, tmp_path):
    cut(tiny("llama"), 2, 5, tmp_path / "slice.gguf")
    header = read_header(tmp_path / "slice.gguf")
    assert [header.get(f"cordee.slice.{name}") for name in ("first", "last", "layers")] == [2, 5, LAYERS]


def test_prediction_layers_are_left_out(tiny, tmp_path):
    source = tiny("exaone4")
    assert (source.layers, source.extra_layers) == (LAYERS, 1)
    cut(source, 5, LAYERS, tmp_path / "slice.gguf")
    header = read_header(tmp_path / "slice.gguf")
    assert (header.layers, header.extra_layers) == (LAYERS - 5, 0)
    assert not any("nextn" in tensor.name for tensor in header.tensors)


def test_the_same_cut_gives_the_same_bytes(tiny, tmp_path):
    digests = {cut(tiny("qwen3"), 2, 5, tmp_path / name).digest for name in ("one.gguf", "two.gguf")}
    assert len(digests) == 1


def test_all_layers_are_the_model_itself_also_from_shards(tiny, tmp_path):
    source = tiny("exaone4")
    shards = GGUFWriter(tmp_path / "set.gguf", "exaone4", split_max_tensors=20)
    for key, value in source.metadata.items():
        if key != "general.architecture":
            item_kind = value.type if isinstance(value, Array) else None
            shards.add_key_value(key, source.get(key), source.types[key], sub_type=item_kind)
    for tensor in gguf.GGUFReader(source.path).tensors:
        shards.add_tensor(tensor.name, tensor.data)
    shards.write_header_to_file()
    shards.write_kv_data_to_file()
    shards.write_tensors_to_file()
    shards.close()
    paths = sorted(tmp_path.glob("set-*.gguf"))
    assert len(paths) > 3
    cut(read_header(paths[0]), 0, LAYERS, tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == source.path.read_bytes()


# --- what cannot be cut -----------------------------------------------------------------------------


def test_the_roster_certifies_exactly_what_the_tests_can_make():
    assert {name for name, rules in roster().items() if rules.certified} == set(ARCHITECTURES)
    assert all(rules.certified or rules.refusal for rules in roster().values())
    assert architecture("never-heard-of") is None


@pytest.mark.parametrize(("name", "layers"), [("gemma3", 62), ("exaone4", 64), ("command-r", 64)])
def test_models_recognised_by_their_layer_count_stay_whole(tiny, tmp_path, name, layers):
    source = tiny(name, layers)
    with pytest.raises(UnsupportedModel, match=r"cannot be cut.*one stage"):
        cut(source, 0, 5, tmp_path / "slice.gguf", force=True)
    assert cut(source, 0, layers, tmp_path / "whole.gguf").nbytes == source.path.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_a_slice_must_not_look_like_such_a_model(tiny, tmp_path):
    source = tiny("gemma3", 70)
    with pytest.raises(UnsupportedModel, match="62 layers for another model"):
        cut(source, 0, 62, tmp_path / "slice.gguf")
    assert cut(source, 0, 61, tmp_path / "slice.gguf").last == 61


@pytest.mark.parametrize("name", ["afmoe", "baichuan", "gemma", "gemma2", "glm4", "glm4moe"])
def test_architectures_that_cannot_be_cut_are_refused_even_by_force(tiny, tmp_path, name):
    source = replace(tiny("llama"), architecture=name)
    for force in (False, True):
        with pytest.raises(UnsupportedModel, match=architecture(name).refusal):
            cut(source, 0, 5, tmp_path / "slice.gguf", force=force)


def test_an_unknown_architecture_needs_force(tiny, tmp_path):
    source = replace(tiny("mistral3"), architecture="mistral33")
    with pytest.raises(UnsupportedModel, match="nobody has checked"):
        cut(source, 0, 5, tmp_path / "slice.gguf")
    assert cut(source, 0, 5, tmp_path / "slice.gguf", force=True).nbytes > 0


def test_layers_that_come_in_steps_are_cut_between_steps(tiny, tmp_path):
    with pytest.raises(UnsupportedModel, match="multiples of 4"):
        cut(tiny("smollm3"), 0, 5, tmp_path / "slice.gguf")
    source = edited(tiny("ernie4_5-moe"), tmp_path / "edited.gguf", interleave_moe_layer_step=2)
    with pytest.raises(UnsupportedModel, match="multiples of 2"):
        cut(source, 3, 6, tmp_path / "slice.gguf")
    assert even_cuts(source, 2)[1] % 2 == 0


def test_a_slice_without_a_sliding_layer_would_abort_libllama(tiny, tmp_path):
    with pytest.raises(UnsupportedModel, match="sliding window"):
        cut(tiny("gpt-oss"), 3, 4, tmp_path / "slice.gguf")
    assert cut(tiny("gpt-oss"), 2, 3, tmp_path / "slice.gguf").nbytes > 0


@pytest.mark.parametrize(
    ("name", "metadata", "fault"),
    [
        ("gemma4", {"embedding_length_per_layer_input": 256}, "ties layers"),
        ("gemma4", {"attention__shared_kv_layers": 4}, "ties layers"),
        ("deepseek2", {"expert_gating_func": 0}, "lacks"),
        ("minicpm", {"residual_scale": 0}, "lacks"),
        ("qwen3", {"rope__dimension_sections": 8}, "M-RoPE"),
    ],
)
def test_hyperparameters_that_tie_layers_together_are_refused(tiny, tmp_path, name, metadata, fault):
    source = edited(tiny(name), tmp_path / "edited.gguf", **metadata)
    with pytest.raises(UnsupportedModel, match=fault):
        cut(source, 0, 5, tmp_path / "slice.gguf", force=True)


def test_what_may_go_by_layer_is_not_guessed(tiny, tmp_path):
    source = tiny("llama")
    array = Array(GGUFValueType.UINT32, LAYERS, source.path, 0, 4 * LAYERS)
    kinds = {**source.types, "llama.mystery": GGUFValueType.ARRAY}
    strange = replace(source, metadata={**source.metadata, "llama.mystery": array}, types=kinds)
    with pytest.raises(UnsupportedModel, match=r"llama\.mystery may or may not"):
        cut(strange, 0, 5, tmp_path / "slice.gguf")
    key = "llama.attention.head_count_kv"
    short = replace(source, metadata={**source.metadata, key: replace(array, count=3)})
    with pytest.raises(BadModelFile, match="has 3 items for 9 layers"):
        cut(short, 0, 5, tmp_path / "slice.gguf")
    tensor = replace(source.tensors[0], name="position_embd.weight")
    unplaced = replace(source, tensors=(*source.tensors, tensor))
    with pytest.raises(UnsupportedModel, match=r"position_embd\.weight"):
        cut(unplaced, 0, 5, tmp_path / "slice.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (3, 3), (5, 2), (0, LAYERS + 1)])
def test_layers_that_are_not_there(tiny, tmp_path, first, last):
    with pytest.raises(BadRequest, match="0 to 9"):
        cut(tiny("llama"), first, last, tmp_path / "slice.gguf")


# --- where to cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_even_cuts_are_cuts_that_can_be_made(tiny, name, stages):
    source = tiny(name, 17)
    if name == "smallthinker" and stages == 3:
        with pytest.raises(BadRequest, match="3 stages"):
            even_cuts(source, stages)
        return
    boundaries = even_cuts(source, stages)
    assert len(boundaries) == stages + 1
    assert (boundaries[0], boundaries[-1]) == (0, 17)
    assert all(may_cut(source, first, last) for first, last in pairwise(boundaries))


def test_even_cuts_balance_bytes_and_count_the_head(tiny, tmp_path):
    def largest(header, boundaries):
        return max(
            sum(piece.nbytes for piece in plan_slice(header, *pair).pieces) for pair in pairwise(boundaries)
        )

    source = tiny("llama", 12)
    best = min(largest(source, [0, a, b, 12]) for a in range(1, 11) for b in range(a + 1, 12))
    assert largest(source, even_cuts(source, 3)) == best
    # A head as heavy as three layers takes the place of three layers on the last stage.
    layer = sum(t.nbytes for t in source.tensors if t.name.startswith("blk.0."))
    heavy = [replace(t, nbytes=3 * layer) if t.name == slices.EMBEDDING else t for t in source.tensors]
    header = replace(source, tensors=tuple(heavy), _by_name={t.name: t for t in heavy})
    assert even_cuts(header, 3) == [0, 5, 10, 12]


@pytest.mark.parametrize("stages", [-1, 0, LAYERS + 1, 10**9])
def test_more_stages_than_layers_are_refused(tiny, stages):
    with pytest.raises(BadRequest, match="stages") as caught:
        even_cuts(tiny("llama"), stages)
    assert caught.value.param == "stages"


# --- the work of cutting ----------------------------------------------------------------------------


def test_progress_rises_to_the_total(tiny, tmp_path):
    seen: list[tuple[int, int]] = []
    made = cut(tiny("llama"), 2, 5, tmp_path / "slice.gguf", progress=lambda *now: seen.append(now))
    assert {total for _, total in seen} == {made.nbytes}
    done = [now for now, _ in seen]
    assert done == sorted(done)
    assert done[-1] == made.nbytes


@pytest.fixture
def heavy(tmp_path) -> Header:
    """A model of 96 MiB that takes no room: its weights are a hole in the file."""
    path, plain = tmp_path / "heavy.gguf", GGUFWriter(tmp_path / "heavy.gguf", "llama")
    plain.add_uint32("llama.block_count", 3)
    for layer in range(3):
        size, kind = (4096, 4096), GGMLQuantizationType.F16
        plain.add_tensor_info(f"blk.{layer}.ffn_up.weight", size, np.dtype(np.float16), 32 << 20, kind)
    plain.write_header_to_file()
    plain.write_kv_data_to_file()
    plain.write_ti_data_to_file()
    plain.close()
    os.truncate(path, path.stat().st_size + (97 << 20))
    return read_header(path)


def test_memory_does_not_depend_on_the_model(heavy, tmp_path):
    tracemalloc.start()
    made = cut(heavy, 0, 2, tmp_path / "slice.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.nbytes > 64 << 20
    assert peak < 4 * slices.COPY_BYTES


def test_a_model_that_shrinks_meanwhile_leaves_nothing(heavy, tmp_path):
    def shrink(done, total):
        if done > total // 4:
            os.truncate(heavy.path, 40 << 20)

    with pytest.raises(BadModelFile, match="shorter"):
        cut(heavy, 0, 2, tmp_path / "slice.gguf", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["heavy.gguf"]


def test_a_full_disk_leaves_nothing(heavy, tmp_path, monkeypatch):
    def full(file, data):
        if file.tell() > 8 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    monkeypatch.setattr(slices, "write_all", full)
    with pytest.raises(StorageFailed, match="free some space"):
        cut(heavy, 0, 2, tmp_path / "slice.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["heavy.gguf"]


def test_a_disk_that_is_really_full_leaves_nothing(heavy, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system of its own needs the permission to mount one")
    try:
        with pytest.raises(StorageFailed, match=str(small)):
            cut(heavy, 0, 2, small / "slice.gguf")
        assert list(small.iterdir()) == []
        assert os.statvfs(small).f_bavail * os.statvfs(small).f_bsize == 16 << 20
    finally:
        subprocess.run(["umount", str(small)], check=True)
