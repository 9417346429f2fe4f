"""Which stream breaks the pipeline: those under way whenever it is lost are suspects, which travel alone."""

from collections.abc import Iterable

from cordee.generation.batches import MicroBatch

# A stream that was under way at this many losses, without getting a token in between, may be their cause:
# from then on it travels alone, so that no other stream is suspected with it ...
LOSSES_SUSPECT = 2
LOSSES_MAX = 3  # ... and a further loss after this many ends it


class Suspects:
    """Counts losses by stream."""

    def __init__(self) -> None:
        self._under_way: dict[int, set[str]] = {}  # by micro-batch, the streams that have rows in it
        self._losses: dict[str, int] = {}

    def sent(self, batch: MicroBatch) -> None:
        """A micro-batch was sent."""
        self._under_way[batch.id] = {segment.stream for segment in batch.segments}

    def result(self, batch_id: int, streams: Iterable[str], *, last: bool) -> None:
        """A result of a micro-batch came for these streams, which clears them. Not `last`: it is still under
        way."""
        if last:
            self._under_way.pop(batch_id, None)
        for stream in streams:
            self._losses.pop(stream, None)

    def forget(self, stream: str) -> None:
        """A stream ended."""
        self._losses.pop(stream, None)
        for streams in self._under_way.values():
            streams.discard(stream)

    def lost(self) -> tuple[list[str], list[str]]:
        """Everything under way was lost. Gives the streams to set apart and those to end, in order."""
        apart: list[str] = []
        ended: list[str] = []
        for stream in sorted(set[str]().union(*self._under_way.values())):
            self._losses[stream] = losses = self._losses.get(stream, 0) + 1
            if losses > LOSSES_MAX:
                ended.append(stream)
            elif losses >= LOSSES_SUSPECT:
                apart.append(stream)
        self._under_way.clear()
        return apart, ended
