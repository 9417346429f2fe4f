"""How fast the old machine would run the program: instructions counted, clocks modelled, on any host."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from make_model import SHAPES, make_model
from pentium2 import beginning
from pentium2_machine import old_program
from pentium2_model.machine import NORMAL, Machine, MissingTool

MILLION = 1_000_000


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    try:
        with Machine() as machine:
            yield machine
    except MissingTool as missing:
        pytest.skip(f"this needs: {missing}")


def program(folder: Path, shape: str, position: int) -> list[str | Path]:
    """The command by which a random model of that shape reads `position` tokens and writes three."""
    model = folder / f"{shape}.gguf"
    make_model(model, replace(SHAPES[shape], layout="pentium2"))
    return [old_program(), model, beginning(model, position), "-n", "3", "--greedy"]


@pytest.mark.parametrize(("shape", "most"), [("15m", 11 * MILLION), ("260k", 0.5 * MILLION)])
def test_a_token_takes_no_more_instructions_than_promised(
    machine: Machine, tmp_path: Path, shape: str, most: float
) -> None:
    position = 4
    instructions = machine.counts(program(tmp_path, shape, position), position + 1)[position]
    assert most / 2 < instructions <= most


@pytest.mark.long
@pytest.mark.parametrize(("shape", "least"), [("15m", 30), ("260k", 450)])
def test_tokens_come_as_fast_as_promised(machine: Machine, tmp_path: Path, shape: str, least: int) -> None:
    position = 128
    command = program(tmp_path, shape, position)
    machine.counts(command, position + 1)
    [token] = machine.time(command, position + 1, NORMAL)
    assert token.per_second >= least
