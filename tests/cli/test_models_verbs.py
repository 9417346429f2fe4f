"""`cordee models`, `ls`, `rm` and `show` on a machine by itself; with a cluster they are in test_verbs.py."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cordee.cli.main import cordee
from cordee.errors import nearest
from cordee.machine import sizing
from cordee.models.cards import cards
from cordee.models.store import Store
from tiny import make_tiny

pytestmark = pytest.mark.usefixtures("home")
GB = 10**9


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cordee, [*map(str, arguments)], prog_name="cordee", input="Hello")


def listed(*arguments: object) -> list[dict]:
    done = run("models", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def names(*arguments: object) -> list[str]:
    return [model["name"] for model in listed(*arguments)]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Sets the memory that is free on this machine."""

    def free(nbytes: float) -> None:
        monkeypatch.setattr(sizing, "usable_memory", lambda devices: int(nbytes))

    return free


def test_every_card_is_a_line_the_smallest_first(room) -> None:
    room(64 * GB)
    lines = run("models").stdout.splitlines()
    assert lines[0].split() == ["NAME", "FOR", "LANGUAGES", "SIZE", "LICENCE", "FITS", "HERE"]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(cards())
    sizes = [model["bytes"] for model in listed()]
    assert sizes == sorted(sizes)
    [line] = [line for line in lines if line.startswith("qwen3-8b ")]
    assert re.split(r"  +", line)[1:] == [
        "chat and reasoning",
        "en zh +117",
        "5.0 GB",
        "Apache-2.0",
        "yes",
        "-",
    ]


def test_what_fits_says_with_how_many_answers(room) -> None:
    def of(name: str) -> tuple[str, str]:
        [line] = [line for line in run("models").stdout.splitlines() if line.startswith(f"{name} ")]
        [found] = [model for model in listed() if model["name"] == name]
        return re.split(r"  +", line)[5], found["fit"]["where"]

    seen = set()
    for free in (64, 10, 7.2, 6.3, 5.9, 5):
        room(free * GB)
        words, where = of("qwen3-8b")
        seen.add(re.sub(r"[0-9]+", "N", words))
        assert (where == "nowhere") == (words == "no")
        assert ("qwen3-8b" in names("--fits")) == (words != "no")
        shown = json.loads(run("show", "qwen3-8b", "--json").stdout)["fit"]
        assert shown["fits"] == (words != "no")  # the verbs agree
        if words.endswith("answers"):
            assert shown["sequences"] == int(words.split()[0])
    assert seen >= {"yes", "N answers", "no"}


def test_languages_sizes_and_fits_are_filters(room) -> None:
    room(4 * GB)
    assert {"apertus-8b", "mistral-small", "llama3.2-3b", "qwen3-4b"} <= set(names("--language", "fr"))
    assert not {"starter", "gpt-oss-20b", "gemma3-1b"} & set(names("--language", "FR"))
    assert names("--language", "rm", "--size", "10GB", "--fits") == [
        "qwen3-0.6b",
        "qwen3-1.7b",
        "gemma3-4b",
        "qwen3-4b",
    ]
    assert all(model["bytes"] <= GB for model in listed("--size", "1GB"))
    assert "es en de fr +4" in run("models", "--language", "es").stdout
    nothing = run("models", "--size", "1kB")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "No model is like that" in nothing.stderr
    for wrong in ("french", "f", "12", "é"):
        refused = run("models", "--language", wrong)
        assert (refused.exit_code, "not a language code" in refused.stderr) == (2, True)
    assert run("models", "--size", "big").exit_code == 2


def test_what_is_here_is_said_also_under_a_damaged_entry(room, tmp_path: Path) -> None:
    store = Store()
    store.add_file(make_tiny("qwen3", tmp_path / "m.gguf"), "qwen3-8b", source="test")
    (store.root / "names" / "x.json").write_text("{")
    [found] = [model for model in listed() if model["name"] == "qwen3-8b"]
    assert found["here"]
    assert found["bytes"] == store.get("qwen3-8b").nbytes  # of this file, whatever the card says
    assert {model["name"] for model in listed() if model["here"]} >= {"story", "story-small", "qwen3-8b"}
    store.get("qwen3-8b").path.write_bytes(b"no model")
    assert "qwen3-8b" in names()


def test_ls_and_rm_of_a_machine_without_a_cluster_are_as_simple_as_ever(tmp_path: Path) -> None:
    assert "No models yet" in run("ls").stderr
    Store().add_file(make_tiny("llama", tmp_path / "m.gguf"), "mine", source="test")
    assert run("ls").stdout.splitlines()[0].split() == ["NAME", "SIZE", "ADDED", "SOURCE"]
    [found] = json.loads(run("ls", "--json").stdout)
    assert (found["name"], found["nodes"]) == ("mine", [])
    assert run("rm", "mine").exit_code == 0
    assert run("rm", "mine").exit_code == 3


@pytest.mark.parametrize("verb", ["run", "show", "plan", "serve", "rm", "export", "bench"])
def test_a_slip_in_a_name_is_answered_with_the_nearest(tmp_path: Path, verb: str) -> None:
    Store().add_file(make_tiny("llama", tmp_path / "m.gguf"), "bergsteiger", source="test")
    more = {"export": [tmp_path / "out", "--for", "pentium2"]}.get(verb, [])
    for slip, meant in (("bergstieger", "bergsteiger"), ("quen3-8b", "qwen3-8b")):
        done = run(verb, slip, *more)
        assert done.exit_code == 3, done.output
        assert f"There is no model '{slip}' (did you mean {meant}" in done.stderr


@given(st.text(max_size=40), st.lists(st.text(max_size=20), max_size=8))
def test_a_suggestion_is_one_of_the_names_or_none(name: str, known: list[str]) -> None:
    words = nearest(name, known)
    if words:
        close = words.removeprefix(" (did you mean ").removesuffix("?)")
        assert all(each in known for each in close.split(" or ")) or " or " in "".join(known)
    if name in known:
        assert name in words
