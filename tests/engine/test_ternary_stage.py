"""The ternary engine as a Stage: right, and the same bits alone, batched, cut, trimmed and replayed."""

import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import Batch, StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.errors import BadModelFile, StageFailed, UnsupportedModel
from cordee.models.embedding import Embedding
from cordee.models.fit import estimate
from cordee.models.gguf import read_header
from cordee.models.shape import model_shape
from cordee.models.slices import cut
from ternary_models import FAMILIES, Reference, make_ternary
from tiny import make_tiny

CONFIG = StageConfig(context=320, sequences=4, batch_rows=96, threads=2)
STEPS = 256
CACHES = ("f16", "int8")


class Cut:
    """Stages one after the other in this process, fed like a pipeline; a single stage takes tokens itself."""

    def __init__(self, path: Path, bounds: list[int], config: StageConfig = CONFIG) -> None:
        header = read_header(path)
        self.embedding = Embedding(header) if len(bounds) > 2 else None
        self.stages = []
        for first, last in itertools.pairwise(bounds):
            slice_path = path
            if self.embedding is not None:
                slice_path = cut(header, first, last, path.with_name(f"{first}-{last}.gguf")).path
            self.stages.append(TernaryStage(slice_path, config, is_last=last == bounds[-1]))

    def decode(self, batch: Batch) -> np.ndarray:
        inputs = batch.inputs if self.embedding is None else self.embedding.rows(batch.inputs)
        for stage in self.stages:
            inputs = stage.decode(Batch(inputs, batch.positions, batch.sequences, batch.outputs))
        return inputs

    def trim(self, sequence: int, length: int) -> None:
        for stage in self.stages:
            stage.trim(sequence, length)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def mixed(*rows: tuple[list[int], int, int]) -> Batch:
    """A batch of runs: (tokens, first position, sequence) each, the last row of each run an output."""
    runs = [batch_of_one(tokens, first, sequence) for tokens, first, sequence in rows]
    return Batch(
        *(
            np.concatenate([getattr(run, name) for run in runs])
            for name in ("inputs", "positions", "sequences", "outputs")
        )
    )


def greedy(model: Cut, prompt: list[int], sequence: int = 0, steps: int = STEPS) -> list[int]:
    """The tokens with which a model continues."""
    tokens = [int(model.decode(batch_of_one(prompt, 0, sequence))[0].argmax())]
    while len(tokens) < steps:
        row = model.decode(batch_of_one(tokens[-1:], len(prompt) + len(tokens) - 1, sequence))
        tokens.append(int(row[0].argmax()))
    return tokens


def prompt(seed: int, length: int, vocabulary: int = 320) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocabulary, length).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_computes_what_it_should(family: str, tmp_path: Path) -> None:
    """To a few float32 roundings, where no activation falls on the other side of a rounding to int8."""
    weights = make_ternary(family, tmp_path / "model.gguf")
    reference, header = Reference(weights), read_header(tmp_path / "model.gguf")
    hidden = reference.embed(np.array(prompt(5, 90)))
    medians = []
    for index in range(weights.model.layers):
        slice_path = cut(header, index, index + 1, tmp_path / "layer.gguf").path
        stage = TernaryStage(slice_path, CONFIG, is_last=False)
        rows, expected = stage.decode(batch_of_one(hidden)), reference.layer(index, hidden)
        stage.close()
        errors = np.abs(rows - expected).max(axis=1) / np.abs(expected - hidden).max()
        assert errors.max() < 0.05, f"layer {index}"
        medians.append(np.median(errors))
        hidden = rows
    assert min(medians) < 2e-5
    assert np.median(medians) < 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_references(family: str, tmp_path: Path) -> None:
    """Over 256 steps.

    An activation within float32's error of a rounding's edge moves logits by hundredths of their spread: a
    token may differ where the reference itself has two candidates that close to each other.
    """
    weights = make_ternary(family, tmp_path / "model.gguf")
    model = Cut(tmp_path / "model.gguf", [0, 4])
    start = prompt(6, 20)
    tokens = greedy(model, start)
    model.close()
    assert len(set(tokens)) > 20, "the text varies"
    logits = Reference(weights).logits(np.array(start + tokens[:-1]))[len(start) - 1 :]
    best = np.sort(logits, axis=1)
    decided = best[:, -1] - best[:, -2] > (0 if weights.model.planes == 3 else 0.15 * logits.std())
    assert decided.mean() > 0.5
    assert (logits.argmax(axis=1) == tokens)[decided].all()
    assert (logits.argmax(axis=1) == tokens).mean() > 0.95


