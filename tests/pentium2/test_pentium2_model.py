"""The timing model of the Pentium II (bench/pentium2_model) gives loops the clocks that the manuals give."""

import subprocess
from pathlib import Path

import pytest

from pentium2_model.machine import NORMAL, PESSIMISTIC, Call, Machine, Memory, MissingTool

ROUNDS = 2000
PROGRAM = """
.globl _start
.type forward, @function
_start:
    call forward
    call forward
    call forward
    call forward
    movl $1, %eax
    xorl %ebx, %ebx
    int $0x80
forward:
    movl $ROUNDS, %ecx
    movl $buffer, %esi
again:
    BODY
    decl %ecx
    jnz again
    ret
.globl forward
.comm buffer, 4194304, 4096
"""
# Body -> clocks and instructions of a round; the loop adds two instructions and at most two clocks.
LOOPS = {
    "a chain of products, 4 clocks each": ("imull %eax, %eax\n" * 8, 32, 8),
    "independent sums, two a clock": ("addl $1, %eax\naddl $1, %edx\n" * 8, 8, 16),
    "x87 sums in a chain, 3 clocks each": ("fadd %st(1), %st\n" * 8, 24, 8),
    "MMX products, one a clock": ("pmaddwd %mm1, %mm2\npmaddwd %mm1, %mm3\npmaddwd %mm1, %mm4\n" * 3, 9, 9),
}


@pytest.fixture(scope="module")
def machine() -> Machine:
    try:
        with Machine() as machine:
            yield machine
    except MissingTool as missing:
        pytest.skip(f"this needs: {missing}")


def measure(machine: Machine, folder: Path, body: str, memory: Memory = NORMAL) -> Call:
    """The third call of a `forward` that runs the body ROUNDS times; both passes must count the same."""
    source, program = folder / "loop.s", folder / "loop"
    source.write_text(PROGRAM.replace("ROUNDS", str(ROUNDS)).replace("BODY", body))
    subprocess.run(["gcc", "-m32", "-static", "-nostdlib", "-o", program, source], check=True)
    counts = machine.counts([program], 3)
    [call] = machine.time([program], 3, memory)
    assert counts[2] == call.instructions
    return call


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_takes_the_clocks_of_its_slowest_part(machine: Machine, tmp_path: Path, name: str) -> None:
    body, clocks, instructions = LOOPS[name]
    call = measure(machine, tmp_path, body)
    assert call.instructions == pytest.approx(ROUNDS * (instructions + 2), abs=10)
    assert clocks - 0.1 <= call.clocks / ROUNDS <= clocks + 2.1
    assert call.l1_misses < 10


@pytest.mark.parametrize("memory", [NORMAL, PESSIMISTIC])
def test_lines_of_memory_come_no_faster_than_the_bus(
    machine: Machine, tmp_path: Path, memory: Memory
) -> None:
    call = measure(machine, tmp_path, "movl (%esi), %eax\naddl $2048, %esi\n", memory)
    assert call.dram_lines == pytest.approx(ROUNDS, abs=10)
    assert call.clocks / ROUNDS == pytest.approx(memory.bus_clocks, rel=0.05)


def test_a_chain_of_lines_waits_for_each(machine: Machine, tmp_path: Path) -> None:
    chain = "addl (%esi), %esi\naddl $2048, %esi\n"  # the buffer is zero, but the processor cannot know
    call = measure(machine, tmp_path, chain)
    assert call.clocks / ROUNDS == pytest.approx(NORMAL.dram_clocks, abs=6)


def test_what_fits_a_cache_stays_there(machine: Machine, tmp_path: Path) -> None:
    first = "movl %ecx, %edx\nandl $127, %edx\nshll $5, %edx\nmovl buffer(%edx), %eax\n"  # 4 KB
    assert measure(machine, tmp_path, first).l1_misses < 10
    second = first.replace("$127", "$1023")  # 32 KB: too much for L1
    call = measure(machine, tmp_path, second)
    assert call.l1_misses > ROUNDS * 0.9
    assert call.dram_lines < 10
