"""How a node checks what a stage of another node computed: it asks that stage for its word, compares it with
what went over a link that both share, and computes the rows again (docs/spot-checks.md).

Whatever it finds, it has seen or computed itself, and the word it judges came from the stage's own node.
"""

import asyncio
import hashlib
import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cordee.agent.exchange import Unreachable, exchange
from cordee.cluster.doubts import DOUBT_SECONDS_MAX
from cordee.cluster.facts import Facts, Placement
from cordee.cluster.goals import SliceGoal, StageSpec, holds
from cordee.errors import CordeeError, StageFailed
from cordee.machine.memory import memory
from cordee.worker import comparison
from cordee.worker.comparison import Difference, Resampler, Rounding
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Recompute, Record, RecordQuery, SpotFinding, SpotRequest
from cordee.worker.records import TRAIL_BYTES_MAX
from cordee.worker.stages import Files, Stages

# For a record: a worker first ends what it computes, which is killed after 600 s, and 16 MB have to come.
ANSWER_SECONDS = 660.0
MEMORY_LEFT_BYTES = 512 << 20  # a check that would leave less is not made: it is the least urgent of all work
CONTEXT_STEP = 256  # the engine's caches have so many cells, or a multiple
PAYLOAD_BYTES_MAX = 2 * TRAIL_BYTES_MAX  # of a record: the rows that were received, and those that were sent
LOGITS_MAX = 16  # rows of logits that are computed again for one check; a row may have 0.8 MB
SLICES_MEASURED_MAX = 64  # whose rounding is remembered

log = logging.getLogger(__name__)

# A node that computes wrongly is left out for so long; one that is only late gets another chance soon.
EVIDENCE_SECONDS = DOUBT_SECONDS_MAX


class SpotCheckerOwner(Protocol):
    """What a checker needs to know of its node and the others."""

    @property
    def node(self) -> str:
        """This node's id."""
        ...

    @property
    def stages(self) -> Stages:
        """The workers of this node."""
        ...

    def alive(self) -> Mapping[str, Facts]:
        """The nodes that are alive, this one among them."""
        ...

    async def prepare(self, spec: StageSpec, /) -> Files:
        """The files of a stage, fetched if they are not here. Raises CordeeError."""
        ...

    def doubt(self, node: str, reason: str, seconds: float = ..., /) -> None:
        """This node has seen, or computed, that it cannot work with another."""


