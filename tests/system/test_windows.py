"""setup.exe and what it installs, under Wine: the verbs, and a cluster of a Linux and a Windows node.

WINDOWS_ROOT names the Debian of packaging/windows/chroot.sh, and `make windows` has made the installer. Wine
is not Windows, but it keeps to the rules of locks and open files, and runs the very programs.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cordee
from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from cordee.models.cards import cards

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "dist" / f"cordee-{cordee.__version__}-setup.exe"
DEBIAN = Path(os.environ.get("WINDOWS_ROOT", ROOT / "build" / "windows-root"))
MODEL = cards()["starter"].path
SECONDS = 600  # Wine starts slowly, and the machine may be busy
MISSING = [path for path in (SETUP, DEBIAN / "usr/bin/wine") if not path.exists()]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to enter another Debian"),
    pytest.mark.skipif(bool(MISSING), reason=f"`make windows` makes {', '.join(map(str, MISSING))}"),
]
# A place of its own for what it mounts; the program takes the place of the shell, so that it can be killed.
ENTER = """
mount --bind /proc "$0/proc" && mount --bind "$1" "$0/mnt" && root=$0 && shift && exec chroot "$root" "$@"
"""


class Windows:
    """A user's Windows in a folder, with Cordée installed in C:\\Cordee."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.home = "C:\\home"
        self._environment = {
            "PATH": "/usr/sbin:/usr/bin:/bin",
            "HOME": "/mnt",
            "LC_ALL": "C.UTF-8",
            "WINEPREFIX": "/mnt/prefix",
            "WINEDEBUG": "-all",
            "PYTHONUTF8": "1",
        }

    def command(self, *arguments: str) -> list[str]:
        """The command line of a program of Windows."""
        return ["unshare", "--mount", "sh", "-c", ENTER, str(DEBIAN), str(self._folder), "wine", *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of Windows."""
        return subprocess.run(
            self.command(*arguments),
            env=self._environment | {"CORDEE_HOME": self.home},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )

    def cordee(self, *arguments: object) -> str:
        """Run a verb that must succeed; what it prints."""
        done = self.run(*self.verb(*arguments))
        assert done.returncode == 0, f"{arguments}: {done.stdout} {done.stderr}"
        return done.stdout

    def verb(self, *arguments: object) -> list[str]:
        return ["C:\\Cordee\\python.exe", "-m", "cordee.cli.main", *map(str, arguments)]

    @contextlib.contextmanager
    def running(self, *arguments: object) -> "Iterator[subprocess.Popen[str]]":
        """A verb that goes on, until the block ends; its output is in the folder's `said`."""
        with (self._folder / "said").open("a") as log:
            process = subprocess.Popen(
                self.command(*self.verb(*arguments)),
                env=self._environment | {"CORDEE_HOME": self.home},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def exists(self, name: str) -> bool:
        return (self._folder / "prefix" / "drive_c" / name).exists()


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Windows]:
    folder = tmp_path_factory.mktemp("windows")
    shutil.copyfile(SETUP, folder / "setup.exe")
    installed = Windows(folder)
    done = installed.run("Z:\\mnt\\setup.exe", "/S", "/D=C:\\Cordee")
    assert done.returncode == 0, done.stderr
    yield installed
    installed.run("wineboot", "--end-session", "--force", "--kill")


def test_it_installs_what_answers(windows: Windows) -> None:
    assert windows.exists("Cordee/python.exe")
    assert cordee.__version__ in windows.cordee("--version")
    assert "starter" in windows.cordee("models")


def test_a_model_says_the_same_cut_in_three_as_whole(windows: Windows) -> None:
    asked = ("run", "starter", "The capital of France is", "--max-tokens", 16, "--temperature", 0)
    whole = windows.cordee(*asked)
    assert whole.split()
    assert windows.cordee(*asked, "--stages", 3) == whole


def test_a_ternary_model_tells_what_it_tells_on_linux(windows: Windows, tmp_path: Path) -> None:
    asked = ("run", "story", "Once upon a time", "--max-tokens", 24, "--temperature", 0)
    assert windows.cordee(*asked).split() == Node(tmp_path).do(*asked).split()


@pytest.mark.parametrize("victim", ["windows", "linux"])
def test_an_answer_from_both_systems_goes_on_when_either_falls(
    windows: Windows, tmp_path: Path, victim: str
) -> None:
    """Neither has memory for the whole model; a third node, which comes later, steps in."""
    cluster = Cluster(tmp_path, MODEL, "--memory", MEMORY, "--scouting", "off")
    windows.home = f"C:\\home-{victim}"
    try:
        linux = cluster.add("linux")
        windows.cordee("join", linux.do("invite").strip())
        listen = ("--listen", "127.0.0.1:0", "--port", "0", "--scouting", "off")
        with windows.running("up", "--name", "windows", "--memory", MEMORY, *listen) as node:
            until(lambda: linux.states().get("windows") == "alive")
            linux.do("deploy", "starter", *SERVED)
            until(lambda: linux.model("starter")["state"] == "ready")
            assert {"windows", "linux"} <= with_layers(linux)
            spare = cluster.add("spare")
            until(lambda: spare.model("starter")["state"] == "ready")
            question = [{"role": "user", "content": "Count from one to thirty, in words."}]
            with spare.client() as client:
                answer = client.chat.completions.create(
                    model="starter", messages=question, max_tokens=96, stream=True, temperature=0
                )
                text = next(answer).choices[0].delta.content or ""
                (node if victim == "windows" else linux.process).kill()
                text += "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            assert len(text.split()) > 20
            assert victim not in with_layers(spare)
    finally:
        cluster.close()


def with_layers(node: Node) -> set[str]:
    """The names of the living nodes that run layers."""
    return {
        each["name"]
        for each in node.asked("/nodes")["nodes"]
        if each["state"] == "alive" and any(stage["layers"] for stage in each["stages"])
    }


def test_it_uninstalls(windows: Windows) -> None:
    windows.run("C:\\Cordee\\uninstall.exe", "/S")
    until(lambda: not windows.exists("Cordee/python.exe"))
