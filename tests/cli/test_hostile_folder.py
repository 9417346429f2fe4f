"""What lies in the folder that a user is in is data, whatever its name: no process of ours runs it."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cordee import children
from terminal import SECONDS

PROGRAM = Path(sys.executable).with_name("cordee")  # `python -m` would look in the current folder itself
MARK = 'import os\nopen(os.environ["RAN"], "a").write(f"{__name__} in {os.getpid()}\\n")\n'
# Modules that children import first thing, one of a library, one of the standard library that is a package,
# this package itself, and what Python would look for by itself.
NAMES = (
    "queue.py",
    "numpy.py",
    "cordee.py",
    "json/__init__.py",
    "runpy.py",
    "sitecustomize.py",
    "usercustomize.py",
)

pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="the program is not installed as a command")


@pytest.fixture(scope="module")
def starter_home(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Path:
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"CORDEE_HOME": str(home)}
    command = [PROGRAM, "pull", starter_path, "--name", "starter"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=SECONDS)
    return home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(MARK)
    return folder


@pytest.fixture
def environment(starter_home: Path, folder: Path, tmp_path: Path) -> dict[str, str]:
    startup = {"PYTHONSTARTUP": str(folder / "queue.py"), "PYTHONUSERBASE": str(folder)}
    return os.environ | startup | {"CORDEE_HOME": str(starter_home), "RAN": str(tmp_path / "ran")}


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path) -> Iterator[None]:
    yield
    ran = tmp_path / "ran"
    assert not ran.exists(), ran.read_text()


def cordee(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [PROGRAM, *arguments], cwd=folder, env=environment, input=b"", capture_output=True, timeout=SECONDS
    )


@pytest.mark.slow
def test_an_answer_imports_nothing_from_the_current_folder(folder: Path, environment: dict[str, str]) -> None:
    options = ("--max-tokens", "4", "--stages", "2", "--fast")
    done = cordee("run", "starter", "Hello", *options, folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


@pytest.mark.slow
def test_doctor_tries_the_same_as_elsewhere(folder: Path, environment: dict[str, str]) -> None:
    """It tries libllama's extra buffers in a child, whose failure would look like one of the machine."""
    found = [
        json.loads(cordee("doctor", "--json", folder=place, environment=environment).stdout)
        for place in (folder.parent, folder)
    ]
    assert found[0]["libllama"]["extra_buffers"] == found[1]["libllama"]["extra_buffers"]


@pytest.mark.parametrize("verb", [pytest.param("serve", marks=pytest.mark.slow), "up"])
def test_servers_import_nothing_from_the_current_folder(
    verb: str, folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    if verb == "serve":
        options = ["starter", "--port", "0"]
    else:
        environment["CORDEE_HOME"] = str(tmp_path / "node")
        options = ["--listen", "127.0.0.1:0", "--scouting", "off", "--port", "0"]
    command = [PROGRAM, verb, *options]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            lines: list[str] = []
            while not any("http://" in line for line in lines):
                lines.append(process.stdout.readline().decode())
                assert lines[-1], "".join(lines)
            if verb == "serve":
                [address] = [word for word in lines[-1].split() if word.startswith("http://")]
                body = json.dumps({"model": "starter", "prompt": "Hello", "max_tokens": 3}).encode()
                request = urllib.request.Request(
                    f"{address.rstrip('/').removesuffix('/v1')}/v1/completions",
                    body,
                    {"Content-Type": "application/json"},
                )
                assert json.load(urllib.request.urlopen(request, timeout=SECONDS))["choices"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=SECONDS)


@pytest.mark.long
def test_a_demo_imports_nothing_from_the_current_folder(folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [PROGRAM, "demo", "--max-tokens", "4", "--temperature", "0"],
        cwd=folder,
        env=environment,
        input=b"Hello\n",
        capture_output=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_folder_that_was_deleted_is_no_obstacle(environment: dict[str, str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd "{gone}" && rmdir "{gone}" && exec "{PROGRAM}" run starter Hello --max-tokens 4'
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_a_child_imports_what_its_parent_does(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Also where the libraries are in a folder that only this process was told of, and not in UTF-8."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "helper.py").write_text(
        "import json, sys\ndef main(): print(json.dumps([sys.path, sys.argv[1:]]))\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", ["", str(folder), "relative", str(library), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    done = subprocess.run(
        children.command("helper", "a b", "é"), capture_output=True, check=True, timeout=SECONDS
    )
    path, arguments = json.loads(done.stdout)
    assert arguments == ["a b", "é"]
    assert path[0] == str(library)
    assert str(children.PACKAGE) in path
    assert not {"", "relative", str(folder)} & set(path)