@pytest.mark.parametrize(
    ("family", "kv_cache"), [*((family, "f16") for family in FAMILIES), ("bitnet-silu", "int8")]
)
def test_tokens_are_the_same_alone_batched_and_in_three_stages(
    family: str, kv_cache: str, tmp_path: Path
) -> None:
    make_ternary(family, tmp_path / "model.gguf")
    config = replace(CONFIG, kv_cache=kv_cache)
    prompts = [prompt(seed, 5 + 13 * seed) for seed in range(4)]
    alone = Cut(tmp_path / "model.gguf", [0, 4], config)
    expected = [greedy(alone, one, sequence) for sequence, one in enumerate(prompts)]
    alone.close()
    assert len({tuple(tokens) for tokens in expected}) == 4
    for bounds in ([0, 4], [0, 1, 3, 4]):
        model = Cut(tmp_path / "model.gguf", bounds, config)
        order = [2, 0, 3, 1]
        logits = model.decode(mixed(*((prompts[sequence], 0, sequence) for sequence in order)))
        tokens = {s: [int(row.argmax())] for s, row in zip(order, logits, strict=True)}
        for step in range(STEPS - 1):
            order = order[1:] + order[:1]
            runs = [(tokens[s][-1:], len(prompts[s]) + step, s) for s in order]
            for sequence, row in zip(order, model.decode(mixed(*runs)), strict=True):
                tokens[sequence].append(int(row.argmax()))
        model.close()
        assert [tokens[sequence] for sequence in range(4)] == expected, bounds


