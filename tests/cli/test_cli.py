"""The program as users see it: real processes, what they print where, and how they end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import cli_reference
from chat_families import QWEN, THINKER
from cordee import __version__, errors
from cordee.cli.main import cordee as program
from cordee.cli.main import exit_codes, subclasses
from cordee.engine.llama.libllama import usable_cores
from cordee.machine import hardware
from cordee.machine.memory import memory
from cordee.terminal import output
from terminal import PROGRAM, SECONDS, Terminal
from tiny import make_tiny


@pytest.fixture(scope="module")
def starter_home(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Path:
    """A state folder whose store holds the starter model."""
    home = tmp_path_factory.mktemp("home")
    assert cordee("pull", str(starter_path), "--name", "starter", home=home).returncode == 0
    return home


def cordee(*arguments: str, home: Path, stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"CORDEE_HOME": str(home)}
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, capture_output=True, env=environment, timeout=SECONDS
    )


# What the program says of itself


def test_the_reference_is_current() -> None:
    assert cli_reference.TARGET.read_text(encoding="utf-8") == cli_reference.reference(), "run `make docs`"


@pytest.mark.parametrize(("old", "verb"), [("share", "deploy"), ("unshare", "undeploy")])
def test_old_names_of_verbs_are_known_but_not_listed(home: Path, old: str, verb: str) -> None:
    assert program.commands[old].callback is program.commands[verb].callback
    helped = cordee(old, "--help", home=home).stdout.decode()
    assert helped.startswith(f"Usage: cordee {old} ")
    assert helped.partition("\n")[2] == cordee(verb, "--help", home=home).stdout.decode().partition("\n")[2]
    listed = cordee("--help", home=home).stdout.decode().partition("Commands:")[2]
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    assert verb in names
    assert old not in names
    reference = cli_reference.TARGET.read_text(encoding="utf-8")
    assert f"## cordee {verb}\n" in reference
    assert f"cordee {old}\n" not in reference
    assert f"cordee {old} " not in reference


def test_version(home: Path) -> None:
    done = cordee("--version", home=home)
    assert (done.returncode, done.stdout) == (0, f"cordee {__version__}\n".encode())


def test_every_error_has_its_exit_code_in_the_help(home: Path) -> None:
    text = cordee("--help", home=home).stdout.decode()
    codes = {kind.exit_code for kind in subclasses(errors.CordeeError)} | {0, 130, 141, 143}
    assert codes <= set(exit_codes())
    rows = {line.split()[0] for line in text.partition("Exit codes:")[2].splitlines() if line.strip()}
    assert {str(code) for code in codes} <= rows


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["run"], ["run", "starter", "hi", "--stages", "0"], ["run", "starter", "--seed", "-1"]],
)
def test_wrong_usage_ends_with_2_and_prints_no_answer(home: Path, arguments: list[str]) -> None:
    done = cordee(*arguments, home=home)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Usage: cordee" in done.stderr


# Errors: one line, the documented code


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["run", "nosuch", "hi"], 3, "nosuch"),
        (["show", "nosuch"], 3, "nosuch"),
        (["rm", "nosuch"], 3, "nosuch"),
        (["serve", "nosuch", "--port", "0"], 3, "nosuch"),
        (["serve", "--host", "0.0.0.0"], 2, "with keys and TLS"),
        (["serve", "--host", "example.org"], 2, "loopback"),
        (["serve", "--host", "::"], 2, "with keys and TLS"),
        (["serve", "--host", "127.0.0.1:9000"], 2, "loopback"),
        (["serve", "nosuch", "--host", "[::1]"], 3, "nosuch"),
        (["serve", "nosuch", "--host", "localhost"], 3, "nosuch"),
        (["run", "starter"], 2, "empty"),
        (["run", "starter", " "], 2, "empty"),
    ],
)
def test_errors_are_one_line_and_a_code(home: Path, arguments: list[str], code: int, word: str) -> None:
    done = cordee(*arguments, home=home)
    assert (done.returncode, done.stdout) == (code, b"")
    [line] = done.stderr.decode().splitlines()
    assert line.startswith("cordee: ")
    assert word in line


def test_a_text_file_is_no_model(home: Path, tmp_path: Path) -> None:
    (tmp_path / "novel.gguf").write_text("It was a dark and stormy night.")
    done = cordee("pull", str(tmp_path / "novel.gguf"), home=home)
    assert done.returncode == 4
    assert b"novel.gguf" in done.stderr
    assert json.loads(cordee("ls", "--json", home=home).stdout) == []


def test_a_prompt_that_is_no_text(home: Path) -> None:
    done = cordee("run", "starter", home=home, stdin=b"\xff\xfe")
    assert done.returncode == 2
    assert b"not UTF-8 text: convert it first" in done.stderr
    done = cordee("run", "starter", os.fsdecode(b"caf\xe9"), home=home)
    assert done.returncode == 2
    assert b"not UTF-8 text" in done.stderr


def test_a_port_in_use_shows_before_a_model_is_loaded(starter_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cordee("serve", "--port", str(port), home=starter_home)
    assert done.returncode == 2
    assert f"Port {port}" in done.stderr.decode()


# The store


def test_pull_ls_show_rm(home: Path, starter_path: Path) -> None:
    assert cordee("pull", str(starter_path), "--name", "small", home=home).returncode == 0
    [model] = json.loads(cordee("ls", "--json", home=home).stdout)
    assert model["name"] == "small"
    assert model["bytes"] == starter_path.stat().st_size
    assert model["digest"].startswith("sha256:")
    assert b"small" in cordee("ls", home=home).stdout
    assert cordee("rm", "small", home=home).returncode == 0
    assert json.loads(cordee("ls", "--json", home=home).stdout) == []


def test_show_tells_shape_fit_and_cuts(starter_home: Path) -> None:
    done = cordee("show", "starter", "--stages", "3", "--json", home=starter_home)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["architecture"] == "llama"
    assert facts["layers"] == 30
    assert 130e6 < facts["parameters"] < 140e6
    assert sum(facts["quantization_bytes"].values()) == facts["weights_bytes"]
    assert facts["cuts"] == {"allowed": True, "reason": None}
    stages = facts["fit"]["stages"]
    assert [stage["layers"][0] for stage in stages] == [0, *(stage["layers"][1] for stage in stages[:-1])]
    assert stages[-1]["layers"][1] == 30
    for stage in stages:
        parts = ("weights_bytes", "kv_bytes", "scratch_bytes", "runtime_bytes")
        assert stage["total_bytes"] == sum(stage[part] for part in parts)
    text = cordee("show", "starter", home=starter_home).stdout.decode()
    assert "30" in text
    assert "llama" in text


# Answers


def test_the_answer_alone_is_on_standard_output(starter_home: Path) -> None:
    line = ("run", "starter", "Say hello.", "--temperature", "0", "--max-tokens", "8")
    first = cordee(*line, home=starter_home)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    assert first.stdout.endswith(b"\n")
    piped = cordee("run", "starter", *line[3:], home=starter_home, stdin=b"Say hello.")
    assert piped.stdout == first.stdout
    cut = cordee(*line, "--stages", "3", "--stats", home=starter_home)
    assert cut.stdout == first.stdout
    assert b"tokens/s" in cut.stderr
    assert b"tokens/s" not in first.stderr


def test_a_seed_fixes_the_answer(starter_home: Path) -> None:
    line = ("run", "starter", "Tell a story.", "--temperature", "1", "--max-tokens", "12", "--seed")
    answers = [cordee(*line, seed, home=starter_home).stdout for seed in ("7", "7", "8")]
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_longer_than_the_context(starter_home: Path) -> None:
    done = cordee("run", "starter", "--context", "64", home=starter_home, stdin=b"rope " * 200)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"context" in done.stderr


@pytest.mark.skipif(memory().available_bytes > 50e9, reason="256 answers of 8192 tokens fit this machine")
def test_what_does_not_fit_is_refused_before_it_is_loaded(starter_home: Path) -> None:
    """256 x 8192 tokens of the starter model's KV cache are 48 GB."""
    done = cordee("serve", "--port", "0", "--sequences", "256", "--context", "8192", home=starter_home)
    assert done.returncode == 6
    assert b"does not fit" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_the_starter_enters_an_empty_store_by_itself(home: Path) -> None:
    if not (Path(sys.prefix) / "share" / "cordee" / "starter.gguf").is_file():
        pytest.skip("no starter model beside this interpreter")
    done = cordee("run", "starter", "Hi", "--max-tokens", "2", home=home)
    assert done.returncode == 0, done.stderr
    assert [model["name"] for model in json.loads(cordee("ls", "--json", home=home).stdout)] == ["starter"]


