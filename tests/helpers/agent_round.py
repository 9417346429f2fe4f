"""A coding agent, installed from its registry, does one whole tool round against a scripted model.

Run with loopback for its only network, so that nothing leaves the machine: `agent_round.py AGENT PROGRAM
STARTER FOLDER`. The agent gets the settings of docs/clients.md and an empty HOME in FOLDER, reads a file
there by its own tool, and answers. What came of it is printed as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clients_page import example
from cordee.endpoints.app import Guard
from scripted_service import scripted

QUESTION = "What does summit.txt say?"
FACT = "4806 metres"
THOUGHT = "The file knows."
ANSWER = "It says that it has 4806 metres."
SECONDS = 180  # an agent starts in a few, on a busy machine in many


@dataclass(frozen=True)
class Agent:
    """An agent: its own tool that runs a command, what that calls the command and wants beside, how the
    agent is started, and where in HOME it reads what the page shows; else that is for the environment."""

    tool: str
    argument: str
    arguments: Sequence[str]
    settings: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])
    thinks: bool = True  # sends back what the model thought


AGENTS = {
    "Codex": Agent(
        "exec_command",
        "cmd",
        ["exec", "--skip-git-repo-check", "-s", "danger-full-access", QUESTION],
        ".codex/config.toml",
    ),
    "Claude Code": Agent("Bash", "command", ["-p", "--allowedTools", "Bash", "--", QUESTION]),
    "opencode": Agent("bash", "command", ["run", "--title", "x", QUESTION], ".config/opencode/opencode.json"),
    "Qwen Code": Agent(
        "run_shell_command",
        "command",
        ["--yolo", QUESTION],
        beside={"is_background": False},
    ),
    "Continue": Agent(
        *("Bash", "command", ["-p", "--allow", "Bash", QUESTION], ".continue/config.yaml"), thinks=False
    ),
}


def environment(agent: str, port: int, home: Path) -> dict[str, str]:
    """The settings of the page."""
    given = {"PATH": os.environ["PATH"], "HOME": str(home)}
    settings = example(agent, port)
    if name := AGENTS[agent].settings:
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(settings, encoding="utf-8")
        return given
    exports = (line.removeprefix("export ").split("=", 1) for line in settings.splitlines())
    return given | dict(exports)


def recorded(statuses: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the status of each request's reply."""
    own = Guard.__call__

    async def call(guard: Guard, scope: Any, receive: Any, send: Any) -> None:
        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append((scope["method"], scope["path"], message["status"]))
            await send(message)

        await own(guard, scope, receive, noting)

    monkeypatch.setattr(Guard, "__call__", call)


def main(agent: str, program: str, starter: str, folder: str) -> None:
    """One round."""
    of = AGENTS[agent]
    home = Path(folder)
    work = home / "work"
    work.mkdir()
    (work / "summit.txt").write_text(FACT, encoding="utf-8")
    statuses: list[tuple[str, str, int]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorded(statuses, monkeypatch)
        with scripted(Path(starter), home / "store", monkeypatch, "starter") as (server, service):
            said = {of.argument: "cat summit.txt", "description": "Read the file", **of.beside}
            service.script = [f"[think]{THOUGHT}[say]I look.[call {of.tool}]{json.dumps(said)}", ANSWER]
            done = subprocess.run(
                [program, *of.arguments],
                env=environment(agent, server.port, home),
                cwd=work,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            sent = [each for turn in service.turns for each in turn.messages]
    told = {"code": done.returncode, "said": done.stdout, "errors": done.stderr[-2000:]}
    thoughts = [each.thinking for each in sent if each.tool_calls]
    results = [each.content for each in sent if each.role == "tool"]
    print(json.dumps(told | {"statuses": statuses, "thoughts": thoughts, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
