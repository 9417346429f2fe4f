"""The host's side of spot checks: which stage is checked when, on what, and by whom (docs/spot-checks.md).

It also answers the other nodes of a placement: a RecordQuery with what a stage here says, a SpotRequest of
the host by checking a stage (spot_checker.py).
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cordee.agent.exchange import Unreachable, exchange
from cordee.agent.spot_checker import (
    ANSWER_SECONDS,
    EVIDENCE_SECONDS,
    SpotChecker,
    SpotCheckerOwner,
)
from cordee.cluster.facts import Placement
from cordee.cluster.goals import SliceGoal, holds
from cordee.errors import StageFailed
from cordee.serving.scheduler_host import SchedulerHost
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Record, RecordQuery, SpotFinding, SpotRequest

SHARE = 1 / 200  # of the rows that are computed, those computed again
LOOK_SECONDS = 1.0  # how often it is looked whether a check is due
BUSY_SECONDS = 10.0  # a check waits this long for a moment in which no stream is answered
PAUSE_SECONDS = 10.0  # between checks after the first round: starting a worker takes a second of a core
ROWS_MIN = 16  # of a check: fewer say little
CREDIT_ROWS_MAX = 4096.0  # that may be owed, where nothing could be checked for long
CHECK_SECONDS = 900.0  # for a node to check a stage: it computes with the lowest priority
TRIES_MAX = 3  # of a round, for each stage
SILENT_MAX = 5  # checks in a row in which a stage had no record of what the host's own still had

log = logging.getLogger(__name__)


@dataclass
class _Pace:
    """How far the checks of a wiring are."""

    seen_rows: int  # of the scheduler, when it was looked at last
    credit: float = 0.0  # rows that may be computed again
    order: list[int] = field(default_factory=list[int])  # stages of this round that were not checked yet
    tries: int = 0  # in this round
    rounds: int = 0
    length: float = 0.5  # of the next check, between the shortest and the longest
    due_since: float | None = None
    checked_at: float = -math.inf
    silent: dict[int, int] = field(default_factory=dict[int, int])  # by stage


class SpotChecks:
    """See the module's docstring. `hosts` are the schedulers that run here, which come and go. `share` 0:
    nothing is checked for them, but other nodes are answered."""

    def __init__(
        self,
        owner: SpotCheckerOwner,
        identity: Path,
        hosts: Mapping[str, SchedulerHost],
        share: float,
    ) -> None:
        self._hosts = hosts
        self._owner = owner
        self._identity = identity
        self._share = share
        self._checker = SpotChecker(owner, identity)
        self._paces: dict[str, _Pace] = {}  # by wiring
        self._random = random.SystemRandom()  # nobody is to know what will be checked

    async def watch(self) -> None:
        """Check what is due, one stage after the other."""
        while self._share:
            await asyncio.sleep(LOOK_SECONDS)
            hosts = [each for each in self._hosts.values() if each.is_joined]
            self._paces = {each.wiring: self._earned(each) for each in hosts}
            for host in hosts:
                try:
                    await self._look(host, self._paces[host.wiring])
                except (StageFailed, LinkClosed) as error:  # that wiring is over
                    log.info("no spot check: %s", error)
                except Exception:  # the next look starts afresh
                    log.exception("a spot check failed unexpectedly")

    async def serve(
        self,
        node: str,
        message: RecordQuery | SpotRequest,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Answer a node, and wait until it has the answer and closes the link."""
        frames.write(writer, *await self._answer(node, message))
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await reader.read(1)

    async def _answer(
        self, node: str, message: RecordQuery | SpotRequest
    ) -> tuple[Record | SpotFinding, bytes]:
        """The answer to a node of the placement; others learn nothing."""
        placement = self._owner.stages.placement(message.wiring)
        nodes = [] if placement is None else [place.node for place in placement.stages]
        if isinstance(message, SpotRequest):
            if nodes[:1] != [node]:
                return SpotFinding("unknown", "only the host has its stages checked"), b""
            return await self._checker.check(message), b""
        if node not in nodes:
            return Record(0), b""
        try:
            return await self._owner.stages.record(message)
        except StageFailed:
            return Record(0), b""

    def _earned(self, host: SchedulerHost) -> _Pace:
        pace = self._paces.get(host.wiring) or _Pace(host.rows)
        earned = pace.credit + (host.rows - pace.seen_rows) * self._share
        pace.credit, pace.seen_rows = min(earned, CREDIT_ROWS_MAX), host.rows
        return pace

    async def _look(self, host: SchedulerHost, pace: _Pace) -> None:
        """Check a stage of a wiring, if that is due."""
        wiring = host.wiring
        placement = self._owner.stages.placement(wiring)
        if placement is None or len({place.node for place in placement.stages}) == 1:
            return
        if pace.rounds and (not pace.credit or time.monotonic() - pace.checked_at < PAUSE_SECONDS):
            return
        target = await self._target(wiring, placement, pace)
        host.is_being_checked = target is not None and not pace.rounds
        if target is None:
            return
        place = placement.stages[target.index]
        cost = target.rows * (place.last - place.first) / placement.stages[-1].last
        if pace.rounds and cost > pace.credit:
            return
        if pace.due_since is None:
            pace.due_since = time.monotonic()
        if host.active and time.monotonic() - pace.due_since < BUSY_SECONDS:
            return
        findings = await self._check(placement, target, pace)
        host.spot_checks += any(found.state == "agrees" for found in findings)
        told = all(found.state != "unknown" for found in findings)
        pace.order.pop(0)
        pace.tries += 1
        if not told and pace.tries < TRIES_MAX * len(placement.stages):
            pace.order.append(target.index)  # the streams went on meanwhile, or the checker was busy: again
        if not pace.order:
            pace.rounds, pace.tries, host.is_being_checked = pace.rounds + 1, 0, False
        pace.credit = max(0.0, pace.credit - cost)
        pace.due_since, pace.checked_at, pace.length = None, time.monotonic(), self._random.random()

    async def _target(self, wiring: str, placement: Placement, pace: _Pace) -> SpotRequest | None:
        """What to check next; None while there is nothing."""
        own = RecordQuery(wiring, 0, 0, -1, 0, whole=False)
        settled = (await self._owner.stages.record(own))[0].settled
        long = [(sequence, *each) for sequence, each in settled.items() if each[1] >= ROWS_MIN]
        if not long:
            return None
        if not pace.order:
            pace.order = self._random.sample(range(len(placement.stages)), len(placement.stages))
        sequence, tenure, length = self._random.choice(long)
        rows = round(ROWS_MIN * (length / ROWS_MIN) ** pace.length)
        return SpotRequest(wiring, pace.order[0], sequence, tenure, rows, computes=True)

    async def _check(self, placement: Placement, target: SpotRequest, pace: _Pace) -> list[SpotFinding]:
        """Have a stage checked by whom can, and its links by its neighbours."""
        suspect = placement.stages[target.index].node
        voices = self._voices(placement, target.index)
        findings: dict[str, SpotFinding] = {}
        for node, computes in voices.items():
            if computes and any(found.state == "disputed" for found in findings.values()):
                continue  # who of the two lies, computing does not tell: neither works with the other again
            request = SpotRequest(
                target.wiring, target.index, target.sequence, target.tenure, target.rows, computes
            )
            findings[node] = await self._found(node, request)
            log.info("spot check of stage %d by %s: %s", target.index, node, findings[node])
        differing = [node for node, found in findings.items() if found.state == "differs"]
        if differing and self._owner.node not in differing:
            await self._judge(differing[0], suspect, target)
        await self._note_silence(placement, target, list(findings.values()), pace)
        return [found for node, found in findings.items() if voices[node] or found.state != "agrees"]

    def _voices(self, placement: Placement, index: int) -> dict[str, bool]:
        """The nodes to ask about a stage: its neighbours about links, then one to compute it again.

        The host itself is asked first where it can, so that it need not take another's word.
        """
        places = placement.stages
        suspect, alive = places[index].node, self._owner.alive()
        near = {places[each].node for each in (index - 1, index + 1) if 0 <= each < len(places)}
        near |= {self._owner.node} if index + 1 == len(places) else set()
        goal = SliceGoal(placement.model, places[index].first, places[index].last)
        able = [
            node
            for node in {place.node for place in places} - {suspect}
            if node in alive and holds(alive[node].slices, goal)
        ]
        self._random.shuffle(able)
        able.sort(key=lambda node: node != self._owner.node)
        voices = dict.fromkeys(near - {suspect} - set(able[:1]), False)
        return voices | dict.fromkeys(able[:1], True)

    async def _found(self, node: str, request: SpotRequest) -> SpotFinding:
        if node == self._owner.node:
            return await self._checker.check(request)
        facts = self._owner.alive().get(node)
        try:
            if facts is None:
                raise LinkClosed("that node is not alive")
            answer, _ = await exchange(self._identity, facts, request, CHECK_SECONDS)
        except LinkClosed as error:
            return SpotFinding("unknown", str(error))
        return answer if isinstance(answer, SpotFinding) else SpotFinding("unknown", "that is no finding")

    async def _judge(self, accuser: str, suspect: str, target: SpotRequest) -> None:
        """Another node says that a stage is wrong: see for oneself, and doubt one of the two."""
        own = await self._checker.check(target, fetches=True)
        log.info("spot check of stage %d again, here: %s", target.index, own)
        if own.state == "agrees" and accuser != self._owner.node:
            places = self._owner.alive()
            names = [places[node].name if node in places else node for node in (accuser, suspect)]
            reason = f"{names[0]} says that {names[1]} computes wrongly: {own.reason} here"
            self._owner.doubt(accuser, reason, EVIDENCE_SECONDS)

    async def _note_silence(
        self, placement: Placement, target: SpotRequest, findings: list[SpotFinding], pace: _Pace
    ) -> None:
        """Count the checks in which a stage had nothing to show, although it must have."""
        place = placement.stages[target.index]
        if any(found.state != "unknown" for found in findings) or not findings:
            pace.silent.pop(target.index, None)
            return
        facts, own_facts = self._owner.alive().get(place.node), self._owner.alive()[self._owner.node]
        if place.node == self._owner.node or facts is None or facts.version != own_facts.version:
            return
        query = RecordQuery(target.wiring, 0, target.sequence, target.tenure, target.rows, whole=False)
        own, _ = await self._owner.stages.record(query)
        theirs = Record(0)
        try:
            index = msgspec.structs.replace(query, index=target.index)
            theirs, _ = await self._checker.record(place.node, index)
        except Unreachable:
            return
        except LinkClosed as error:
            log.info("no record of stage %d: %s", target.index, error)
        still, _ = await self._owner.stages.record(query)
        if theirs.rows:
            pace.silent.pop(target.index, None)
        elif own.rows and still.rows:
            silent = pace.silent[target.index] = pace.silent.get(target.index, 0) + 1
            if silent >= SILENT_MAX:
                self._owner.doubt(place.node, "its stage does not show what it computed")