@pytest.mark.parametrize(
    ("bounds", "kv_cache"),
    (([0, 4], "f16"), ([0, 2, 4], "f16"), ([0, 1, 3, 4], "f16"), ([0, 4], "int8"), ([0, 1, 3, 4], "int8")),
)
def test_bits_do_not_depend_on_batches_threads_or_cuts(
    bounds: list[int], kv_cache: str, tmp_path: Path
) -> None:
    make_ternary("bitnet", tmp_path / "model.gguf")
    tokens = prompt(9, 120)
    found = []
    for threads, sizes in ((1, [120]), (2, [1] * 120), (3, [50, 1, 69]), (2, [119, 1])):
        model = Cut(
            tmp_path / "model.gguf",
            bounds,
            StageConfig(context=128, sequences=2, batch_rows=70, threads=threads, kv_cache=kv_cache),
        )
        model.decode(batch_of_one(prompt(1, 7), 0, 1))  # another sequence, which continues beside every chunk
        at = 0
        for number, size in enumerate(sizes):
            row = model.decode(mixed((tokens[at : at + size], at, 0), ([number % 300], 7 + number, 1)))[0]
            at += size
        model.close()
        found.append(row.tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("kv_cache", CACHES)
def test_trim_and_replay_give_the_same_bits(kv_cache: str, tmp_path: Path) -> None:
    make_ternary("llama", tmp_path / "model.gguf")
    stage = TernaryStage(tmp_path / "model.gguf", replace(CONFIG, kv_cache=kv_cache))
    tokens = prompt(2, 90)
    first = stage.decode(batch_of_one(tokens))
    other = stage.decode(batch_of_one(prompt(3, 30), 90))
    stage.trim(0, 40)
    assert stage.decode(batch_of_one(tokens[40:], 40)).tobytes() == first.tobytes()
    assert stage.decode(batch_of_one(prompt(3, 30), 90)).tobytes() == other.tobytes()
    stage.clear()
    assert stage.decode(batch_of_one(tokens)).tobytes() == first.tobytes()
    stage.close()


@pytest.mark.parametrize("kv_cache", CACHES)
def test_a_sequence_moves_to_another_stage_of_the_slice(kv_cache: str, tmp_path: Path) -> None:
    make_ternary("bitnet", tmp_path / "model.gguf")
    config = replace(CONFIG, kv_cache=kv_cache)
    left = TernaryStage(tmp_path / "model.gguf", config)
    right = TernaryStage(tmp_path / "model.gguf", replace(config, context=200, batch_rows=9, threads=1))
    left.decode(batch_of_one(prompt(4, 50), 0, 1))
    state = left.export_sequence(1)
    right.import_sequence(3, state)
    expected = left.decode(batch_of_one([7], 50, 1)).tobytes()
    assert right.decode(batch_of_one([7], 50, 3)).tobytes() == expected
    longer, other = bytearray(state), bytearray(state)
    longer[20:24] = struct.pack("<I", 51)
    other[4] = 3 - other[4]  # of the other kind of cache
    for nonsense in (b"", b"nonsense" * 10, state[:-1], state + b"0", bytes(longer), bytes(other)):
        with pytest.raises(StageFailed, match="another slice"):
            right.import_sequence(3, nonsense)
    right.trim(3, 50)
    assert right.decode(batch_of_one([7], 50, 3)).tobytes() == expected, "a refused state changes nothing"
    left.close()
    right.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_cache_halves_memory_and_costs_little(family: str, tmp_path: Path) -> None:
    """FORMAT.md states the loss; where activations are not rounded to int8 it is that of the cache alone."""
    make_ternary(family, tmp_path / "model.gguf")
    batch = batch_of_one(prompt(5, 300))
    logits, kv_bytes = [], []
    for kv_cache in CACHES:
        config = replace(CONFIG, batch_rows=300, kv_cache=kv_cache)
        stage = TernaryStage(tmp_path / "model.gguf", config)
        logits.append(stage.decode(replace(batch, outputs=np.ones(300, dtype=bool))).astype(float))
        kv_bytes.append(stage.description.kv_bytes)
        stage.close()
    assert 0.5 < kv_bytes[1] / kv_bytes[0] < 0.65
    left, right = (np.exp(rows - rows.max(axis=1, keepdims=True)) for rows in logits)
    left, right = (rows / rows.sum(axis=1, keepdims=True) for rows in (left, right))
    divergence = (left * np.log(left / right)).sum(axis=1).mean()
    assert 0 < divergence < (0.004 if family == "trilm" else 0.05)
    assert (logits[0].argmax(axis=1) == logits[1].argmax(axis=1)).mean() > 0.9


def test_a_row_has_the_same_logits_whichever_others_are_wanted(tmp_path: Path) -> None:
    """In the last layer only the rows whose logits are wanted are computed; the KV cache gets all of them."""
    make_ternary("bitnet", tmp_path / "model.gguf")
    stage = TernaryStage(tmp_path / "model.gguf", CONFIG)
    batch = mixed(*((prompt(sequence, 30), 0, sequence) for sequence in range(3)))
    following = mixed(*(([7], 30, sequence) for sequence in range(3)))
    draw = np.random.default_rng(3)
    found = []
    for wanted in (np.ones(90, bool), np.zeros(90, bool), draw.random(90) < 0.3, draw.random(90) < 0.9):
        stage.clear()
        logits = np.zeros((90, 320), np.float32)
        logits[wanted] = stage.decode(replace(batch, outputs=wanted))
        found.append((wanted, logits, stage.decode(following).tobytes()))
    stage.close()
    _, everything, after = found[0]
    assert np.ptp(everything) > 1
    for wanted, logits, behind in found:
        assert logits[wanted].tobytes() == everything[wanted].tobytes()
        assert behind == after


def test_a_cache_that_an_engine_does_not_have_is_refused(starter_path: Path, tmp_path: Path) -> None:
    make_ternary("bitnet", tmp_path / "model.gguf", layers=1)
    with pytest.raises(StageFailed, match="cache"):
        TernaryStage(tmp_path / "model.gguf", replace(CONFIG, kv_cache="f8"))
    with pytest.raises(StageFailed, match="keeps its cache as f16, not int8"):
        LlamaStage(starter_path, replace(CONFIG, kv_cache="int8"))


def test_a_refused_batch_leaves_the_sequences_as_they_were(tmp_path: Path) -> None:
    make_ternary("trilm", tmp_path / "model.gguf")
    stage = TernaryStage(
        tmp_path / "model.gguf", StageConfig(context=64, sequences=2, batch_rows=16, threads=1)
    )
    stage.decode(batch_of_one(prompt(1, 60)))
    expected = stage.decode(batch_of_one([5], 60))
    stage.trim(0, 60)
    refused = {
        "context of 64": batch_of_one(prompt(1, 30), 60),
        "continues at position 60": batch_of_one([5], 59),
        "outside the vocabulary": batch_of_one([320], 60),
        "no sequence 2": batch_of_one([5], 0, 2),
        "128 x float32": batch_of_one(np.zeros((1, 127), dtype=np.float32), 60),
    }
    for reason, batch in refused.items():
        with pytest.raises(StageFailed, match=reason):
            stage.decode(batch)
    assert stage.decode(batch_of_one([5], 60)).tobytes() == expected.tobytes()
    stage.close()


def test_the_description_of_a_stage(tmp_path: Path) -> None:
    make_ternary("bitnet", tmp_path / "model.gguf")
    stage = TernaryStage(tmp_path / "model.gguf", CONFIG, is_last=False)
    about = stage.description
    assert (about.architecture, about.layers, about.n_embd, about.n_vocab) == ("bitnet", 4, 128, 320)
    assert not about.is_last
    # Keys and values of 4 layers, 4 sequences, 2 heads of 16, 320 positions, 2 bytes each.
    assert about.kv_bytes == 2 * 4 * 4 * 2 * 16 * 320 * 2
    assert 0 < about.scratch_bytes < 4 << 20
    stage.close()
    stage.close()


def test_stages_that_nobody_closes_leave_nothing_behind(tmp_path: Path) -> None:
    """Their threads end before their memory is freed, which the next stage may get."""
    make_ternary("bitnet", tmp_path / "model.gguf", layers=1)
    threads, expected = psutil.Process().num_threads(), None
    for _ in range(30):
        stage = TernaryStage(tmp_path / "model.gguf", CONFIG)
        logits = stage.decode(batch_of_one(prompt(1, 20)))
        assert expected is None or logits.tobytes() == expected
        expected = logits.tobytes()
        del stage
    assert psutil.Process().num_threads() == threads


def test_files_that_are_not_for_this_engine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="cannot be opened"):
        TernaryStage(tmp_path / "nothing.gguf", CONFIG)
    (tmp_path / "text.gguf").write_text("no model at all, only a text")
    with pytest.raises(BadModelFile, match="no GGUF"):
        TernaryStage(tmp_path / "text.gguf", CONFIG)
    with pytest.raises(UnsupportedModel, match="not laid out for the ternary engine"):
        TernaryStage(make_tiny("bitnet", tmp_path / "plain.gguf"), CONFIG)
    make_ternary("bitnet", tmp_path / "model.gguf")
    middle = cut(read_header(tmp_path / "model.gguf"), 1, 3, tmp_path / "middle.gguf").path
    with pytest.raises(StageFailed, match="no head"):
        TernaryStage(middle, CONFIG)