class SpotChecker:
    """See the module's docstring. `identity` is the folder of this node's identity."""

    def __init__(self, owner: SpotCheckerOwner, identity: Path) -> None:
        self._owner = owner
        self._identity = identity
        self._one_at_a_time = asyncio.Lock()
        self._measured: dict[SliceGoal, Rounding] = {}

    async def check(self, request: SpotRequest, *, fetches: bool = False) -> SpotFinding:
        """Check a stage; where its word does not hold, its node is doubted.

        With `fetches` the slice is fetched if it is not here.
        """
        placement = self._owner.stages.placement(request.wiring)
        if placement is None or not 0 <= request.index < len(placement.stages):
            return SpotFinding("unknown", "this node is not in that placement any more")
        try:
            found = await self._check(request, placement, fetches=fetches)
        except (CordeeError, LinkClosed, OSError) as error:
            return SpotFinding("unknown", str(error))
        if found.state in ("differs", "disputed"):
            self._owner.doubt(placement.stages[request.index].node, found.reason, EVIDENCE_SECONDS)
        return found

    async def record(self, node: str, query: RecordQuery) -> tuple[Record, bytes]:
        """What a stage of a node says that it received and sent.

        Raises:
            StageFailed, LinkClosed: it does not answer.
        """
        if node == self._owner.node:
            return await self._owner.stages.record(query)
        facts = self._owner.alive().get(node)
        if facts is None:
            raise Unreachable(f"node {node} is not alive")
        answer, payload = await exchange(self._identity, facts, query, ANSWER_SECONDS, PAYLOAD_BYTES_MAX)
        if not isinstance(answer, Record):
            raise LinkClosed(f"{facts.name} sent no record")
        return answer, payload

    async def _check(self, request: SpotRequest, placement: Placement, *, fetches: bool) -> SpotFinding:
        place = placement.stages[request.index]
        query = RecordQuery(
            request.wiring, request.index, request.sequence, request.tenure, request.rows, request.computes
        )
        record, payload = await self.record(place.node, query)
        if record.rows != request.rows:
            raise StageFailed(f"{self._name(place.node)} has no record of that")
        if request.computes:  # its word are the rows, not the digests
            try:
                received, sent = self._parts(record, payload, request, placement)
            except ValueError:
                name = self._name(place.node)
                return SpotFinding("disputed", f"{name} does not show the {request.rows} rows that it has")
            digests = (_sha256(received), _sha256(sent) if sent is not None else "")
        else:
            received, sent = np.empty(0), None
            digests = (record.received, record.sent)
        dispute = await self._dispute(request, placement, record, digests)
        if dispute:
            return SpotFinding("disputed", dispute)
        if not request.computes:
            return SpotFinding("agrees", "the links agree")
        found = await self._compute(request, placement, record, (received, sent), fetches=fetches)
        return SpotFinding("differs" if found.differs else "agrees", found.explanation)

    def _parts(
        self, record: Record, payload: bytes, request: SpotRequest, placement: Placement
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows received and sent.

        Raises:
            StageFailed: this node has no stage there any more.
            ValueError: the payload is not those.
        """
        rows, is_last = request.rows, request.index + 1 == len(placement.stages)
        width = self._owner.stages.n_embd(request.wiring)
        if not width:
            raise StageFailed("this node is not in that placement any more")
        row_bytes = (4 if request.index == 0 else 4 * width) + (0 if is_last else 4 * width)
        if len(payload) != rows * row_bytes or record.n_embd != (width if request.index else 0):
            raise ValueError("the payload is not those rows")
        if request.index == 0:
            received = np.frombuffer(payload, np.int32, rows)
        else:
            received = np.frombuffer(payload, np.float32, rows * width).reshape(rows, width)
        if is_last:
            return received, None
        sent = np.frombuffer(payload, np.float32, offset=received.nbytes).reshape(rows, width)
        return received, sent

    async def _dispute(
        self, request: SpotRequest, placement: Placement, record: Record, digests: tuple[str, str]
    ) -> str:
        """How the stage's word differs from what stages of this node say of a link with it, if it does.

        `digests` are of what it says it received and sent.
        """
        places, index = placement.stages, request.index
        name, last = self._name(places[index].node), len(places) - 1
        for other, place in enumerate(places):
            is_near = other in (index - 1, index + 1) or (other == 0 and index == last)
            if place.node != self._owner.node or place.node == places[index].node or not is_near:
                continue
            query = RecordQuery(
                request.wiring, other, request.sequence, request.tenure, request.rows, other == 0
            )
            own, payload = await self._owner.stages.record(query)
            if own.rows != request.rows:
                raise StageFailed("the record here is gone")
            if other == index - 1 and own.sent != digests[0]:
                return f"{name} says that it received other rows than were sent to it"
            if other == index + 1 and own.received != digests[1]:
                return f"{name} says that it sent other rows than came from it"
            if other == 0 and index == last:
                tokens = np.frombuffer(payload, np.int32, request.rows)
                if not _fits(record, own, tokens):
                    return f"{name} says that it gave other tokens than came from it"
        return ""

    async def _compute(
        self,
        request: SpotRequest,
        placement: Placement,
        record: Record,
        said: tuple[np.ndarray, np.ndarray | None],
        *,
        fetches: bool,
    ) -> Difference:
        """Compute the rows again, and compare."""
        place, (received, sent) = placement.stages[request.index], said
        goal = SliceGoal(placement.model, place.first, place.last)
        own = self._owner.alive().get(self._owner.node)
        if not fetches and not (own and holds(own.slices, goal)):
            raise StageFailed("the slice is not here")
        outputs = () if sent is not None else _outputs(record)
        if sent is None and not outputs:
            return Difference(False, "no token can be computed again")
        if self._one_at_a_time.locked() and not fetches:
            raise StageFailed("another spot check is under way here")
        async with self._one_at_a_time:
            context = -(-request.rows // CONTEXT_STEP) * CONTEXT_STEP
            files = await self._owner.prepare(StageSpec(goal.model, "CPU", goal.first, goal.last, context, 1))
            _require_memory(files)
            message = Recompute(received.shape[1] if received.ndim > 1 else 0, outputs)
            exact = await self._rows(files, message, received, fast=False)
            where = f"{files.name} on {self._name(place.node)}"
            by = f"computed again by {self._name(self._owner.node)}"
            honest = None if sent is None else self._measured.get(goal)
            if honest is None:
                fast = await self._rows(files, message, received, fast=True)
                if sent is None:
                    found = self._compare_tokens(record, outputs, exact, fast)
                    return Difference(found.differs, f"{where}: {found.explanation}, {by}")
                honest = comparison.rounding(exact, fast)
                self._remember(goal, honest)
        assert sent is not None, "else tokens were compared"
        found = comparison.compare_rows(sent, exact, honest)
        return Difference(found.differs, f"{where}: {found.explanation}, {by}")

    def _remember(self, goal: SliceGoal, honest: Rounding) -> None:
        self._measured[goal] = honest
        while len(self._measured) > SLICES_MEASURED_MAX:
            del self._measured[next(iter(self._measured))]

    def _compare_tokens(
        self, record: Record, outputs: tuple[int, ...], exact: np.ndarray, fast: np.ndarray
    ) -> Difference:
        opening = record.opening
        assert opening is not None, "else there are no outputs"
        start, index = len(opening.prompt) + len(opening.generated), len(opening.generated)
        following = [record.tokens[each] for each in range(start - 1, outputs[-1] + 1)]
        sampler = Resampler(opening.sampling, [*opening.prompt, *opening.generated, *following], start, index)
        logits = dict(zip(outputs, exact, strict=True))
        return comparison.compare_tokens(record.tokens, logits, comparison.logit_noise(exact, fast), sampler)

    async def _rows(
        self, files: Files, message: Recompute, received: np.ndarray, *, fast: bool
    ) -> np.ndarray:
        config = replace(files.config, batch_invariant=not fast, threads=1)
        answer, payload = await self._owner.stages.recompute(
            replace(files, config=config), message, received.tobytes()
        )
        return np.frombuffer(payload, np.float32).reshape(-1, answer.width)

    def _name(self, node: str) -> str:
        facts = self._owner.alive().get(node)
        return node if facts is None else facts.name


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _fits(record: Record, own: Record, tokens: np.ndarray) -> bool:
    """Whether what the last stage says it gave is what the first one got, from the same start."""
    if record.opening is None or record.opening != own.opening:
        return record.opening is own.opening  # nothing was sampled yet
    return all(
        tokens[position + 1] == token
        for position, token in record.tokens.items()
        if 0 <= position < len(tokens) - 1
    )


def _outputs(record: Record) -> tuple[int, ...]:
    """Positions whose token the last stage chose freely, some of them at random."""
    opening = record.opening
    if opening is None or opening.sampling.grammar is not None:
        return ()
    start = len(opening.prompt) + len(opening.generated) - 1
    free: list[int] = []
    while 0 <= start + len(free) < record.rows and start + len(free) in record.tokens:
        free.append(start + len(free))
    chosen = random.SystemRandom().sample(free, min(LOGITS_MAX, len(free)))
    return tuple(sorted(chosen))


def _require_memory(files: Files) -> None:
    """Refuse a check for which there is not enough memory to spare.

    Raises:
        StageFailed: there is not.
    """
    needed = files.slice.stat().st_size + MEMORY_LEFT_BYTES
    if memory().available_bytes < needed:
        raise StageFailed("there is no memory to spare for a spot check")
