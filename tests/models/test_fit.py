"""The fit estimate against what libllama and a worker process really take; verdicts; containers."""

import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cordee.cluster.demand import SizeRequest, usual_context
from cordee.cluster.memory import PROCESS_BYTES, StageShape
from cordee.engine.llama.libllama import cpu_quota
from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig
from cordee.errors import BadModelFile
from cordee.machine.memory import memory
from cordee.models import fit
from cordee.models.architectures import architecture
from cordee.models.fit import Verdict, estimate, own_context, stage_shape, stage_shapes, verdict
from cordee.models.gguf import Header, read_header
from cordee.models.slices import cut, even_cuts

LOG_BYTES = 10_500  # libllama logs its buffers' sizes in hundredths of a MiB
LAYERS = 16  # every architecture that may be cut at all may be cut in two here
CONFIGS = (StageConfig(context=1024, sequences=4, batch_rows=256), StageConfig(context=300, sequences=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fit")


def taken(header: Header, first: int, last: int, config: StageConfig, folder: Path):
    """What libllama says it allocated for layers `first` to `last`."""
    path = header.path
    if (first, last) != (0, header.layers):
        path = cut(header, first, last, folder / "slice.gguf").path
    stage = LlamaStage(path, config, is_last=last == header.layers)
    description = stage.description
    stage.close()
    return description


def compare(header: Header, first: int, last: int, config: StageConfig, folder: Path, scratch=0.1) -> None:
    """Weights and KV cache are exact (a page or two of the mapped file apart), the scratch about right."""
    found, real = estimate(header, first, last, config), taken(header, first, last, config, folder)
    assert found.weights_bytes == pytest.approx(real.weights_bytes, rel=0.004, abs=LOG_BYTES)
    assert found.kv_bytes == pytest.approx(real.kv_bytes, abs=LOG_BYTES)
    assert found.scratch_bytes == pytest.approx(real.scratch_bytes, rel=scratch, abs=2 * LOG_BYTES)


def cuts(header: Header) -> list[tuple[int, int]]:
    """The whole model and, where it may be cut, two slices."""
    whole = (0, header.layers)
    if architecture(header.architecture).obstacle(header.layers):
        return [whole]
    return [whole, *pairwise(even_cuts(header, 2))]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_architecture_takes_what_the_header_says(folder, name):
    header = read_header(tiny.make_tiny(name, folder / "model.gguf", layers=LAYERS))
    for first, last in cuts(header):
        compare(header, first, last, CONFIGS[0], folder, scratch=0.15)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss", "apertus"])
@pytest.mark.parametrize("config", CONFIGS)
def test_first_middle_and_last_stages(folder, name, config):
    header = read_header(tiny.make_tiny(name, folder / "model.gguf", layers=7))
    for first, last in ((0, 3), (3, 5), (5, 7), (0, 7)):
        compare(header, first, last, config, folder)


@pytest.mark.parametrize("config", [*CONFIGS, StageConfig(context=2048, sequences=2)])
def test_the_starter_whole_and_in_stages(starter_path, folder, config):
    header = read_header(starter_path)
    for first, last in ((0, 30), (0, 11), (11, 20), (20, 30)):
        compare(header, first, last, config, folder, scratch=0.02)


# Hidden, query heads, key heads, feed-forward: shapes of real models, all divided by the same.
SHAPES = {
    "llama3-8b": ("llama", 512, 8, 2, 1792),
    "llama3.2-1b": ("llama", 256, 4, 1, 1024),
    "mistral-small": ("llama", 640, 8, 2, 4096),
    "qwen3-0.6b": ("qwen3", 128, 4, 2, 384),
    "qwen3-8b": ("qwen3", 512, 8, 2, 1536),
    "qwen2.5-7b": ("qwen2", 448, 7, 1, 2368),
    "gemma3-4b": ("gemma3", 320, 4, 2, 1280),
    "gemma3-12b": ("gemma3", 480, 8, 4, 1920),
    "apertus-8b": ("apertus", 512, 8, 2, 2688),
}


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_of_real_models(folder, monkeypatch, model):
    name, embd, heads, groups, ff = SHAPES[model]
    for key, value in {"EMBD": embd, "HEADS": heads, "HEAD": 64, "FF": ff}.items():
        monkeypatch.setattr(tiny, key, value)
    monkeypatch.setitem(tiny.RECIPES, name, replace(tiny.RECIPES[name], kv_heads=groups))
    header = read_header(tiny.make_tiny(name, folder / "model.gguf", layers=2))
    compare(header, 0, 2, StageConfig(context=512, sequences=2), folder, scratch=0.12)


def test_a_wide_vocabulary_and_few_rows(folder, monkeypatch):
    monkeypatch.setattr(tiny, "VOCAB", 50_000)
    header = read_header(tiny.make_tiny("llama", folder / "model.gguf", layers=2))
    compare(header, 0, 2, StageConfig(context=256, sequences=8, batch_rows=32), folder)


WORKER = """
    import json, sys
    import numpy as np
    import psutil
    import cordee.worker.worker
    from pathlib import Path
    from cordee.engine.llama.stage import LlamaStage
    from cordee.engine.stage import StageConfig, batch_of_one

    path, is_last, context, sequences = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), int(sys.argv[4])
    stage = LlamaStage(Path(path), StageConfig(context=context, sequences=sequences), is_last=is_last)
    embd = stage.description.n_embd
    stage.decode(batch_of_one(np.ones((context - 1, embd), np.float32)))
    stage.decode(batch_of_one(np.ones((1, embd), np.float32), context - 1))
    print(psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("name", ["starter", "llama", "qwen3", "gemma3", "gpt-oss", "apertus"])
@pytest.mark.parametrize("position", ["whole", "first", "middle", "last"])
def test_a_worker_process_takes_what_was_estimated(folder, request, name, position):
    context, sequences = 512, 4  # one batch fills a sequence; the others' cells are cleared, so they count
    if name == "starter":
        header = read_header(request.getfixturevalue("starter_path"))
    else:
        header = read_header(tiny.make_tiny(name, folder / "model.gguf"))
    bounds = even_cuts(header, 3)
    index = {"first": 0, "middle": 1, "last": 2}.get(position)
    first, last = (0, header.layers) if index is None else (bounds[index], bounds[index + 1])
    path = header.path if index is None else cut(header, first, last, folder / "slice.gguf").path
    arguments = [path, last == header.layers, context, sequences]
    command = [sys.executable, "-c", textwrap.dedent(WORKER), *map(str, arguments)]
    real = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    config = StageConfig(context=context, sequences=sequences)
    assert estimate(header, first, last, config).total_bytes == pytest.approx(real, rel=0.1)


SIZES = st.builds(
    StageConfig,
    context=st.integers(1, 40_000),
    sequences=st.integers(1, 64),
    batch_rows=st.integers(1, 2048),
)
SHAPE = StageShape(
    weights_bytes=10**9, cell_bytes=4096, masks=2, row_floats=9000, n_embd=2048, layers=12, vocabulary=32_000
)


@given(SIZES, st.sampled_from(["context", "sequences", "batch_rows"]), st.integers(1, 5000))
def test_more_of_anything_never_takes_less(sizes, what, more):
    larger = StageConfig(**{**vars(sizes), what: getattr(sizes, what) + more})
    assert SHAPE.fit(larger).total_bytes >= SHAPE.fit(sizes).total_bytes


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> Header:
    return read_header(tiny.make_tiny("qwen3", tmp_path_factory.mktemp("models") / "m.gguf"))


@given(
    memory_bytes=st.integers(0, 10**9) | st.integers(50 * 10**6, 150 * 10**6),
    context=st.none() | st.integers(16, 4096),
    sequences=st.none() | st.integers(1, 64),
    stages=st.integers(1, 3),
)
def test_what_is_advised_works_and_what_was_asked_for_is_kept(
    header, memory_bytes, context, sequences, stages
):
    found = served(header, context, sequences, memory_bytes, stages)
    assert found.fits == (found.need_bytes <= found.have_bytes)
    assert found.need_bytes == sum(stage.total_bytes for stage in found.stages)
    assert context in (None, found.demand.context)
    assert sequences in (None, found.demand.sequences)
    advised = re.search(r"`cordee serve m --context (\d+)(?: --sequences (\d+))?` fits", found.advice)
    assert not (found.fits and advised)
    if advised:
        answers = int(advised[2]) if advised[2] else sequences
        assert served(header, int(advised[1]), answers, memory_bytes, stages).fits
    elif not found.fits:
        assert found.advice.endswith("take a smaller quantization, or more machines.")
        assert not served(header, min(context or 256, 256), 1, memory_bytes, stages).fits


def served(
    header: Header, context: int | None, sequences: int | None, room: float, stages: int = 1
) -> Verdict:
    requested = SizeRequest(context, sequences, usual_context(own_context(header), sequences))
    return verdict(stage_shapes(header, stages), requested, int(room), "cordee serve m")


def test_a_verdict_says_what_to_do(header):
    need = served(header, 4096, 8, 0).need_bytes
    plenty = served(header, 4096, 8, 2 * need)
    assert (plenty.fits, plenty.have_bytes) == (True, int(2 * need * fit.USABLE))
    assert plenty.advice.startswith("It fits: it needs 0.1 GB of memory")
    short = served(header, 4096, 8, need)
    assert not short.fits
    assert "`cordee serve m --context 4096 --sequences " in short.advice
    nothing = served(header, 4096, 8, 10**6)
    assert not nothing.fits
    assert "smaller quantization, or more machines" in nothing.advice


def test_by_a_hair_the_amounts_can_be_told_apart_and_what_gives_way_is_said(header):
    need = served(header, None, None, 10**12).need_bytes
    hair = served(header, None, None, (need - 1) / fit.USABLE)
    assert hair.fits
    assert hair.demand == (4096, 3)
    assert hair.advice.endswith("Memory is short: 3 answers at a time instead of 4.")
    refused = served(header, 4096, 4, (need - 1) / fit.USABLE)
    wants, has = re.search(r"It needs ([\d.]+) GB .* and ([\d.]+) GB may be used", refused.advice).groups()
    assert float(wants) > float(has)


def test_each_stage_is_a_process_of_its_own(header):
    whole, staged = (served(header, 512, 2, 10**9, stages) for stages in (1, 3))
    assert staged.need_bytes - whole.need_bytes > 2 * PROCESS_BYTES


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "attention.key_length"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [(GGUFValueType.INT32, -1), (GGUFValueType.STRING, "many"), (GGUFValueType.FLOAT32, 1.5)],
)
def test_a_header_with_wrong_sizes_is_refused(header, key, kind, value):
    types, metadata = (
        {**old, f"qwen3.{key}": new} for old, new in ((header.types, kind), (header.metadata, value))
    )
    broken = replace(header, types=types, metadata=metadata)
    with pytest.raises(BadModelFile, match=f"qwen3.{key} is .*, not a whole number"):
        stage_shape(broken, 0, 6)


def test_a_header_without_a_size_is_refused(header):
    metadata = {key: value for key, value in header.metadata.items() if key != "qwen3.embedding_length"}
    with pytest.raises(BadModelFile, match=r"has no qwen3\.embedding_length"):
        stage_shape(replace(header, metadata=metadata), 0, 6)


def test_layers_with_other_numbers_of_heads_are_each_counted(folder):
    maker = tiny.Maker("llama", tiny.RECIPES["llama"], folder / "m.gguf", 4, 0)
    maker.metadata("none")
    maker.per_layer("llama.attention.head_count_kv", [1, 2, 4, 2], GGUFValueType.UINT32)
    header = _written(maker, folder / "m.gguf")
    cells = [stage_shape(header, layer, layer + 1).cell_bytes for layer in range(4)]
    assert cells == [heads * 2 * tiny.HEAD * 2 for heads in (1, 2, 4, 2)]


def _written(maker: tiny.Maker, path: Path) -> Header:
    maker.tensors()
    maker.writer.write_header_to_file()
    maker.writer.write_kv_data_to_file()
    maker.writer.write_tensors_to_file()
    maker.writer.close()
    return read_header(path)


MIB = 2**20


def group(root: Path, path: str, **files: int | str) -> None:
    """A control group's folder."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def member(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(text)


def test_without_control_groups_the_memory_is_the_machines(tmp_path):
    machine = memory(tmp_path)
    assert 0 < machine.available_bytes <= machine.total_bytes
    member(tmp_path, "0::/\n")
    group(tmp_path, "", memory__max="max", memory__current=5)
    assert memory(tmp_path).total_bytes == machine.total_bytes


def test_the_narrowest_group_counts_and_cache_is_free(tmp_path):
    member(tmp_path, "0::/user/app\n")
    group(tmp_path, "user", memory__max=100 * MIB, memory__current=90 * MIB, memory__stat="anon 1")
    stat = f"anon {30 * MIB}\ninactive_file {5 * MIB}\nactive_file {15 * MIB}"
    group(tmp_path, "user/app", memory__max=64 * MIB, memory__current=50 * MIB, memory__stat=stat)
    assert (memory(tmp_path).total_bytes, memory(tmp_path).available_bytes) == (64 * MIB, 10 * MIB)
    group(tmp_path, "user", memory__current=10 * MIB)
    assert memory(tmp_path).available_bytes == 34 * MIB


def test_control_groups_of_the_first_version(tmp_path):
    member(tmp_path, "9:memory:/docker/abc\n8:cpu,cpuacct:/docker/abc\n0::/\n")
    # Inside a container the path is that outside of it; only the top is there.
    files = {"memory__limit_in_bytes": 80 * MIB, "memory__usage_in_bytes": 30 * MIB}
    stat = f"total_inactive_file {5 * MIB}\ntotal_active_file {5 * MIB}"
    group(tmp_path, "memory", memory__stat=stat, **files)
    assert (memory(tmp_path).total_bytes, memory(tmp_path).available_bytes) == (80 * MIB, 60 * MIB)


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    member(tmp_path, "0::/\n")
    group(tmp_path, "", memory__max=10 * MIB, memory__current=11 * MIB)
    assert memory(tmp_path).available_bytes == 0


def test_the_narrowest_cpu_quota_counts(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    member(tmp_path, "4:cpu,cpuacct:/box\n0::/user/app\n")
    group(tmp_path, "user", cpu__max="150000 100000")
    group(tmp_path, "user/app", cpu__max="max 100000")
    assert cpu_quota(tmp_path) == 1.5
    group(tmp_path, "cpu/box", cpu__cfs_quota_us=50_000, cpu__cfs_period_us=100_000)
    assert cpu_quota(tmp_path) == 0.5
    group(tmp_path, "cpu/box", cpu__cfs_quota_us=-1)
    assert cpu_quota(tmp_path) == 1.5
