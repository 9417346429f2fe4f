"""Rows that were altered are told from rows that were rounded otherwise: honest machines are not accused."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from cordee.engine.llama.stage import LlamaStage
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.vocabulary import Vocabulary
from cordee.generation.request import SamplingParams
from cordee.generation.sampling import Sampler
from cordee.models.embedding import Embedding
from cordee.models.gguf import read_header
from cordee.models.slices import cut
from cordee.worker.comparison import (
    Resampler,
    Rounding,
    compare_rows,
    compare_tokens,
    distances,
    logit_noise,
    rounding,
)
from lying_worker import EVERY, altered
from tiny import make_tiny

ROWS = 96
CHECKS = 10_000
COLUMNS = 192  # a third of the rows, so that ten thousand are soon done
TEXT = Path(__file__).resolve().parents[2] / "README.md"
LIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "half as large again": lambda values: values * 1.5,
    "negated": lambda values: -values,
    "left out": np.zeros_like,
    "no number": lambda values: values * np.nan,
    "far too large": lambda values: values * np.float32(1e30),
}


def decoded(
    path: Path, rows: np.ndarray, *, step: int = 0, exact: bool = True, threads: int = 1
) -> np.ndarray:
    """Hidden rows of a slice, in steps of so many (0: all at once)."""
    config = StageConfig(context=256, sequences=1, threads=threads, batch_invariant=exact)
    stage = LlamaStage(path, config, is_last=False, extra_buffers=False)
    step = step or len(rows)
    found = [stage.decode(batch_of_one(rows[at : at + step], at)) for at in range(0, len(rows), step)]
    stage.close()
    return np.concatenate(found)


def without_quantization(path: Path, to: Path) -> Path:
    """The same weights as float32: then activations are not rounded to integers, as on a graphics card."""
    read = GGUFReader(path)
    writer = GGUFWriter(to, read.fields["general.architecture"].contents())
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in read.tensors:
        weights = quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def machines(path: Path, rows: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """What honest machines of many kinds make of the same rows; `exact` is the checker's first arithmetic."""
    return {
        "exact": decoded(path, rows),
        "one by one": decoded(path, rows, step=1),
        "two threads": decoded(path, rows, threads=2),
        "fast": decoded(path, rows, exact=False),
        "fast, by sevens": decoded(path, rows, exact=False, step=7, threads=2),
        "float32": decoded(without_quantization(path, folder / "float32.gguf"), rows, exact=False),
        "float16": decoded(path, rows.astype(np.float16).astype(np.float32)),
    }


@pytest.fixture(scope="module", autouse=True)
def as_in_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GGML_CPU_TILED_MM", "0")
        yield


