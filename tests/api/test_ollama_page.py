"""What docs/clients.md has people copy for Ollama's API works as it stands; what front ends send, too."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clients_page import example
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, SECONDS, Running, running

SCRIPTS = {"ollama (Python)": "ollama", "langchain-ollama": "langchain_ollama", "litellm": "litellm"}
QUESTION = {"role": "user", "content": "Why do climbers rope together?"}


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    config = ServiceConfig(context=128)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config) as started:
        yield started


@pytest.mark.long
@pytest.mark.parametrize("heading", SCRIPTS)
def test_examples_in_python(server: Running, tmp_path: Path, heading: str) -> None:
    if find_spec(SCRIPTS[heading]) is None:
        pytest.skip(f"the Python package `{SCRIPTS[heading]}` is not installed")
    script = tmp_path / "example.py"
    script.write_text(example(heading, server.port), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=3 * SECONDS)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5


# What Open WebUI and LibreChat send, as their sources have it; neither is a dependency of the tests.
FRONT_ENDS = [
    ("GET", "/api/version", None),
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("POST", "/api/show", {"name": "starter"}),
    (
        "POST",
        "/api/chat",
        {
            "model": "starter",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "keep_alive": "5m",
            "think": False,
            "options": {
                "num_ctx": 128,
                "num_predict": 1,
                "num_keep": 24,
                "num_batch": 512,
                "num_gpu": 1,
                "num_thread": 2,
                "repeat_last_n": 64,
                "tfs_z": 1,
                "mirostat": 0,
                "mirostat_eta": 0.1,
                "mirostat_tau": 5,
                "top_k": 40,
                "min_p": 0,
                "use_mmap": True,
                "use_mlock": False,
                "seed": 0,
                "stop": ["</s>"],
            },
        },
    ),
    ("GET", "/v1/models", None),
    (
        "POST",
        CHAT,
        {
            "model": "starter",
            "messages": [{**QUESTION, "name": "Anne-Zoë"}],
            "stream": True,
            "max_tokens": 1,
            "user": "6650a1",
            "stop": ["||>", "\nUser:", "<|diff_marker|>"],
            "promptCache": False,
            "num_ctx": 128,
            "repeat_last_n": 64,
        },
    ),
]


@pytest.mark.parametrize(("method", "path", "body"), FRONT_ENDS)
def test_what_front_ends_send_is_no_error(server: Running, method: str, path: str, body: Any) -> None:
    reply = server.request(method, path, body)
    assert reply.status == 200
    assert b'"error"' not in reply.body
    if path == "/api/chat":
        assert "x-cordee-ignored" not in reply.headers
