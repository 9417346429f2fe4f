"""`cordee-tiny` on a whole emulated PC of 1997: the text of the modern engine, in the memory of that time.

`make test-pentium2` fetches the machine and runs these. The short tests share one boot; in the long ones
it has a disk, with models that fill the memory or exceed it.
"""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cordee.convert.pentium2 import LAYOUT, write_pentium2
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.engine.vocabulary import Vocabulary
from make_model import SHAPES, RandomWeights, add_vocabulary, make_model
from pentium2 import trained_models
from pentium2_machine import Finding, boot, make_disk, need_machine, old_program, sse_program

BEGINNING, TOKENS = "once upon a time there was a small cat", 40
STORIES = {path.stem: path for path in trained_models()}
STORY_BEGINNING, STORY_TOKENS = "Once upon a time", 120
ILLEGAL_INSTRUCTION = 128 + 4  # as shells have it


class Restless(RandomWeights):
    """Random weights whose head is not the embedding: with both the same, a model repeats its prompt."""

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        return (
            super().rows(name, first + 10**6, last + 10**6)
            if name == "output.weight"
            else super().rows(name, first, last)
        )


def said_by_the_modern_engine(path: Path, beginning: str, count: int) -> str:
    """The greedy continuation on this machine's own engine: `count` tokens, or fewer up to an end token."""
    vocabulary = Vocabulary(path)
    stage = TernaryStage(path, StageConfig(context=256, sequences=1, batch_rows=64, threads=1))
    prompt = vocabulary.tokenize(beginning, add_bos=True)
    tokens = [int(stage.decode(batch_of_one(prompt, 0, 0))[0].argmax())]
    while len(tokens) < count and tokens[-1] not in vocabulary.end_of_generation:
        row = stage.decode(batch_of_one(tokens[-1:], len(prompt) + len(tokens) - 1, 0))
        tokens.append(int(row[0].argmax()))
    stage.close()
    assert len(set(tokens)) > count // 3, "this model is too monotonous to tell engines apart"
    return vocabulary.detokenize(tokens).decode(errors="surrogateescape")


def tokens_per_second(finding: Finding) -> float:
    return float(re.search(r"written, ([\d.]+) tokens/s", finding.text)[1])


def memory_megabytes(finding: Finding) -> float:
    return float(re.search(r"memory ([\d.]+) MB", finding.text)[1])


