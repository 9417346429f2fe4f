"""The demo as users see it: three nodes and a terminal; a node is killed while it answers."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
import pytest

from cordee.cli.options import Size
from cordee.machine.devices import own_devices
from terminal import PROGRAM, SECONDS, Terminal

QUESTION = "Tell me a story about three climbers on a mountain."
OPTIONS = ("--temperature", "0", "--max-tokens", "120")
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Path:
    """A state folder with the starter model. The folders of the first demo's nodes stay for the others."""
    home = tmp_path_factory.mktemp("demo")
    command = [*PROGRAM, "pull", str(starter_path), "--name", "starter"]
    subprocess.run(command, env=os.environ | {"CORDEE_HOME": str(home)}, check=True, capture_output=True)
    return home


def processes(home: Path) -> list[psutil.Process]:
    """All processes whose state folder lies in `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CORDEE_HOME", "").startswith(str(home)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def asked(chat: Terminal, *, kill: bool) -> str:
    """The answer to QUESTION in a new conversation, without notes about nodes and without white space."""
    chat.type("/reset\n")
    chat.until("forgotten")
    chat.until("> ")
    chat.type(f"{QUESTION}\n")
    chat.until("\r\n")
    shown = ""
    if kill:
        shown = chat.until(" ")  # the answer has begun
        chat.type("/kill\n")
        before, _, _ = chat.until("> /kill\r\n").rpartition("> /kill")
        shown += before
        before, _, gone = chat.until("with it").rpartition("node ")
        assert re.match(r"[bc] is gone, and layers \d+-\d+ ", gone)
        shown += before
        shown += chat.until("the answer goes on (").removesuffix("the answer goes on (")
        chat.until(" s)")
    shown += chat.until("\r\n> ").removesuffix("> ")
    chat.shown = "> " + chat.shown  # put back
    chat.until("> ")
    text = re.sub(r"node [bc] is back", "", CONTROLS.sub("", shown))
    return re.sub(r"\s", "", text)


def test_an_answer_goes_on_when_a_node_is_killed_in_its_middle(demo_home: Path) -> None:
    chat = Terminal("demo", *OPTIONS, home=demo_home)
    table = chat.until("> ")
    assert table.count("alive") == 3
    firsts = sorted(map(int, re.findall(r" (\d+)-\d+ ", table)))
    assert firsts[0] == 0, "a node has the first layers"
    assert len(firsts) > 1, "and another node the others"
    undisturbed = asked(chat, kill=False)
    assert len(undisturbed) > 200
    assert asked(chat, kill=True) == undisturbed
    chat.type("/quit\n")
    assert chat.exit_code() == 0
    assert processes(demo_home) == []


@pytest.fixture
def running(demo_home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that runs the demo, with the nodes up."""
    script = '"$@"; true'  # or the shell would become the demo
    environment = os.environ | {"CORDEE_HOME": str(demo_home)}
    command = ["/bin/sh", "-c", script, "sh", *PROGRAM, "demo"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as shell:
        said = b""
        for line in shell.stderr:
            said += line
            if b"alive" in line:
                break
        else:
            pytest.fail(f"the demo ended: {said.decode()}")
        yield shell
        shell.kill()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("its parent is killed", marks=pytest.mark.slow),
        pytest.param("SIGKILL", marks=pytest.mark.slow),
        pytest.param("SIGTERM", marks=pytest.mark.long),
        pytest.param("SIGHUP", marks=pytest.mark.long),
        pytest.param("SIGINT", marks=pytest.mark.long),
    ],
)
def test_no_process_outlives_the_demo(demo_home: Path, running: subprocess.Popen[bytes], how: str) -> None:
    [program] = psutil.Process(running.pid).children()
    assert len(processes(demo_home)) > 5, "shell, demo, three nodes, workers"
    if how == "its parent is killed":
        running.kill()
    else:
        program.send_signal(signal.Signals[how])
        if how == "SIGINT":  # it only ends a line; the end of its input ends the demo
            running.stdin.close()
    ends = time.monotonic() + SECONDS
    while rest := processes(demo_home):
        assert time.monotonic() < ends, f"still there: {rest}"
        time.sleep(0.1)


@pytest.mark.long
def test_damaged_folders_of_the_last_demo_are_replaced(demo_home: Path) -> None:
    environment = os.environ | {"CORDEE_HOME": str(demo_home)}
    command = [*PROGRAM, "demo", "--max-tokens", "4"]
    for _ in range(2):
        done = subprocess.run(
            command, input=b"Hello\n", capture_output=True, env=environment, timeout=SECONDS
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        (demo_home / "demo" / "b" / "cluster" / "node.pem").write_text("nonsense")


def test_the_memory_of_a_node_is_given_as_a_size() -> None:
    size = Size()
    assert size.convert("16GB", None, None) == 16_000_000_000
    assert size.convert("1.5 MiB", None, None) == 3 << 19
    for wrong in ("16", "GB", "-1GB", "1e3GB", "16 Gbit"):
        with pytest.raises(click.BadParameter):
            size.convert(wrong, None, None)
    assert {device.memory_bytes for device in own_devices(1000)} == {1000}
