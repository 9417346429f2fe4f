"""`cordee bench` on both engines: figures for people and for programs, within the model's limits."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cordee.cli.main import cordee
from cordee.engine.stage import StageConfig
from cordee.machine import bench_runs, sizing
from cordee.models.fit import USABLE, estimate
from cordee.models.gguf import read_header
from ternary_models import make_ternary
from tiny import make_tiny

PREFILLS = ["prefill-16", "prefill-128", "prefill-512"]
DECODES = ["decode-1", "decode-2", "decode-4", "decode-8"]


@pytest.fixture
def hasty(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case runs once."""
    monkeypatch.setattr(bench_runs, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(bench_runs, "ROOF_SECONDS", 0.0)
    monkeypatch.setattr(bench_runs, "ROOF_BYTES", 1 << 20)


def bench(*arguments: object) -> Result:
    result = CliRunner().invoke(cordee, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def lines(result: Result) -> dict[str, dict]:
    """Case -> what its line says."""
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {entry["case"]: entry for entry in found}


def assert_sound(entries: dict[str, dict]) -> None:
    for case, entry in entries.items():
        if case == "roof":
            assert (entry["unit"], entry["peer_name"]) == ("GB/s", "plain reading")
            assert min(entry["ours"], entry["peer"], entry["ratio"]) > 0
        else:
            assert entry["value"] > 0, case
            assert entry["unit"] == ("s" if case in ("load", "first-token") else "tokens/s")


@pytest.mark.usefixtures("hasty")
def test_figures_of_both_engines_as_json(tmp_path: Path) -> None:
    make_ternary("bitnet", tmp_path / "ternary.gguf")
    for path in (make_tiny("llama", tmp_path / "plain.gguf"), tmp_path / "ternary.gguf"):
        entries = lines(bench(path, "--json", "--threads", 1))
        assert_sound(entries)
        assert list(entries) == ["load", "first-token", *PREFILLS, *DECODES, "roof"]
        assert {entry["model"] for entry in entries.values()} == {str(path)}


@pytest.mark.usefixtures("hasty")
def test_a_short_context_leaves_cases_out_and_says_so(tmp_path: Path) -> None:
    make_ternary("llama", tmp_path / "short.gguf", context=20)
    result = bench(tmp_path / "short.gguf", "--threads", 1)
    cases = [line.split()[0] for line in result.stdout.splitlines()]
    assert cases == ["CASE", "load", "first-token", "prefill-16", *DECODES, "roof"]
    assert "prefill-128 is left out: the model's context is 20 tokens" in result.stderr
    assert "% of" in result.stdout.splitlines()[-1]


@pytest.mark.usefixtures("hasty")
def test_memory_for_fewer_answers_measures_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    make_ternary("llama", path)
    for answers in (1, 4):
        config, header = StageConfig(context=512, sequences=answers, batch_rows=512), read_header(path)
        room = estimate(header, 0, header.layers, config).total_bytes / USABLE + 1
        monkeypatch.setattr(sizing, "usable_memory", lambda devices, room=room: room)
        result = bench(path, "--json", "--threads", 1)
        cases = [case for case in lines(result) if case.startswith("decode")]
        assert cases == [case for case in DECODES if int(case.partition("-")[2]) <= answers]
        assert "decode-8 is left out: memory is short" in result.stderr


@pytest.mark.usefixtures("hasty")
def test_energy_is_shown_where_the_machine_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        def watts(self) -> float:
            return 10.0

    monkeypatch.setattr(bench_runs, "Meter", Meter)
    entries = lines(bench(make_tiny("llama", tmp_path / "m.gguf"), "--json", "--threads", 1))
    for answers in (1, 2, 4, 8):
        energy, decode = entries[f"energy-{answers}"], entries[f"decode-{answers}"]
        assert energy["unit"] == "J/token"
        assert energy["value"] == pytest.approx(10 / decode["value"], rel=1e-2)


@pytest.mark.usefixtures("hasty")
def test_a_case_that_would_take_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runs, "CASE_SECONDS_MAX", 0.0)
    result = bench(make_tiny("llama", tmp_path / "m.gguf"), "--json", "--threads", 1)
    assert [case for case in lines(result) if case.startswith("prefill")] == ["prefill-16"]
    assert "prefill-512 is left out: it would take" in result.stderr


def test_what_cannot_be_measured_is_said(home: Path, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no model at all, and not short either")
    for model, code, message in (
        ("nothing", 3, "no model 'nothing'"),
        (tmp_path / "no.gguf", 4, "is not a GGUF model file"),
    ):
        result = CliRunner().invoke(cordee, ["bench", str(model)])
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr


@pytest.mark.long
def test_the_starter_by_its_name(home: Path) -> None:
    entries = lines(bench("starter", "--json"))
    assert_sound(entries)
    assert list(entries) == ["load", "first-token", *PREFILLS, *DECODES, "roof"]