def show(found: dict[str, Finding]) -> None:
    """Print what the machine printed, for the person who runs `make test-pentium2`."""
    for name, finding in found.items():
        print(f"\n{name}: {finding.text}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    restless = replace(SHAPES["260k"], layout=LAYOUT)
    write_pentium2(
        folder / "restless.gguf",
        restless,
        Restless(restless, 0),
        describe=lambda writer: add_vocabulary(writer, restless.n_vocab),
    )
    for shape in ("15m", "110m"):
        make_model(folder / f"{shape}.gguf", replace(SHAPES[shape], layout=LAYOUT))
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def found(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    """What the machine printed, all in one boot."""
    need_machine()
    files = {path.name: path for path in models.values()}
    files |= {"cordee-tiny": old_program(), "sse": sse_program()}
    commands = {
        "processor": "busybox cat /proc/cpuinfo",
        "sse": "/sse",
        "selftest": "/cordee-tiny --selftest",
        "text": f'/cordee-tiny restless.gguf "{BEGINNING}" -n {TOKENS} --greedy 2>/dev/null',
        "15m": '/cordee-tiny 15m.gguf "" -n 12 --greedy',
        "110m": '/cordee-tiny 110m.gguf "" -n 3 --greedy',
    }
    for name, path in STORIES.items():
        files[path.name] = path
        commands[name] = f'/cordee-tiny {path.name} "{STORY_BEGINNING}" -n {STORY_TOKENS} --greedy'
    found = boot(tmp_path_factory.mktemp("machine"), files, commands)
    show(found)
    return found


def test_the_machine_is_a_pentium_2_without_sse(found: dict[str, Finding]) -> None:
    flags = re.search(r"^flags\s*: (.*)$", found["processor"].text, re.MULTILINE)[1].split()
    assert "Pentium II" in found["processor"].text
    assert "mmx" in flags and "sse" not in flags
    assert found["sse"].status == ILLEGAL_INSTRUCTION


def test_the_program_finds_that_the_machine_computes_right(found: dict[str, Finding]) -> None:
    assert found["selftest"].status == 0, found["selftest"].text
    assert "mmx" in found["selftest"].text


def test_it_writes_the_text_of_the_modern_engine(found: dict[str, Finding], models: dict[str, Path]) -> None:
    text = said_by_the_modern_engine(models["restless"], BEGINNING, TOKENS)
    assert found["text"] == Finding(0, BEGINNING + text)


@pytest.mark.parametrize("name", STORIES)
def test_it_tells_the_story_that_the_modern_engine_tells(found: dict[str, Finding], name: str) -> None:
    story = STORY_BEGINNING + said_by_the_modern_engine(STORIES[name], STORY_BEGINNING, STORY_TOKENS)
    assert found[name].status == 0
    assert found[name].text.startswith(story)


def test_a_model_of_15_million_weights_takes_little_of_the_machine(found: dict[str, Finding]) -> None:
    assert found["15m"].status == 0
    assert memory_megabytes(found["15m"]) <= 6
    # Two nanoseconds an instruction: at most 12 million of them for a token.
    assert tokens_per_second(found["15m"]) > 40


def test_a_model_of_110_million_weights_runs_inside_128_megabytes(found: dict[str, Finding]) -> None:
    assert found["110m"].status == 0
    assert memory_megabytes(found["110m"]) < 40


# Larger models, on a disk


@pytest.fixture(scope="module")
def found_on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    """What the machine prints with a model that just fits, and with one ten times larger than the memory."""
    need_machine()
    folder = tmp_path_factory.mktemp("disk")
    (folder / "content").mkdir()
    wide = {"n_embd": 1536, "n_ff": 4096, "heads": 24, "kv_heads": 4}
    shapes = {
        "400m": replace(SHAPES["110m"], layers=14, context=256, **wide),
        "7b": SHAPES["7b"],
    }
    for name, shape in shapes.items():
        make_model(folder / "content" / f"{name}.gguf", replace(shape, layout=LAYOUT))
    commands = {
        "400m": '/cordee-tiny /disk/400m.gguf "" -n 3 --greedy',
        "7b": '/cordee-tiny /disk/7b.gguf "" -n 1 --greedy',
    }
    disk = make_disk(folder / "content", folder / "disk")
    shutil.rmtree(folder / "content")
    found = boot(folder, {"cordee-tiny": old_program()}, commands, disk=disk, timeout_seconds=1200)
    disk.unlink()
    show(found)
    return found


@pytest.mark.long
def test_a_model_of_400_million_weights_fits_and_runs(found_on_disk: dict[str, Finding]) -> None:
    finding = found_on_disk["400m"]
    assert finding.status == 0
    assert "larger than the free memory" not in finding.text
    assert memory_megabytes(finding) < 100
    assert tokens_per_second(finding) > 1


@pytest.mark.long
def test_a_model_of_7_billion_weights_streams_and_its_slowness_is_told_beforehand(
    found_on_disk: dict[str, Finding],
) -> None:
    finding = found_on_disk["7b"]
    assert finding.status == 0
    before, _, after = finding.text.partition("seconds a token at best")
    disk, seconds = re.search(r"gives ([\d.]+) MB/s. Expect ([\d.]+) $", before).groups()
    assert float(disk) * float(seconds) == pytest.approx(1323, rel=0.02)
    assert "[1 tokens read" in after
    assert memory_megabytes(finding) < 100