def test_a_damaged_file_never_crashes(tmp_path: Path) -> None:
    """Cut short anywhere in the header or the weights, or with bytes of the header changed."""
    make_ternary("bitnet", tmp_path / "model.gguf", layers=1)
    data = (tmp_path / "model.gguf").read_bytes()
    header = read_header(tmp_path / "model.gguf").tensors[0].offset
    draw = np.random.default_rng(1)
    damaged = [data[:size] for size in (*range(1, header, 97), header, len(data) - 1, len(data) // 2)]
    for _ in range(300):
        broken = bytearray(data)
        broken[draw.integers(0, header)] = draw.integers(0, 256)
        damaged.append(bytes(broken))
    refused = 0
    for content in damaged:
        (tmp_path / "damaged.gguf").write_bytes(content)
        try:
            TernaryStage(
                tmp_path / "damaged.gguf", StageConfig(context=8, sequences=1, batch_rows=8, threads=1)
            ).close()
        except (BadModelFile, UnsupportedModel, StageFailed):
            refused += 1
    assert refused > header // 97, "what is cut short is refused"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_a_stage_takes(family: str, tmp_path: Path) -> None:
    config = StageConfig(context=512, sequences=3, batch_rows=256, threads=1)
    make_ternary(family, tmp_path / "model.gguf", n_ff=2048, n_vocab=1000)
    header = read_header(tmp_path / "model.gguf")
    assert model_shape(header, "digest").n_vocab == 1000
    for first, last in ((0, 4), (0, 2), (2, 4)):
        path = tmp_path / "model.gguf"
        if last - first < header.layers:
            path = cut(header, first, last, tmp_path / "slice.gguf").path
        stage = TernaryStage(path, config, is_last=last == header.layers)
        found, real = estimate(header, first, last, config), stage.description
        stage.close()
        assert found.kv_bytes == real.kv_bytes
        assert found.scratch_bytes == pytest.approx(real.scratch_bytes, rel=0.1)
