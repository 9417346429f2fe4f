"""Runs a 32-bit program under emulation, and says how long a Pentium II would take.

Two passes: the first counts instructions and notes which ones there are (calls.c), the second feeds a trace
of the calls asked for to the timing model (model.c). Both are repeatable to the instruction.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pentium2_model.uops import write_table

HERE = Path(__file__).parent
HERTZ = 350e6
QEMU = ("qemu-i386", "-cpu", "pentium2")
QEMU_VERSIONS = ("7.", "8.")
# For two passes over the slowest case, a float program without optimisation.
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Memory:
    """Clocks from a cache miss to the line, and clocks for which a line occupies the bus."""

    dram_clocks: int
    bus_clocks: int


NORMAL, PESSIMISTIC = Memory(55, 28), Memory(70, 45)


@dataclass(frozen=True)
class Call:
    """A token on the modelled machine: one call of `forward`."""

    clocks: int
    instructions: int
    uops: int
    l1_misses: int
    dram_lines: int
    mispredictions: int

    @property
    def per_second(self) -> float:
        """Tokens a second at this speed."""
        return HERTZ / self.clocks


class MissingTool(Exception):
    """A tool is missing; the message is the command that installs it, or names the version needed."""


def check_tools() -> None:
    """Raises MissingTool if this machine lacks one."""
    needed = {"qemu-i386": "qemu-user", "gcc": "gcc-12-multilib libc6-dev-i386", "nm": "binutils"}
    missing = [package for tool, package in needed.items() if shutil.which(tool) is None]
    if missing:
        raise MissingTool(f"apt-get install -y {' '.join(missing)}")
    version = run(["qemu-i386", "--version"]).split()[2]
    if not version.startswith(QEMU_VERSIONS):
        raise MissingTool(f"qemu-user 7 or 8, whose plugin interface calls.c uses; this is {version}")


def run(command: Sequence[str | Path], pass_fds: Sequence[int] = ()) -> str:
    """The command's output. Raises RuntimeError with its standard error if it failed."""
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, pass_fds=pass_fds)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


class Machine:
    """The tools, built in a temporary folder that is removed after the block."""

    def __enter__(self) -> "Machine":
        check_tools()
        self._temporary = tempfile.TemporaryDirectory(prefix="cordee-pentium2-")
        self.folder = Path(self._temporary.name)
        compiler = ("gcc", "-O2", "-Wall", "-Wextra")
        run([*compiler, "-shared", "-fPIC", "-o", self.folder / "libcalls.so", HERE / "calls.c"])
        run([*compiler, "-o", self.folder / "model", HERE / "model.c", HERE / "memory.c"])
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def counts(self, program: Sequence[str | Path], calls: int) -> list[int]:
        """Instructions of each of the first `calls` tokens: from one call of `forward` to the next.

        Raises:
            RuntimeError: the program ended before.
        """
        counts = self.folder / "counts"
        self._qemu(program, calls + 1, f"counts={counts},code={self.folder / 'code'}")
        found = [int(line) for line in counts.read_text().split()]
        if len(found) < calls:
            raise RuntimeError(f"{Path(program[0]).name} ended after {len(found)} of {calls} tokens")
        return found

    def time(self, program: Sequence[str | Path], call: int, *memories: Memory) -> list[Call]:
        """The `call`-th token (from 1) with each memory, the caches as the token before left them.

        `counts` must have run the program that far.
        """
        table = self.folder / "uops"
        addresses = map(int, (self.folder / "code").read_text().split())
        write_table(Path(program[0]), addresses, table)
        clocks = [str(value) for memory in memories for value in (memory.dram_clocks, memory.bus_clocks)]
        reading, writing = os.pipe()
        model = subprocess.Popen(
            [self.folder / "model", table, *clocks], stdin=reading, stdout=subprocess.PIPE, text=True
        )
        os.close(reading)
        trace = f"first={max(call - 1, 1)},trace=/dev/fd/{writing}"
        try:
            self._qemu(program, call + 1, trace, pass_fds=(writing,))
        finally:
            os.close(writing)
            output, _ = model.communicate()
        lines = output.splitlines()[-len(memories) :]
        return [Call(*map(int, line.split())) for line in lines]

    def _qemu(
        self, program: Sequence[str | Path], last: int, options: str, pass_fds: Sequence[int] = ()
    ) -> None:
        plugin = f"{self.folder / 'libcalls.so'},start={forward(program[0])},last={last},{options}"
        name, *rest = QEMU
        run([name, "-plugin", plugin, *rest, *program], pass_fds)


def forward(program: str | Path) -> str:
    """The address of a program's function `forward`, in hexadecimal."""
    for line in run(["nm", program]).splitlines():
        *address, kind, name = line.split()
        if name == "forward" and kind in "tT":
            return address[0]
    raise RuntimeError(f"{program} has no function named forward")
