"""Every verb where streams are closed, full or broken, and folders unusual: never a traceback."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cordee.agent import control
from cordee.agent.control import AgentSocket
from cordee.cli.main import cordee as program
from cordee.errors import BadRequest, NotRunning, StorageFailed
from cordee.worker import process as worker_process
from terminal import PROGRAM, SECONDS
from tiny import make_tiny

LONG = "/".join(["a-folder-with-a-long-name"] * 6)  # longer than the name of a socket may be
UP = ("up", "--until-eof", "--port", "0", "--scouting", "off", "--listen", "127.0.0.1:0")
# How each verb is called here, its exit code, and whether it prints a result; for others it is their help.
CALLS: Mapping[str, tuple[tuple[str, ...], int, bool]] = {
    "run": (("run", "nosuch", "hi"), 3, False),
    "serve": (("serve", "nosuch", "--port", "0"), 3, False),
    "pull": (("pull", "tiny.gguf"), 0, True),
    "ls": (("ls", "--json"), 0, True),
    "show": (("show", "nosuch"), 3, False),
    "rm": (("rm", "nosuch"), 3, False),
    "convert": (("convert", "nosuch.gguf", "-o", "x.gguf"), 2, False),
    "export": (("export", "nosuch", "folder", "--for", "pentium2"), 3, False),
    "plan": (("plan", "nosuch"), 3, False),
    "up": (UP, 0, False),
    "invite": (("invite",), 13, False),
    "join": (("join", "nonsense"), 12, False),
    "nodes": (("nodes", "--json"), 13, False),
    "status": (("status",), 13, False),
    "deploy": (("deploy", "nosuch"), 13, False),
    "undeploy": (("undeploy", "nosuch"), 13, False),
    "drain": (("drain",), 13, False),
    "leave": (("leave",), 2, False),
    "remove": (("remove", "nosuch"), 13, False),
    "ps": (("ps", "--json"), 0, True),
    "bench": (("bench", "nosuch"), 3, False),
    "demo": (("demo", "--max-tokens", "0"), 2, False),
}
QUICK = ("ls", "run", "up")  # one of each kind: it prints a result, it computes, it stays
VERBS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, command in program.commands.items()
    if not command.hidden
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The current folder of the verbs, with a model's file in it."""
    make_tiny("llama", tmp_path / "tiny.gguf")
    return tmp_path


def call(
    verb: str, folder: Path, redirections: str = "</dev/null", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    arguments, _, _ = CALLS.get(verb, ((verb, "--help"), 0, True))
    command = ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *arguments]
    settings = os.environ | {"CORDEE_HOME": str(folder / "home")} | environment
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, timeout=SECONDS)
    assert b"Traceback" not in done.stderr + done.stdout, done.stderr.decode()
    return done


def expected(verb: str, unwritable: int) -> int:
    """A verb's exit code where its result cannot be written."""
    _, code, prints = CALLS.get(verb, ((), 0, True))
    return unwritable if prints else code


@pytest.mark.parametrize("verb", VERBS)
def test_all_streams_closed(verb: str, folder: Path) -> None:
    assert call(verb, folder, "<&- >&- 2>&-").returncode == expected(verb, 7)


