"""What docs/clients.md has people copy for Responses and Anthropic's messages works as it stands."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import agent_round
from clients_page import example
from scripted_service import ScriptedService, scripted
from serving import SECONDS, Running

HELPERS = Path(agent_round.__file__)
SOURCES = Path(__file__).resolve().parents[2] / "src"
# Where npm has installed the agents; none of them is a dependency of the tests.
FOLDER = "CORDEE_TEST_NPM"
ANSWER = "So that one holds the other."
SCRIPTS = {
    "openai (Python), Responses": "openai",
    "anthropic (Python)": "anthropic",
    "OpenAI Agents SDK": "agents",
}
PACKAGES = {
    "Codex": ("codex", "@openai/codex"),
    "Claude Code": ("claude", "@anthropic-ai/claude-code"),
    "opencode": ("opencode", "opencode-ai"),
    "Qwen Code": ("qwen", "@qwen-code/qwen-code"),
    "Continue": ("cn", "@continuedev/cli"),
}


@pytest.fixture
def talk(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, ScriptedService]]:
    with scripted(starter_path, tmp_path, monkeypatch, "starter") as made:
        yield made


@pytest.mark.parametrize("heading", SCRIPTS)
def test_examples_in_python(talk: tuple[Running, ScriptedService], tmp_path: Path, heading: str) -> None:
    if find_spec(SCRIPTS[heading]) is None:
        pytest.skip(f"the Python package `{SCRIPTS[heading]}` is not installed")
    server, service = talk
    service.script = [ANSWER]
    script = tmp_path / "example.py"
    script.write_text(example(heading, server.port), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout.strip(), done.returncode) == (ANSWER, 0), done.stderr


def program(agent: str) -> str:
    """An agent's program; skips the test where it is not installed."""
    name, package = PACKAGES[agent]
    folder = os.environ.get(FOLDER)
    found = shutil.which(name, path=folder and str(Path(folder) / "node_modules" / ".bin"))
    if found is None:
        pytest.skip(f"{agent} is not installed: `npm install {package}` in a folder, whose name is {FOLDER}")
    return found


def cut_off(command: list[str]) -> list[str]:
    """A command with loopback for its only network; skips the test where this cannot be had."""
    cut = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*cut, "true"], capture_output=True).returncode != 0:
        pytest.skip(
            "a network of its own, without a way out, needs `unshare` and `ip`, and the right to use them"
        )
    return [*cut, *command]


@pytest.mark.long
@pytest.mark.parametrize("agent", PACKAGES)
def test_a_coding_agent_does_a_whole_tool_round(starter_path: Path, tmp_path: Path, agent: str) -> None:
    """Question, call, result, answer; with no way out of the machine, and no refusal of what it asks for."""
    command = cut_off([sys.executable, str(HELPERS), agent, program(agent), str(starter_path), str(tmp_path)])
    places = {"PYTHONPATH": f"{SOURCES}:{HELPERS.parent}", "CORDEE_HOME": str(tmp_path / "state")}
    done = subprocess.run(
        command, env=os.environ | places, capture_output=True, text=True, timeout=2 * agent_round.SECONDS
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0, told
    assert agent_round.ANSWER in told["said"]
    assert told["thoughts"] == [agent_round.THOUGHT if agent_round.AGENTS[agent].thinks else ""]
    assert [agent_round.FACT in result for result in told["results"]] == [True]
    assert [status for _, _, status in told["statuses"]] == [200] * len(told["statuses"])