@pytest.fixture(scope="module")
def starter(starter_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("starter")
    header, vocabulary = read_header(starter_path), Vocabulary(starter_path)
    tokens = np.array(vocabulary.tokenize(TEXT.read_text()[:2000], add_bos=True)[:ROWS], np.int32)
    vocabulary.close()
    cut(header, 0, 12, folder / "slice.gguf")
    return machines(folder / "slice.gguf", Embedding(header).rows(tokens), folder)


def accused(claimed: np.ndarray, computed: np.ndarray, honest: Rounding) -> bool:
    return compare_rows(claimed, computed, honest).differs


def test_real_pairs_of_machines_are_not_accused_and_liars_are(starter: dict[str, np.ndarray]) -> None:
    exact, honest = starter["exact"], rounding(starter["exact"], starter["fast"])
    assert starter["fast"].tobytes() != exact.tobytes()  # else this shows nothing
    pairs = 0
    for rows in starter.values():
        for other in starter.values():
            for first in range(0, ROWS - 16 + 1, 8):
                part = slice(first, first + 16)
                assert not accused(rows[part], other[part], honest)
                pairs += 1
        for lie in LIES.values():
            claimed = rows.copy()
            claimed[:, ::EVERY] = lie(claimed[:, ::EVERY])
            assert accused(claimed, exact, honest)
            assert accused(claimed[:16], exact[:16], honest)
    assert pairs > 500


def test_on_like_machines_even_small_lies_are_found(starter: dict[str, np.ndarray]) -> None:
    exact, honest = starter["exact"], rounding(starter["exact"], starter["fast"])
    assert starter["one by one"].tobytes() == exact.tobytes()
    claimed = starter["one by one"].copy()
    claimed[:, ::EVERY] *= 1.1
    assert accused(claimed, exact, honest)


def test_noise_on_all_values_is_no_rounding(starter: dict[str, np.ndarray]) -> None:
    exact, honest = starter["exact"], rounding(starter["exact"], starter["fast"])
    random = np.random.default_rng(1)
    noise = random.normal(0, 0.3, exact.shape) * np.median(np.abs(exact))
    assert accused((exact + noise).astype(np.float32), exact, honest)


def test_the_finding_says_what_differs(starter: dict[str, np.ndarray]) -> None:
    exact, honest = starter["exact"], rounding(starter["exact"], starter["fast"])
    found = compare_rows(altered(exact), exact, honest)
    assert found.explanation.startswith(f"{ROWS} of {ROWS} rows differ (row 0: ")
    assert f"of {exact.shape[1]} values; value " in found.explanation


def test_ten_thousand_honest_checks_accuse_nobody(starter: dict[str, np.ndarray]) -> None:
    """Rows and roundings of real machines, put together anew: other rows, stronger and weaker, and spread
    with a tail as heavy as the real one."""
    honest = rounding(starter["exact"], starter["fast"])
    exact = starter["exact"][:, :COLUMNS]
    kinds = [starter[name][:, :COLUMNS] - exact for name in ("fast", "float32", "float16")]
    sizes = np.abs(exact) + np.median(np.abs(exact), axis=1, keepdims=True)
    relative = np.stack([kind / sizes for kind in kinds]).reshape(-1, exact.shape[1])
    random = np.random.default_rng(15)
    for check in range(CHECKS):
        rows = random.integers(0, ROWS, 16)
        drawn = relative[random.integers(0, len(relative), 16)]
        drawn = np.roll(drawn, int(random.integers(exact.shape[1])), axis=1)
        strength = np.float32(2 ** random.uniform(-6, 1))
        claimed = exact[rows] + strength * drawn * sizes[rows]
        found = compare_rows(claimed, exact[rows], honest)
        assert not found.differs, f"check {check}: {found.explanation}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "qwen3moe", "gpt-oss"])
@pytest.mark.parametrize("kind", [None, GGMLQuantizationType.Q8_0])
def test_random_models_of_many_kinds(
    architecture: str, kind: GGMLQuantizationType | None, tmp_path: Path
) -> None:
    make_tiny(architecture, tmp_path / "model.gguf", quantization=kind)
    header = read_header(tmp_path / "model.gguf")
    cut(header, 0, 4, tmp_path / "slice.gguf")
    tokens = np.random.default_rng(3).integers(3, 250, ROWS).astype(np.int32)
    found = machines(tmp_path / "slice.gguf", Embedding(header).rows(tokens), tmp_path)
    honest = rounding(found["exact"], found["fast"])
    for name, rows in found.items():
        finding = compare_rows(rows, found["exact"], honest)
        assert not finding.differs, f"{name}: {finding.explanation}"
        claimed = rows.copy()
        claimed[:, ::8] *= -1
        assert accused(claimed, found["exact"], honest), name


def test_a_value_that_is_no_number_is_infinitely_far() -> None:
    reference = np.ones((1, 4), np.float32)
    found = distances(np.array([[1, np.nan, np.inf, -np.inf]], np.float32), reference)
    assert found.tolist() == [[0.0, np.inf, np.inf, np.inf]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_follow_from_logits_within_rounding(temperature: float) -> None:
    random = np.random.default_rng(7)
    prompt, vocabulary, answers = [1, 2, 3], 500, 24
    params = SamplingParams(temperature=temperature, seed=11, repeat_penalty=1.1)
    logits = random.normal(0, 3, (answers, vocabulary)).astype(np.float32)

    def noisy() -> np.ndarray:
        return logits + random.normal(0, 0.05, logits.shape).astype(np.float32)

    noise = logit_noise(logits, noisy())
    lying = logits.copy()
    lying[:, ::EVERY] += 12
    for given, honest in ((noisy(), True), (lying, False), (-logits, False)):
        sampler = Sampler(params, None, prompt)
        tokens = [sampler.sample(row).token for row in given]
        again = Resampler(params, [*prompt, *tokens], len(prompt), 0)
        by_position = {len(prompt) - 1 + index: token for index, token in enumerate(tokens)}
        computed = dict(zip(by_position, logits, strict=True))
        assert compare_tokens(by_position, computed, noise, again).differs is not honest