def test_a_closed_pipe_ends_it_quietly(starter_home: Path) -> None:
    command = [
        *PROGRAM,
        "run",
        "starter",
        "Count to one hundred.",
        "--temperature",
        "0",
        "--max-tokens",
        "200",
    ]
    environment = os.environ | {"CORDEE_HOME": str(starter_home)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors_text = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in errors_text


def test_sigterm_leaves_nothing_behind(starter_home: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "run", "starter", "Count to one hundred.", "--temperature", "0"]
    environment = os.environ | {"CORDEE_HOME": str(starter_home), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        process.stdout.read(1)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []
    assert json.loads(cordee("ps", "--json", home=starter_home).stdout) == []


def test_a_chat_remembers_stops_and_leaves(starter_home: Path) -> None:
    chat = Terminal("run", "starter", "--temperature", "0", "--max-tokens", "300", home=starter_home)
    chat.until("> ")
    chat.type("/help\n")
    chat.until("forget the conversation")
    chat.until("> ")
    chat.type("Write a long story about a mountain.\n")
    chat.until("mountain.\r\n")
    chat.until(" ")  # the answer has begun
    chat.type("\x03")
    chat.until("(stopped)")
    chat.until("> ")
    chat.type("/stats\n")
    assert "tokens" in chat.until("prompt of")
    chat.until("> ")
    chat.type("/reset\n")
    chat.until("forgotten")
    chat.until("> ")
    chat.type("/quit\n")
    assert chat.exit_code() == 0


def test_a_key_in_the_middle_of_an_answer_neither_hides_it_nor_stands_in_it(starter_home: Path) -> None:
    arguments = ("run", "starter", "--temperature", "0", "--max-tokens", "60")
    chat = Terminal(*arguments, home=starter_home, term="xterm", columns=40)
    chat.until("> ")
    chat.type("Tell me a story about a mountain.\r")
    chat.until("mountain.\r\n")
    begun = chat.until(" ")
    chat.type("/sta")
    answer = begun + chat.until("> ").removesuffix("> ")
    chat.shown = "> " + chat.shown
    assert "/sta" not in answer
    answer = re.sub(r"\x1b\[[0-9;?]*[a-z]", "", answer)
    body = answer.partition("cordee:")[0].splitlines()
    assert len("".join(body)) > 60, "it went on"
    assert max(map(len, body)) <= 40
    chat.type("ts\r")
    assert "60 tokens" in chat.until("prompt of")
    chat.until("> ")
    chat.type("/quit\r")
    assert chat.exit_code() == 0


def test_a_pipe_and_a_prompt_are_both_used(starter_home: Path) -> None:
    letter = b"Dear Ada, the rope is ready. " * 5
    line = ("run", "starter", "--temperature", "0", "--max-tokens", "8", "--stats")
    both = cordee(*line, "Summarise this.", home=starter_home, stdin=letter)
    assert both.returncode == 0, both.stderr
    joined = cordee(*line, home=starter_home, stdin=letter + b"\n\nSummarise this.")
    assert both.stdout == joined.stdout
    counts = [re.search(rb"prompt of (\d+) tokens", each.stderr)[1] for each in (both, joined)]
    assert counts[0] == counts[1]
    assert int(counts[0]) > 40, "the letter alone has more"


def test_nothing_of_a_prompt_is_written_to_disk(starter_home: Path) -> None:
    secret = "xylophone-4711"
    assert cordee("run", "starter", secret, "--max-tokens", "2", home=starter_home).returncode == 0
    files = [path for path in starter_home.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert not [path for path in files if secret.encode() in path.read_bytes()]


# Services


def answer(url: str, question: dict | None = None) -> dict:
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


def test_serve_answers_is_listed_and_ends_gracefully(starter_home: Path) -> None:
    command = [*PROGRAM, "serve", "--port", "0", "--stages", "2"]
    environment = os.environ | {"CORDEE_HOME": str(starter_home)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            base = next(word for line in process.stderr for word in line.split() if word.endswith("/v1"))
            [listed] = json.loads(cordee("ps", "--json", home=starter_home).stdout)
            assert listed["model"] == "starter"
            assert [stage["index"] for stage in listed["stages"]] == [0, 1]
            assert "starter" in {model["id"] for model in answer(f"{base}/models")["data"]}
            question = {"model": "starter", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            assert answer(f"{base}/chat/completions", question)["usage"]["completion_tokens"] == 2
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
    assert process.returncode == 0
    assert json.loads(cordee("ps", "--json", home=starter_home).stdout) == []


# The machine


def test_doctor_tells_what_this_machine_has(home: Path) -> None:
    done = cordee("doctor", "--json", home=home)
    facts = json.loads(done.stdout)
    assert done.returncode == int(any(finding["problem"] for finding in facts["findings"]))
    assert facts["processor"]["cores"] == usable_cores()
    assert facts["memory"]["total_bytes"] > facts["memory"]["available_bytes"] > 0
    assert facts["disk"]["folder"] == str(home)
    assert facts["libllama"]["devices"]


CPUINFO = """processor\t: 0
model name\t: Imaginary Xeon
flags\t\t: fpu sse4_2 avx avx2 amx_tile amx_int8
"""


def test_processor_is_read_from_cpuinfo() -> None:
    read = hardware.processor(CPUINFO)
    assert read.name == "Imaginary Xeon"
    assert read.instruction_sets == ("sse4_2", "avx", "avx2", "amx_tile", "amx_int8")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes(nbytes: float, text: str) -> None:
    assert output.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (100_000, "1 d 3 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert output.duration(seconds) == text


def test_what_a_model_thinks_is_not_printed(tmp_path: Path) -> None:
    """A model of random weights whose prompt ends in <think> never comes to say anything."""
    said = {}
    for name, template in (("thinker", THINKER), ("talker", QWEN)):
        path = make_tiny("llama", tmp_path / f"{name}.gguf", layers=1, tokenizer="bytes", template=template)
        assert cordee("pull", str(path), "--name", name, home=tmp_path / "home").returncode == 0
        line = ("run", name, "Hello", "--temperature", "0", "--max-tokens", "12")
        done = cordee(*line, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert said["thinker"] == b"\n"
    assert said["talker"].strip()
