"""Client libraries, installed by pip, do what docs/clients.md has people copy, and a whole tool round."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import library_round
from agent_round import recorded
from clients_page import example
from library_round import FACT, LIBRARIES
from scripted_service import ScriptedService, scripted
from serving import SECONDS, Running

pytestmark = pytest.mark.long
# Where pip has installed the libraries, as the folder of a virtual environment; none is a dependency of the
# tests.
FOLDER = "CORDEE_TEST_LIBRARIES"
ANSWER = "So that one holds the other."
CALL = '[think]It may snow.[say]I look.[call weather]{"city": "Bern"}'
# What the page has people copy, by its headings.
EXAMPLES = (
    *("langchain-openai", "langchain-ollama", "pydantic-ai", "instructor", "OpenAI Agents SDK", "smolagents"),
    *("litellm", "llm"),
)
# By which smolagents' answers come.
FINAL = "final_answer"


@pytest.fixture
def talk(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, ScriptedService]]:
    with scripted(starter_path, tmp_path, monkeypatch, "starter") as made:
        yield made


def program(name: str) -> Path:
    folder = os.environ.get(FOLDER)
    found = Path(folder or "/nowhere") / "bin" / name
    if not found.is_file():
        pytest.skip(f"{name} is not installed: `pip install` it in a virtual environment that {FOLDER} names")
    return found


def ran(command: list[str | Path], home: Path) -> str:
    quiet = {"HOME": str(home), "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    quiet |= {"PATH": os.environ["PATH"], "LLM_USER_PATH": str(home / "llm")}
    done = subprocess.run(command, env=quiet, cwd=home, capture_output=True, text=True, timeout=3 * SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("heading", EXAMPLES)
def test_an_example_of_the_page(
    talk: tuple[Running, ScriptedService], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str
) -> None:
    server, service = talk
    statuses: list[tuple[str, str, int]] = []
    recorded(statuses, monkeypatch)
    service.script = [ANSWER]
    if heading == "instructor":
        service.script = [f"[call Reason]{json.dumps({'reason': ANSWER})}"]
    elif heading == "smolagents":
        service.script = [f"[call {FINAL}]{json.dumps({'answer': ANSWER})}"]
    text = example(heading, server.port)
    if heading == "llm":
        models = tmp_path / "llm" / "extra-openai-models.yaml"
        models.parent.mkdir()
        models.write_text(text, encoding="utf-8")
        said = ran([program("llm"), "-m", "cordee", "--key", "none", "Why rope together?"], tmp_path)
    else:
        script = tmp_path / "example.py"
        script.write_text(text, encoding="utf-8")
        said = ran([program("python"), script], tmp_path)
    assert said.endswith(ANSWER)
    assert [status for _, _, status in statuses] == [200] * len(statuses)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_whole_tool_round(
    talk: tuple[Running, ScriptedService], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    server, service = talk
    statuses: list[tuple[str, str, int]] = []
    recorded(statuses, monkeypatch)
    service.script = [CALL, "Winter is here."]
    wanted = "Winter is here."
    if library == "instructor":
        service.script, wanted = ['[call Weather]{"city": "Bern"}'], "Bern"
    elif library == "smolagents":
        service.script[1] = f"[call {FINAL}]" + json.dumps({"answer": wanted})
    said = ran([program("python"), library_round.__file__, library, server.base], tmp_path)
    assert said.endswith(wanted)
    assert [status for _, _, status in statuses] == [200] * len(statuses)
    if library == "smolagents":  # it tells results as a user's text
        assert any(FACT in each.content for each in service.turns[-1].messages)
    elif library != "instructor":
        [called] = [each for each in service.turns[-1].messages if each.tool_calls]
        [result] = [each for each in service.turns[-1].messages if each.role == "tool"]
        assert [each.id for each in called.tool_calls] == [result.tool_call_id]
        assert FACT in result.content


def test_the_command_llm_does_a_tool_round(
    talk: tuple[Running, ScriptedService], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, service = talk
    statuses: list[tuple[str, str, int]] = []
    recorded(statuses, monkeypatch)
    service.script = [CALL, "Winter is here."]
    models = tmp_path / "llm" / "extra-openai-models.yaml"
    models.parent.mkdir()
    models.write_text(example("llm", server.port), encoding="utf-8")
    tool = "def weather(city: str) -> str:\n    return 'It snows.'\n"
    command = [program("llm"), "-m", "cordee", "--key", "none", "--functions", tool, "How is it in Bern?"]
    assert ran(command, tmp_path).endswith("Winter is here.")
    assert [each.content for each in service.turns[-1].messages if each.role == "tool"] == [FACT]
    assert [status for _, _, status in statuses] == [200] * len(statuses)
