"""The last stage's word on guesses: which rows are right, by what it drew itself (docs/speculation.md).

A token is drawn from the logits of the row before it, as if there were no guesses. The row that follows is
right if it has the position and the token that were drawn. All other rows are stale: those behind a wrong
guess, and those that were sent before the host heard of it. They are dropped, and the next row that is right
takes their place, here and in every stage.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from cordee.engine.stage import Batch
from cordee.worker.messages import Run

T = TypeVar("T")


class Drawn:
    """What was drawn last in each sequence: the row that comes next, if it is right."""

    def __init__(self) -> None:
        self._next: dict[int, tuple[int, int, int]] = {}  # tenure, position and token, by sequence

    def clear(self) -> None:
        """Forget every sequence."""
        self._next.clear()

    def is_stale(self, run: Run) -> bool:
        """Whether a run begins with a guess that is wrong, or follows one."""
        if not run.guess or run.rows > len(run.guess):
            return False
        return self._next.get(run.sequence) != (run.tenure, run.first_position, run.guess[0])

    def draw(self, run: Run, rows: Iterable[T], choose: Callable[[T], int | None]) -> None:
        """Draw a token from each of a run's rows of logits (`outputs_of` it), as long as the guesses between
        them are right. `choose` gives the token of a row; None if nothing may follow it."""
        position = run.first_position + run.rows - outputs_of(run)
        for row, guess in zip(rows, _guesses_behind(run), strict=True):
            token = choose(row)
            position += 1
            if token is None:
                self.end(run.sequence)
                return
            self._next[run.sequence] = (run.tenure, position, token)
            if token != guess:
                return

    def end(self, sequence: int) -> None:
        """No token follows in a sequence."""
        self._next.pop(sequence, None)


def outputs_of(run: Run) -> int:
    """How many of a run's rows may give a token."""
    return 0 if not run.output else min(len(run.guess) + 1, run.rows)


def _guesses_behind(run: Run) -> Iterator[int | None]:
    """For each row that may give a token, the guess that was made of it; None for the last one."""
    yield from run.guess[len(run.guess) + 1 - outputs_of(run) :]
    yield None


def without(runs: Sequence[Run], stale: Sequence[bool], batch: Batch) -> tuple[tuple[Run, ...], Batch]:
    """A micro-batch without its stale runs."""
    kept = ~np.repeat(np.array(stale), [run.rows for run in runs])
    left = tuple(run for run, dropped in zip(runs, stale, strict=True) if not dropped)
    return left, Batch(batch.inputs[kept], batch.positions[kept], batch.sequences[kept], batch.outputs[kept])
