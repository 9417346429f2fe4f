"""What others see of a process that holds a question: not the question, and no memory of a crash."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = (sys.executable, "-m", "cordee.cli.main")
SECRET = "the owls are not what they seem"
SECONDS = 120.0
PR_GET_DUMPABLE = 3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_question_does_not_stay_in_the_list_of_processes(home: Path) -> None:
    arguments = ("run", "starter", SECRET, "--system", SECRET, "--max-tokens", "200")
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE) as process:
        try:
            shown = Path(f"/proc/{process.pid}/cmdline")
            until = time.monotonic() + SECONDS
            while b"cordee run starter" not in shown.read_bytes():
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            assert SECRET.encode() not in shown.read_bytes()
            while not (children := psutil.Process(process.pid).children()):  # the vocabulary, and the stage
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            for child in children:
                assert SECRET not in " ".join(child.cmdline())
                limits = Path(f"/proc/{child.pid}/limits").read_text().splitlines()
                assert [line.split()[4:6] for line in limits if "core file" in line] == [["0", "0"]]
        finally:
            process.kill()


def test_nothing_of_a_process_is_dumped() -> None:
    script = (
        "import ctypes, resource\nfrom cordee import privacy\nprivacy.no_core_dumps()\n"
        f"print(ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == ["0", "(0,", "0)"], done.stderr
    assert ctypes.CDLL(None).prctl(PR_GET_DUMPABLE) == 1  # of the tests themselves: the check can fail
