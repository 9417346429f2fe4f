"""What a stage received and sent, kept for spot checks (docs/spot-checks.md).

For each sequence of the KV cache there is a *trail*: rows from position 0 on, as long as the cache has these
positions. Rows are not copied. All stages of a wiring keep and forget the same, since a position counts for
the same bytes in each, whatever is kept there: token ids, rows, or tokens that were chosen.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cordee.worker.acceptance import outputs_of
from cordee.worker.messages import Opening, Record, RecordQuery, Rows, Run

# 512 positions of a model of width 4,096, of two streams.
TRAIL_BYTES_MAX = 16 << 20
RECORDS_BYTES_MAX = 2 * TRAIL_BYTES_MAX


@dataclass(eq=False)
class _Trail:
    """A sequence's rows: pieces of one micro-batch each, in order of position, without gaps."""

    tenure: int
    opening: Opening | None = None
    length: int = 0
    sure: int = 0  # positions that are no guesses
    nbytes: int = 0  # counted, not measured: equal on all stages
    received: list[np.ndarray] = field(default_factory=list[np.ndarray])
    sent: list[np.ndarray] = field(default_factory=list[np.ndarray])  # of the last stage: nothing
    tokens: dict[int, int] = field(default_factory=dict[int, int])  # chosen, by position

    def trim(self, length: int) -> None:
        """Keep the first positions only, and tokens that were chosen for one of them."""
        if length >= self.length:
            return
        position_bytes = self.nbytes // max(self.length, 1)
        while self.length > length:
            surplus = min(self.length - length, len(self.received[-1]))
            for kept in (self.received, self.sent):
                if kept:
                    last = kept.pop()
                    kept.extend([last[:-surplus]] if surplus < len(last) else [])
            self.length -= surplus
        self.nbytes = position_bytes * self.length
        self.tokens = {position: token for position, token in self.tokens.items() if position + 1 < length}


class Records:
    """See the module's docstring. `n_embd` is the width of the model's rows."""

    def __init__(self, n_embd: int) -> None:
        self._position_bytes = 2 * n_embd * np.dtype(np.float32).itemsize
        self._trails: dict[int, _Trail] = {}  # by sequence, the one that grew last at the end

    def clear(self) -> None:
        """Forget everything."""
        self._trails.clear()

    def forget(self, sequence: int) -> None:
        """The sequence's cache comes from elsewhere: there is no record of it."""
        self._trails.pop(sequence, None)

    def copy(self, source: int, sequence: int, length: int, tenure: int) -> None:
        """The sequence begins as another one, for the stream of this tenure."""
        trail = self._trails.get(source)
        self.forget(sequence)
        if trail is not None:
            copied = replace(
                trail, tenure=tenure, opening=None, received=[*trail.received], sent=[*trail.sent], tokens={}
            )
            copied.trim(length)
            self._trails[sequence] = copied
            self._forget_oldest()

    def note(
        self,
        message: Rows,
        received: np.ndarray,
        sent: np.ndarray | None,
        tokens: Mapping[int, Sequence[int]],
    ) -> None:
        """Note a micro-batch: rows (or token ids) received, rows sent, tokens chosen by sequence: one, and
        one for each guess that was right."""
        start = 0
        for run in message.runs:
            end = start + run.rows
            trail = None if message.measure else self._begun(run)
            if trail is None:
                self.forget(run.sequence)
            else:
                trail.opening = message.opens.get(run.sequence, trail.opening)
                room = (TRAIL_BYTES_MAX - trail.nbytes) // self._position_bytes
                if trail.length == run.first_position and room > 0:
                    kept = slice(start, min(end, start + room))
                    trail.received.append(received[kept])
                    if sent is not None:
                        trail.sent.append(sent[kept])
                    trail.length += kept.stop - start
                    trail.nbytes += (kept.stop - start) * self._position_bytes
                trail.sure = run.sure or run.first_position + run.rows
                first = run.first_position + run.rows - outputs_of(run)
                for position, token in enumerate(tokens.get(run.sequence, ()), first):
                    if position < trail.length:
                        trail.tokens[position] = token
            start = end
        self._forget_oldest()

    def settled(self) -> dict[int, tuple[int, int]]:
        """Tenure, and how many positions all stages have computed, by sequence.

        They have where a token was chosen for a later position, and that is known where it was received.
        """
        return {
            sequence: (trail.tenure, min(trail.length, trail.sure) - 1)
            for sequence, trail in self._trails.items()
            if trail.opening is not None
            and min(trail.length, trail.sure) > len(trail.opening.prompt) + len(trail.opening.generated)
        }

    def answer(self, query: RecordQuery) -> tuple[Record, bytes]:
        """The record that a query asks for, and its payload: rows received and, after them, rows sent."""
        trail = self._trails.get(query.sequence)
        if trail is None or trail.tenure != query.tenure or not 0 < query.rows <= trail.length:
            return Record(query.number, settled=self.settled()), b""
        received = _first(trail.received, query.rows)
        sent = _first(trail.sent, query.rows) if trail.sent else b""
        record = Record(
            query.number,
            rows=query.rows,
            received=hashlib.sha256(received).hexdigest(),
            sent=hashlib.sha256(sent).hexdigest() if sent else "",
            n_embd=trail.received[0].shape[1] if trail.received[0].ndim > 1 else 0,
            tokens={position: token for position, token in trail.tokens.items() if position < query.rows},
            opening=trail.opening,
            settled=self.settled(),
        )
        return record, received + sent if query.whole else b""

    def _begun(self, run: Run) -> _Trail | None:
        """The trail that a run goes on with or begins; None if its beginning is not known."""
        trail = self._trails.pop(run.sequence, None)
        if run.first_position == 0:
            trail = _Trail(run.tenure)
        elif trail is None:
            return None
        if trail.tenure != run.tenure:
            # Another stream: it need not go on with the token that was chosen last.
            trail.tenure, trail.opening, trail.tokens = run.tenure, None, {}
        trail.trim(run.first_position)
        self._trails[run.sequence] = trail
        return trail

    def _forget_oldest(self) -> None:
        while sum(trail.nbytes for trail in self._trails.values()) > RECORDS_BYTES_MAX:
            del self._trails[next(iter(self._trails))]


def _first(pieces: Sequence[np.ndarray], rows: int) -> bytes:
    return np.concatenate(pieces)[:rows].tobytes()
