"""KV transfer: the workers of a new placement take sequences over from those of the placement before.

When a placement gets a successor, which is loaded beside it, its KV caches are transferred, so that a machine
can be drained without computing anything again. The layers may be cut at other places, so a new worker (the
*reader*) may have several *sources*:

    reader                                        its sources, whose layers overlap with its own
    Wire, with sources     -- ReaderJoin -->      tell the parent that there are readers, keep the link
                           <- ReaderJoin ---
    KvQuery, through all   -- KvQuery    -->      leave the old wiring, if it is not left yet
                           <- KvAnswer   ---      which sequences, how long, computed in which tenure
    Rows, with `inherit`   -- KvRead     -->      trim to the length that is wanted, export those layers
                           <- KvState    ---

The scheduler's host learns from KvAnswer what all stages could take over, and lets those streams go on there.
If any of this fails, nothing is lost: the streams are computed again from their token logs.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.cluster.facts import KvSource
from cordee.errors import StageFailed
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import HeldSequence, KvAnswer, KvQuery, KvRead, KvState, ReaderJoin

if TYPE_CHECKING:
    from cordee.worker.compute import Compute
    from cordee.worker.messages import Message

# For one answer of a source: the largest state takes nine seconds at 1 Gbit/s, and the source may have to end
# a micro-batch first.
ANSWER_SECONDS = 20.0


class KvSources:
    """Links to the workers that a worker may read from. Made by `KvSources.of`; all methods on one thread."""

    def __init__(self, sources: Sequence[KvSource], links: Sequence[socket.socket]) -> None:
        self._sources = tuple(sources)
        self._links = tuple(links)

    @classmethod
    def of(cls, identity: Path, sources: Sequence[KvSource]) -> KvSources | None:
        """Links to all sources; None if one of them is gone, or has nothing of that wiring."""
        links: list[socket.socket] = []
        try:
            for source in sources:
                links.append(tls_link.connect(identity, source.endpoint, source.node))
                links[-1].settimeout(ANSWER_SECONDS)
                frames.send(links[-1], ReaderJoin(source.wiring))
                frames.receive(links[-1])  # from now on its parent keeps it alive
        except (OSError, LinkClosed):
            for each in links:
                each.close()
            return None
        return cls(sources, links)

    def held(self) -> dict[int, HeldSequence]:
        """What all sources hold, by sequence.

        Raises:
            LinkClosed: one of them is gone.
        """
        for source, each in zip(self._sources, self._links, strict=True):
            frames.send(each, KvQuery(source.wiring))
        found: dict[int, HeldSequence] | None = None
        for each in self._links:
            answer, _ = frames.receive(each)
            if not isinstance(answer, KvAnswer):
                raise LinkClosed("a source answers a query with something else")
            found = answer.held if found is None else both(found, answer.held)
        return found or {}

    def read(self, sequence: int, length: int) -> list[bytes]:
        """The state of a sequence's first `length` positions: one piece from each source, in order of layers.

        Raises:
            LinkClosed: a source is gone, or does not have it.
        """
        for source, each in zip(self._sources, self._links, strict=True):
            frames.send(each, KvRead(sequence, length, source.first, source.last))
        states: list[bytes] = []
        for each in self._links:
            answer, payload = frames.receive(each)
            if not isinstance(answer, KvState) or answer.sequence != sequence:
                raise LinkClosed("a source answers a read with something else")
            states.append(bytes(payload))
        return states

    def close(self) -> None:
        """Close the links; the sources may end then."""
        for each in self._links:
            with contextlib.suppress(OSError):
                each.close()


def both(one: Mapping[int, HeldSequence], other: Mapping[int, HeldSequence]) -> dict[int, HeldSequence]:
    """What two stages hold of the same streams: as much as the one that holds less."""
    found: dict[int, HeldSequence] = {}
    for sequence, held in one.items():
        theirs = other.get(sequence)
        if theirs is not None and theirs.tenure == held.tenure:
            tokens = held.tokens if held.tokens is not None else theirs.tokens
            length = min(held.length, theirs.length)
            found[sequence] = HeldSequence(held.tenure, length, None if tokens is None else tokens[:length])
    return found


def serve(compute: Compute, reader: socket.socket, message: Message | None, wiring: str) -> None:
    """Answer a message of a reader. `compute` holds the sequences that grew in `wiring`.

    Raises:
        LinkClosed: the reader is gone (`message` None), or asks for what is not here.
    """
    if isinstance(message, ReaderJoin):
        frames.send(reader, message)
    elif isinstance(message, KvQuery) and message.wiring == wiring:
        frames.send(reader, KvAnswer(wiring, compute.held()))
    elif isinstance(message, KvRead):
        try:
            state = compute.export(message.sequence, message.length, message.first, message.last)
        except StageFailed as error:
            raise LinkClosed(error.message) from error
        frames.send(reader, KvState(message.sequence), state)
    else:
        raise LinkClosed("a reader sends something that is no query and no read")