@pytest.mark.parametrize("verb", ["ls", "run", "up"])
def test_a_full_disk_behind_both_streams(verb: str, folder: Path) -> None:
    assert call(verb, folder, "</dev/null >/dev/full 2>/dev/full").returncode == expected(verb, 7)


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_behind_the_result_is_told(verb: str, folder: Path) -> None:
    done = call(verb, folder, "</dev/null >/dev/full", PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert done.returncode == expected(verb, 7)
    said = done.stderr.decode("latin-1")
    assert ("standard output (No space left on device)" in said) == (done.returncode == 7)


@pytest.mark.parametrize("verb", VERBS)
def test_a_state_folder_that_cannot_be_written(verb: str, folder: Path) -> None:
    code = expected(verb, 0)
    done = call(verb, folder, CORDEE_HOME="/sys/cordee")  # not even root may make a folder there
    assert done.returncode in {code, 7}
    if done.returncode == 7:
        assert b"state folder /sys/cordee cannot be created" in done.stderr
        assert b"set CORDEE_HOME" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_folders_with_long_and_foreign_names(verb: str, folder: Path) -> None:
    long = folder / LONG / "模型"
    (long / "tmp").mkdir(parents=True)
    settings = {"CORDEE_HOME": str(long / "home"), "TMPDIR": str(long / "tmp"), "PYTHONIOENCODING": "latin-1"}
    done = call(verb, folder, **settings)
    assert done.returncode == CALLS.get(verb, ((), 0, True))[1], done.stderr.decode()


def test_nobody_reads_the_result(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    settings = os.environ | {"CORDEE_HOME": str(folder / "home")}
    for arguments in (["ls", "--json"], ["--help"], ["run", "--help"]):
        done = subprocess.run([*PROGRAM, *arguments], stdout=writer, stderr=writer, env=settings)
        assert done.returncode == 141
    os.close(writer)


def test_a_pipe_that_was_made_non_blocking_gets_all() -> None:
    """As programs on Node.js make a pipe or terminal that they share with others."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    script = "from cordee.terminal import streams; streams.prepare(); print('x' * 1_000_000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as text:
            assert text.read() == b"x" * 1_000_000 + b"\n"
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("verb", ["run", "deploy", "pull"])
def test_an_argument_that_is_no_text(verb: str, folder: Path) -> None:
    home = {"CORDEE_HOME": str(folder / "home")}
    command = [*PROGRAM, verb, b"caf\xe9", *(["hi"] if verb == "run" else [])]
    done = subprocess.run(command, capture_output=True, env=os.environ | home, cwd=folder, timeout=SECONDS)
    assert done.returncode in (2, 3)
    assert b"Traceback" not in done.stderr
    assert b"caf" in done.stderr


def test_a_state_folder_whose_name_is_no_text(folder: Path) -> None:
    done = call("ls", folder, CORDEE_HOME=str(folder / os.fsdecode(b"caf\xe9")))
    assert done.returncode == 7
    assert rb"caf\xe9, is not UTF-8: set CORDEE_HOME" in done.stderr


# Sockets


def test_a_model_runs_where_names_are_too_long_for_sockets(folder: Path) -> None:
    long = folder / LONG
    (long / "tmp").mkdir(parents=True)
    settings = os.environ | {"CORDEE_HOME": str(long / "home"), "TMPDIR": str(long / "tmp")}
    arguments = ("run", "starter", "Hi", "--max-tokens", "2", "--stages", "2", "--fast")
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, env=settings, timeout=SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip()


@pytest.mark.parametrize("length", [0, 40, 200])
def test_the_agent_is_found_however_long_its_folders_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    home = tmp_path / ("x" * length or "home")
    monkeypatch.setenv("CORDEE_HOME", str(home))
    (home / "cluster").mkdir(parents=True)
    with pytest.raises(NotRunning):
        control.ask("GET", "/nodes")
    held = AgentSocket(home / "cluster")
    held.socket.listen()
    assert stat.S_IMODE((home / "cluster" / control.SOCKET).stat().st_mode) == 0o600
    with pytest.raises(BadRequest, match="already runs here"):
        AgentSocket(home / "cluster")
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + json.dumps({"nodes": 1}).encode()
    child = os.fork()
    if child == 0:
        connection, _ = held.socket.accept()
        connection.recv(4096)
        connection.sendall(answer)
        os._exit(0)
    assert control.ask("GET", "/nodes") == {"nodes": 1}
    os.waitpid(child, 0)
    held.close()
    assert not (home / "cluster" / control.SOCKET).exists()
    with pytest.raises(NotRunning):
        control.ask("GET", "/nodes")


@pytest.mark.parametrize("name", ["short", "x" * 200])
def test_the_folder_of_the_workers_sockets_is_ours_alone(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runtime = short_path / "runtime"
    monkeypatch.setattr(worker_process.tempfile, "tempdir", str(short_path / name))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    for place in (short_path / name, runtime):
        place.mkdir()
    made, lock = worker_process._own_folder()
    assert made.parent == (short_path / name if name == "short" else runtime)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert made.stat().st_uid == os.geteuid()
    lock.close()
    again, lock = worker_process._own_folder()
    assert not made.exists(), "nobody holds it any more"
    lock.close()
    worker_process.shutil.rmtree(again)


def test_no_place_for_sockets_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "TOP_BYTES_MAX", 3)
    with pytest.raises(StorageFailed, match="set TMPDIR"):
        worker_process._own_folder()
