"""Hand-over: a new placement's workers take sequences over from those of the placement before.

A placement that gets a successor, loaded beside it, leaves its KV caches to it, so that a machine can be
drained without computing anything again. Layers are cut elsewhere now, so a worker has several sources:

    new worker (heir)                           its sources, whose layers overlap with its own
    Wire, with sources     -- Inherit -->       tell the parent that there are heirs, keep the link
                           <- Inherit --
    Recall, through all    -- Recall  -->       leave the old placement, if it is not left yet
                           <- Recalled --       which sequences, how long, computed in which tenure
    Rows, with `inherit`   -- Take    -->       trim to the length that is wanted, export those layers
                           <- State --

The host learns from Recall what all stages could take over, and lets those streams go on there. Should any of
this fail, nothing is lost: the streams are computed again from their logs.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from cordee.cluster.facts import KvSource
from cordee.errors import StageFailed
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import HeldSequence, KvAnswer, KvQuery, KvRead, KvState, ReaderJoin

# For one answer of a source: the largest state takes nine seconds at 1 Gbit/s, and the source may have to end
# a micro-batch first.
ANSWER_SECONDS = 20.0


class KvSources:
    """What a worker may take over. Made by `KvSources.of`; all methods on one thread."""

    def __init__(self, sources: Sequence[KvSource], links: Sequence[socket.socket]) -> None:
        self._sources = tuple(sources)
        self._links = tuple(links)

    @classmethod
    def of(cls, identity: Path, sources: Sequence[KvSource]) -> KvSources | None:
        """Links to all sources; None if one of them is gone, or has nothing of that placement."""
        links: list[socket.socket] = []
        try:
            for source in sources:
                links.append(tls_link.connect(identity, source.endpoint))
                links[-1].settimeout(ANSWER_SECONDS)
                frames.send(links[-1], ReaderJoin(source.wiring))
                frames.receive(links[-1])  # now nobody ends it any more
        except (OSError, LinkClosed):
            for each in links:
                each.close()
            return None
        return cls(sources, links)

    def held(self) -> dict[int, HeldSequence]:
        """What all sources have.

        Raises:
            LinkClosed: one of them is gone.
        """
        for source, each in zip(self._sources, self._links, strict=True):
            frames.send(each, KvQuery(source.wiring))
        found = None
        for each in self._links:
            answer, _ = frames.receive(each)
            if not isinstance(answer, KvAnswer):
                raise LinkClosed("a source says something else than what it has")
            found = answer.held if found is None else both(found, answer.held)
        return found or {}

    def read(self, sequence: int, length: int) -> list[bytes]:
        """The state of a sequence's first positions, in one part from each source.

        Raises:
            LinkClosed: a source is gone, or does not have it.
        """
        for source, each in zip(self._sources, self._links, strict=True):
            frames.send(each, KvRead(sequence, length, source.first, source.last))
        parts = []
        for each in self._links:
            answer, payload = frames.receive(each)
            if not isinstance(answer, KvState) or answer.sequence != sequence:
                raise LinkClosed("a source says something else than a state")
            parts.append(bytes(payload))
        return parts

    def close(self) -> None:
        """Let the sources go."""
        for each in self._links:
            with contextlib.suppress(OSError):
                each.close()


def both(one: Mapping[int, HeldSequence], other: Mapping[int, HeldSequence]) -> dict[int, HeldSequence]:
    """What two stages have of the same streams: as much as the one that has less."""
    found = {}
    for sequence, held in one.items():
        theirs = other.get(sequence)
        if theirs is not None and theirs.tenure == held.tenure:
            tokens = held.tokens if held.tokens is not None else theirs.tokens
            length = min(held.length, theirs.length)
            found[sequence] = HeldSequence(held.tenure, length, None if tokens is None else tokens[:length])
    return found


def serve(compute, reader: socket.socket, message: object, placement: str) -> None:
    """Answer an heir of this placement, whose sequences `compute` has.

    Raises:
        LinkClosed: the heir is gone, or wants what is not there.
    """
    if isinstance(message, ReaderJoin):
        frames.send(reader, message)
    elif isinstance(message, KvQuery) and message.wiring == placement:
        frames.send(reader, KvAnswer(placement, compute.held()))
    elif isinstance(message, KvRead):
        try:
            state = compute.export(message.sequence, message.length, message.first, message.last)
        except StageFailed as error:
            raise LinkClosed(error.message) from error
        frames.send(reader, KvState(message.sequence), state)
    else:
        raise LinkClosed("an heir says something that is not known here")
