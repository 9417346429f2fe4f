"""`cordee compress`: the file is the model it should be, runs survive kills, and bad input is named."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType

from checkpoint_files import bf16
from cordee.cli.main import cordee
from cordee.compress.budget import chosen, measured_losses
from cordee.compress.compress import compress
from cordee.compress.evaluate import evaluate, size_of_model
from cordee.compress.fitter import CompressOptions, Fitter
from cordee.compress.source import Source
from cordee.convert.convert import convert
from cordee.errors import BadModelFile, BadRequest, DoesNotFit, StorageFailed
from cordee.models.gguf import read_header
from ordinary_models import make_checkpoint, make_ordinary, prose
from ternary_models import make_ternary
from ternary_sources import weights_of, write_source

TEXT = prose(600)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ordinary(tmp_path_factory.mktemp("compress") / "m.gguf")


def options(**changes: object) -> CompressOptions:
    return replace(CompressOptions(calibration=TEXT), **changes)


def divergence(ours: Path, original: Path) -> float:
    found = evaluate(read_header(ours), prose(300, seed=5), original=read_header(original), threads=1)
    assert found.kl is not None
    return found.kl


def test_each_method_is_nearer_to_the_original_than_the_one_before(ordinary: Path, tmp_path: Path) -> None:
    found = list[float]()
    for method in ("absmean", "fit", "gptq"):
        out = tmp_path / f"{method}.gguf"
        compress(ordinary, out, options(method=method))
        found.append(divergence(out, ordinary))
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("span", [0, 64, 128, 256])
def test_the_size_is_that_of_codes_and_scales(ordinary: Path, tmp_path: Path, span: int) -> None:
    out = tmp_path / "out.gguf"
    compress(ordinary, out, options(method="fit", span=span))
    header = read_header(out)
    assert header.get("cordee.ternary.scale_columns", 0) == span
    assert size_of_model(header).bits_per_layer_weight < 3.5  # rows are padded to 80; matrices have 64 to 192


def test_a_sharded_checkpoint_gives_what_it_gives_in_one_file(tmp_path: Path) -> None:
    one, three = (make_checkpoint(tmp_path / f"m{shards}", shards=shards) for shards in (1, 3))
    outs = tmp_path / "one.gguf", tmp_path / "three.gguf"
    for folder, out in zip((one, three), outs, strict=True):
        folder = folder.rename(tmp_path / "m")  # the model is named after its folder
        compress(folder, out, options(calibration=prose(3000)))
        folder.rename(tmp_path / f"done-{out.stem}")
    assert outs[0].read_bytes() == outs[1].read_bytes()


class _Interrupted(BaseException):
    """As a signal would end the run."""


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(ordinary: Path, tmp_path: Path) -> None:
    """Also where matrices at 8 bits are chosen by size."""
    sized = options(size_bytes=320_000)
    compress(ordinary, tmp_path / "whole.gguf", sized)
    out, said = tmp_path / "out.gguf", list[str]()
    for most in (1, 6, 9, 13):

        def stop(done: int, total: int, most: int = most) -> None:
            if done * 14 >= most * total:
                raise _Interrupted

        with pytest.raises(_Interrupted):
            compress(ordinary, out, sized, progress=stop, report=said.append)
        assert not out.exists()
    compress(ordinary, out, sized, report=said.append)
    assert said.count("measuring which matrices matter") == 1
    assert "going on with layer 2 of 2" in said
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_other_settings_begin_anew(ordinary: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done * 4 >= 3 * total:
            raise _Interrupted

    out = tmp_path / "out.gguf"
    with pytest.raises(_Interrupted):
        compress(ordinary, out, options(method="fit"), progress=stop)
    compress(ordinary, out, options(method="absmean"))
    compress(ordinary, tmp_path / "plain.gguf", options(method="absmean"))
    assert out.read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def command(model: Path, out: Path, text: Path) -> list[str]:
    asked = ["compress", str(model), "-o", str(out), "--calibration", str(text)]
    return [sys.executable, "-m", "cordee.cli.main", *asked]


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_gives_the_same_bytes(tmp_path: Path) -> None:
    model = make_ordinary(tmp_path / "m.gguf", layers=6)
    text = tmp_path / "text.txt"
    text.write_text(prose(3000))
    compress(model, tmp_path / "whole.gguf", options(calibration=text.read_text()), name=str(model))
    out, draw, killed = tmp_path / "out.gguf", np.random.default_rng(0), 0
    while not out.exists():
        process = subprocess.Popen(command(model, out, text), stderr=subprocess.DEVNULL)
        if killed < 10:
            try:
                process.wait(timeout=draw.uniform(0.5, 4))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        process.wait()
    assert killed > 0
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_ternary_model_keeps_every_weight(tmp_path: Path) -> None:
    weights = weights_of("bitnet")
    source, out, converted = tmp_path / "t.gguf", tmp_path / "out.gguf", tmp_path / "converted.gguf"
    write_source(source, weights, GGMLQuantizationType.TQ2_0)
    convert(source, converted, layout="trit5")
    compress(source, out, options())
    assert out.read_bytes() == converted.read_bytes()
    ours, again = tmp_path / "ours.gguf", tmp_path / "again.gguf"
    make_ternary("llama", ours)
    compress(ours, again, options())
    assert again.read_bytes() == ours.read_bytes()


def spoilt(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[3, 5] = bf16(np.array([np.nan], "<f4"))[0]
    return values


@pytest.mark.parametrize(
    ("replaced", "fault"),
    [
        ({DOWN: ("BF16", spoilt(np.zeros((128, 208), "<u2")))}, f"{DOWN} holds a value that is not a number"),
        ({DOWN: None}, f"no tensor {DOWN}"),
        ({DOWN: ("BF16", np.zeros((128, 200), "<u2"))}, f"{DOWN} is 128 x 200, not 128 x 208"),
    ],
)
def test_a_damaged_model_is_refused_and_nothing_is_left(
    tmp_path: Path, replaced: dict[str, tuple[str, np.ndarray] | None], fault: str
) -> None:
    folder, place = make_checkpoint(tmp_path / "m", **replaced), tmp_path / "place"
    place.mkdir()
    with pytest.raises(BadModelFile, match=fault):
        compress(folder, place / "out.gguf", options(calibration=prose(3000)))
    assert list(place.iterdir()) == []


def test_a_calibration_of_three_words_is_refused_with_the_need(ordinary: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="at least 2048 are needed: give a longer one with --calibration"):
        compress(ordinary, tmp_path / "out.gguf", options(calibration="three little words"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_with_the_need(ordinary: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"needs 0\.2 GB of memory"):
        compress(ordinary, tmp_path / "out.gguf", options(memory_bytes=1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_nothing_is_left(
    ordinary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageFailed, match=r"out.gguf cannot be written: the disk is full"):
        compress(ordinary, tmp_path / "out.gguf", options())
    assert list(tmp_path.iterdir()) == []


def test_the_verb_says_where_the_file_is(ordinary: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    asked = ["compress", str(ordinary), "-o", str(out), "--method", "fit", "--group", "64"]
    result = CliRunner().invoke(cordee, asked, catch_exceptions=False)
    assert result.exit_code == 0
    assert str(out) in result.stdout
    assert read_header(out).get("cordee.ternary.scale_columns") == 64


def test_the_output_must_not_be_the_model(ordinary: Path) -> None:
    with pytest.raises(BadRequest, match="name another file"):
        compress(ordinary, ordinary, options())


def test_more_planes_and_kept_matrices_are_nearer_to_the_original(ordinary: Path, tmp_path: Path) -> None:
    def made(**changes: object) -> Path:
        out = tmp_path / "-".join(f"{key}{value}" for key, value in changes.items()).replace("*", "all")
        compress(ordinary, out, options(method="fit", **changes))
        return out

    one, two, three = (divergence(made(planes=planes), ordinary) for planes in (1, 2, 3))
    assert one > 2 * two > 4 * three
    kept = made(keep=("*.ffn_down", "blk.1.*"))
    assert divergence(kept, ordinary) < one
    assert divergence(made(keep=("*",)), ordinary) < 0.01


@pytest.mark.parametrize("planes", [1, 2])
def test_a_size_keeps_what_loses_most(ordinary: Path, tmp_path: Path, planes: int) -> None:
    def made(name: str, **changes: object) -> Path:
        compress(ordinary, tmp_path / name, options(method="fit", planes=planes, **changes))
        return tmp_path / name

    least, most = made("least"), made("most", keep=("*",))
    before, nbytes = divergence(least, ordinary), least.stat().st_size
    for share in (0.3, 0.7):
        size = nbytes + int(share * (most.stat().st_size - nbytes))
        some = made(f"some{share}", size_bytes=size)
        assert nbytes < some.stat().st_size <= size
        found = divergence(some, ordinary)
        assert found < before
        before, nbytes = found, some.stat().st_size
    exact = least.stat().st_size
    assert made("exact", size_bytes=exact).stat().st_size == exact
    with pytest.raises(DoesNotFit):
        made("less", size_bytes=exact - 1)


def test_the_matrix_that_loses_most_for_its_bytes_is_kept_first(ordinary: Path) -> None:
    source = Source(ordinary, "m", "int8")
    fitter = Fitter(source.model, options())
    windows = np.arange(4 * 64, dtype=np.int32).reshape(4, 64) % 200
    losses = measured_losses(source, fitter, windows)
    assert losses.keys() == {name.removesuffix(".weight") for name in source.matrices}
    assert all(0 < loss < 10 for loss in losses.values())
    spoilt = losses | {"blk.1.attn_k": 1e6}
    assert chosen(spoilt, fitter.model, 1 << 40) == tuple(sorted(losses))
    assert chosen(spoilt, fitter.model, 0) == ()
    rows, cols = fitter.model.matrices()["attn_k"]
    assert "blk.1.attn_k" in chosen(spoilt, fitter.model, 2 * rows * cols)


def test_a_size_that_is_too_small_is_refused_with_the_need(ordinary: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DoesNotFit, match=r"m.gguf takes 0\.\d+ GB with all matrices ternary, and --size allows"
    ):
        compress(ordinary, tmp_path / "out.gguf", options(method="fit", size_bytes=1000))
    assert list(tmp_path.iterdir()) == []


def test_a_rotated_model_computes_the_same(ordinary: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    compress(ordinary, out, options(method="fit", keep=("*",), rotate=True))
    header = read_header(out)
    assert header.get("cordee.ternary.rotated") == "attn,attn_output,ffn,ffn_down,"
    assert divergence(out, ordinary) < 0.01


def test_a_pattern_that_names_nothing_is_refused(ordinary: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No matrix matches ffn_down: they are called like"):
        compress(ordinary, tmp_path / "out.gguf", options(keep=("ffn_down",)))
