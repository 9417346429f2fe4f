"""How much is asked of a model, and what gives way where memory is short.

People seldom say how many answers at a time and how much context they want. What they leave open is chosen:

- the usual, which a first request of a coding agent fits: SEQUENCES answers of 8,192 tokens;
- where there is much room on one machine, up to SEQUENCES_MOST answers of CONTEXT_LONG tokens: first the
  answers give way, then the context, until COMFORT times as many answers would fit, too. So the cache leaves
  most of the memory to other models, and to what else runs there;
- where the usual does not fit, fewer answers, down to one; then less context, down to CONTEXT_USEFUL.

What they do say is never changed: if it does not fit, they are told what would.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cordee.cluster.memory import CELLS_STEP, Demand

SEQUENCES, SEQUENCES_MOST = 4, 8  # answers at a time, unless somebody says otherwise
# By default the KV cache has room for this many tokens in all: 0.75 GB for the starter model.
CELLS_DEFAULT = 32768
# What coding agents send first has 31 to 78 kB, which are 8,000 to 20,000 tokens; then it grows.
CONTEXT_LONG = 32768
COMFORT = 4
# Nobody gets less context without asking for it: a question, and an answer of a page.
CONTEXT_USEFUL = 1024

Fits = Callable[[Demand], bool]


def usual_context(own: int | None, sequences: int | None = None) -> int:
    """Tokens for each of `sequences` answers unless asked for; `own` is what the model was made for."""
    return min(own or CELLS_DEFAULT, max(1, CELLS_DEFAULT // (sequences or SEQUENCES)))


def long_context(own: int | None) -> int:
    """Tokens for each answer where there is much room; `own` is what the model was made for."""
    return min(own or CONTEXT_LONG, CONTEXT_LONG)


class SizeRequest(NamedTuple):
    """What is asked of a model; None was not said.

    `usual` and `usual_sequences` are the context in tokens and the answers at a time that it then gets;
    `longest` is the context where there is much room, and 0 asks for no more than the usual.
    """

    context: int | None
    sequences: int | None
    usual: int
    usual_sequences: int = SEQUENCES
    longest: int = 0

    @property
    def full(self) -> Demand:
        """What it gets where memory is not short."""
        return Demand(self.context or self.usual, self.sequences or self.usual_sequences)

    @property
    def least(self) -> Demand:
        """The least that it may be given."""
        context = self.context or min(self.usual, CONTEXT_USEFUL)
        return Demand(context, self.sequences or 1)

    def largest(self, fits: Fits) -> Demand | None:
        """The most that fits, as the module's docstring has it; None if not even the least does.

        What fits must fit with less of anything.
        """

        def comfortable(demand: Demand) -> bool:
            return fits(Demand(demand.context, COMFORT * demand.sequences))

        found = _Descent(self._most, self.full).first(comfortable) if self.longest else None
        return found or _Descent(self.full, self.least).first(fits)

    @property
    def _most(self) -> Demand:
        """What it gets where there is much room."""
        context = self.context or max(self.longest, self.usual)
        return Demand(context, self.sequences or max(SEQUENCES_MOST, self.usual_sequences))

    def shortened(self, given: Demand) -> str:
        """What `given` lacks, for people: `1 answer at a time instead of 8`; empty if nothing."""
        lacks: list[str] = []
        if given.sequences < self.full.sequences:
            lacks.append(f"{answers(given.sequences)} at a time instead of {self.full.sequences}")
        if given.context < self.full.context:
            lacks.append(f"a context of {given.context} tokens instead of {self.full.context}")
        return " and ".join(lacks)


def smaller(demand: Demand, fits: Fits) -> Demand | None:
    """What could be asked for instead of a demand that does not fit; None if nothing fits."""
    least = Demand(min(demand.context, CELLS_STEP), 1)
    return _Descent(demand, least).first(fits)


def options(demand: Demand, instead: Demand) -> str:
    """The options of a verb that ask for `instead` of what was asked before."""
    text = f"--context {instead.context}"
    if instead.sequences != demand.sequences:
        text += f" --sequences {instead.sequences}"
    return text


def answers(count: int) -> str:
    """`1 answer`, `8 answers`."""
    return f"{count} answer{'s' if count > 1 else ''}"


def described(demand: Demand) -> str:
    """A demand for people: `8 answers of 4096 tokens each`."""
    return f"{answers(demand.sequences)} of {demand.context} tokens" + " each" * (demand.sequences > 1)


def gigabytes(more: float, less: float) -> tuple[str, str]:
    """Two amounts of memory with as many digits as it takes to tell them apart, as `3.42 GB`."""
    digits = 1
    while more != less and f"{more / 1e9:.{digits}f}" == f"{less / 1e9:.{digits}f}" and digits < 9:
        digits += 1
    return f"{more / 1e9:.{digits}f} GB", f"{less / 1e9:.{digits}f} GB"


@dataclass(frozen=True)
class _Descent:
    """The demands from `full` down to `least`, each smaller than the one before: answers give way first."""

    full: Demand
    least: Demand

    def first(self, fits: Fits) -> Demand | None:
        index = bisect_left(range(self._count), True, key=lambda index: fits(self._at(index)))
        return self._at(index) if index < self._count else None

    @property
    def _fewer(self) -> int:
        """How many demands have the full context."""
        return self.full.sequences - self.least.sequences + 1

    @property
    def _steps(self) -> range:
        """The shorter contexts, in steps of the KV cache."""
        last = -(-self.least.context // CELLS_STEP)
        return range((self.full.context - 1) // CELLS_STEP, last - 1, -1)

    @property
    def _count(self) -> int:
        return self._fewer + len(self._steps)

    def _at(self, index: int) -> Demand:
        if index < self._fewer:
            return Demand(self.full.context, self.full.sequences - index)
        return Demand(self._steps[index - self._fewer] * CELLS_STEP, self.least.sequences)
