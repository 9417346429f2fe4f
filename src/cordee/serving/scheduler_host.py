"""The scheduler of a model, on the node of its first stage, and its links to the pipeline.

    gateways --asks--> Host (generation/host.py) --micro-batches--> first stage ... last stage
    gateways <--said--        ^                                                         |
                              '------------- tokens, through the node's inbox ----------'

A `SchedulerHost` follows the goal of its model: it joins a wiring (the links between the workers of a
placement, see worker/messages.py) once the first stage is wired so, and never joins one again that it left.
Tokens of other wirings are ignored. Where the wiring has a predecessor it first queries all stages which
sequences they could take over (worker/kv_transfer.py).

While there are no streams it measures, once, whether the model is batch-invariant on these stages
(batch_invariance.py): then an answer after a loss is token for token what it would have been.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Any

import numpy as np

from cordee.cluster.goals import HostGoal
from cordee.cluster.memory import BATCH_ROWS
from cordee.engine.stage import StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, CordeeError, StageFailed
from cordee.generation.batches import Limits
from cordee.generation.host import Host
from cordee.generation.request import Grammar
from cordee.generation.results import RESULT_SECONDS_MAX, Expectation, Results
from cordee.generation.scheduler import Scheduler
from cordee.generation.streams import Ask, Assert, Said
from cordee.grammar.grammar import NAMES
from cordee.serving import batch_invariance
from cordee.serving.answers import Rate
from cordee.worker import frames
from cordee.worker.grammar_trials import GrammarTrials
from cordee.worker.messages import (
    Halt,
    Join,
    KvAnswer,
    KvQuery,
    Prepare,
    Prepared,
    Rows,
    Run,
    Tokens,
    rows_of,
)
from cordee.worker.stages import Stages

QUEUE = 256  # streams that wait while others are answered
# Asks whose grammar is being tried or compiled. As many streams as may wait, of this node and a few others.
ADMITTING_MAX = 1024
# Of a prompt's pieces, where several machines work on them at once: as few as cost no more a row than 512 do
# (docs/performance.md), on CPUs and on graphics cards.
CPU_PIECE_ROWS, GPU_PIECE_ROWS = 64, 256
# Micro-batches that travel at once: one for each machine keeps all of them busy, and one is on its way.
IN_FLIGHT_MAX = 9
ANSWER_SECONDS = 3.0  # for the stages to answer a KV query; their predecessors may be computing
# For how long streams may take over what the placement before has of them: gateways ask a new host at once.
KV_QUERY_SECONDS = 5.0
IDLE_SECONDS = 3.0  # without streams, before batch invariance is measured: the next turn of a chat would wait
MEASURE_SECONDS = 60.0  # for one micro-batch of the measurement; on slower stages it is given up

log = logging.getLogger(__name__)


class SchedulerHost:
    """The scheduler of a placement's model. `send` takes the node of a gateway and the message to it.

    `queue` streams may wait. `in_flight` micro-batches travel at once; None: as many as keep all machines
    busy. `speculates`: guesses may travel, where that changes no token.
    `joined` is called when it has joined a wiring, `late` with the other nodes of the placement and the
    seconds when a result of theirs is too long in coming.
    """

    def __init__(
        self,
        goal: HostGoal,
        vocabulary: Vocabulary,
        stages: Stages,
        send: Callable[[str, Said], None],
        *,
        queue: int = QUEUE,
        in_flight: int | None = None,
        speculates: bool = True,
        joined: Callable[[], None] = lambda: None,
        late: Callable[[Collection[str], float], None] = lambda nodes, seconds: None,
    ) -> None:
        placement = goal.placement
        self._limits = limits = Limits(
            sequences=placement.sequences,
            context=placement.context,
            batch_rows=max(BATCH_ROWS, placement.sequences),
            queue=queue,
            in_flight=in_flight or _in_flight(goal),
            piece_rows=_piece_rows(goal),
        )
        scheduler = Scheduler(limits, vocabulary.end_of_generation)
        self._host = Host(scheduler, vocabulary.size, Random(secrets.randbits(64)))
        self._stages = stages
        self._send = send
        self._on_joined = joined
        self._on_late = late
        self._wiring = ""
        self._is_joined = False
        self._results = Results()
        self._first: asyncio.StreamWriter | None = None
        self._joining: asyncio.Task[None] | None = None
        self._kv_answer: asyncio.Future[KvAnswer] | None = None
        self._kv_query_ends = 0.0  # on the event loop's clock; 0: nothing may be taken over
        self._n_vocab = vocabulary.size
        self._speculates, self._can_trim = speculates, True
        self._measuring: asyncio.Task[None] | None = None
        self._digests: asyncio.Future[dict[int, str]] | None = None
        self._idle_since: float | None = None
        self._places: frozenset[tuple[str, str]] = frozenset()
        self._last = ""  # the node of the last stage
        self._others: set[str] = set()  # the nodes of the stages but our own
        self.is_measured = False  # on these machines and devices
        self.batch_invariant: bool | None = None  # None: not measured, or the context is too small for that
        self.rate = Rate()
        self.spot_checks = 0  # in which a stage was right
        self.is_being_checked = False  # what the slots hold is needed for that: nothing is measured meanwhile
        self.rows = 0  # that were sent to the first stage, or went round
        self.inherited_tokens = 0
        self._grammars = GrammarTrials.of(vocabulary.path, vocabulary.name)
        self._admitting: dict[tuple[str, int, int], asyncio.Task[None]] = {}  # by node, gateway and ask
        self._preparing: dict[int, asyncio.Future[str]] = {}  # grammars, by number
        self._prepares = 0

    @property
    def wiring(self) -> str:
        """The wiring that it works on; empty: none."""
        return self._wiring

    def fits(self, goal: HostGoal | None) -> bool:
        """Whether this scheduler suits a goal: it has as many slots, of the same length."""
        if goal is None:
            return False
        wanted = (goal.placement.sequences, goal.placement.context, _in_flight(goal), _piece_rows(goal))
        limits = self._limits
        return wanted == (limits.sequences, limits.context, limits.in_flight, limits.piece_rows)

    @property
    def is_joined(self) -> bool:
        """Whether rows can flow."""
        return self._is_joined

    @property
    def active(self) -> int:
        """Streams that are being answered."""
        return self._host.active

    @property
    def waiting(self) -> int:
        """Streams that wait for one of them to end."""
        return self._host.waiting

    @property
    def speculates(self) -> bool:
        """Whether guesses travel: a wrong one is cut off again, and rows that share a micro-batch with one
        have the same bits as without it. On several machines each guess travels by itself."""
        alike = self._limits.in_flight > 1 or self.batch_invariant is True
        return self._speculates and self._can_trim and alike

    @property
    def guesses(self) -> tuple[int, int]:
        """How many guesses travelled so far, and how many of them were right."""
        return self._host.guessing.offered, self._host.guessing.accepted

    @property
    def held_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self._host.held_tokens

    @property
    def held_tokens_max(self) -> int:
        """Tokens that the KV cache has room for."""
        return self._limits.sequences * self._limits.context

    def follow(self, goal: HostGoal) -> None:
        """Join the goal's wiring, or wait for one."""
        self._last = goal.placement.stages[-1].node
        places = frozenset((place.node, place.device) for place in goal.placement.stages)
        self._others = {node for node, _ in places} - {goal.placement.stages[0].node}
        # On one machine alone there is nothing better to turn to.
        expectation = Expectation(goal.row_seconds, goal.read_seconds) if self._others else Expectation()
        self._results.expect(places, expectation)
        if places != self._places:
            self._places, self.is_measured, self.batch_invariant = places, False, None
        if goal.wiring == self._wiring:
            return
        self.leave()
        if goal.wiring:
            self._wiring = goal.wiring
            self._joining = asyncio.get_running_loop().create_task(self._join(goal.wiring))

    def close(self) -> None:
        """Leave the wiring for good."""
        for task in self._admitting.values():
            task.cancel()
        self.leave()

    def leave(self) -> None:
        """Leave the wiring: what is under way will not be answered."""
        for prepared in self._preparing.values():
            if not prepared.done():
                prepared.set_result("")  # it is compiled where the stream goes on
        for task in (self._joining, self._measuring):
            if task is not None:
                task.cancel()
        if self._first is not None:
            self._first.transport.abort()
            self._first = None
        if self._wiring:
            wiring, self._wiring = self._wiring, ""
            self._host.lost()
            self._stages.unwire(wiring)
        self._host.ready, self._kv_answer, self._kv_query_ends = False, None, 0.0
        self._is_joined = False
        self._results.clear()

    def _leave_stalled(self, seconds: float) -> None:
        """A stage hangs: have the worker killed, and all wired again.

        Which one hangs is not known. If there are stages on other machines these are doubted; should it have
        been our own, that shows when all are wired again: a worker that does not answer then is killed.
        """
        if not self._others:
            self._stages.kill(self._wiring)
        else:
            self._on_late(self._others, seconds)
        self.leave()

    def receive(self, node: str, message: Ask | Assert) -> None:
        """Handle a message of the gateway on a node."""
        if isinstance(message, Ask) and message.request.sampling.grammar is not None:
            self._admit_soon(node, message, message.request.sampling.grammar)
            return
        self._host.receive(node, message)
        self.pump()

    def _admit_soon(self, node: str, ask: Ask, grammar: Grammar) -> None:
        """Handle an ask once its grammar is compiled; its gateway repeats what is lost."""
        key = node, ask.gateway, ask.number
        if key not in self._admitting and len(self._admitting) < ADMITTING_MAX:
            task = asyncio.get_running_loop().create_task(self._admit(node, ask, grammar))
            self._admitting[key] = task
            task.add_done_callback(lambda _: self._admitting.pop(key, None))

    async def _admit(self, node: str, ask: Ask, grammar: Grammar) -> None:
        refused = None
        try:
            # Gateways try grammars as well, but a node that somebody has taken over does not.
            await self._grammars.check(grammar, node)
            await self._prepare(grammar)
        except CordeeError as error:
            refused = error
        self._host.receive(node, ask, refused)
        self.pump()

    async def _prepare(self, grammar: Grammar) -> None:
        """Have the last stage compile a grammar beside what it computes.

        Raises:
            CordeeError: it cannot be used there, or the stages do not answer.
        """
        if self._first is None or not self._is_joined:
            return
        self._prepares += 1
        number, prepared = self._prepares, asyncio.get_running_loop().create_future()
        self._preparing[number] = prepared
        frames.write(self._first, Prepare(self._wiring, number, grammar))
        try:
            async with asyncio.timeout(RESULT_SECONDS_MAX):
                failure = await prepared
        except TimeoutError:
            raise StageFailed("the last stage does not compile the grammar: try again") from None
        finally:
            del self._preparing[number]
        if failure:
            raise BadRequest(failure, NAMES[grammar.kind][1])

    def tick(self, now: float) -> None:
        """Let time pass; `now` is that of `time.monotonic`. Several times a second."""
        self._host.tick(now)
        if self._kv_query_ends and asyncio.get_running_loop().time() >= self._kv_query_ends:
            self._host.forget_restored()
            self._kv_query_ends = 0.0
        if seconds := self._results.late_seconds(now):
            self._leave_stalled(seconds)
        self._measure_when_idle(now)
        self.pump()

    def on_result(self, node: str, message: Tokens | KvAnswer | Prepared) -> None:
        """Handle a result of the last stage of some wiring, from the node that sent it: no other node than
        that of our last stage has a say."""
        if message.wiring != self._wiring or node != self._last:
            return
        if isinstance(message, KvAnswer):
            if self._kv_answer is not None and not self._kv_answer.done():
                self._kv_answer.set_result(message)
            return
        if isinstance(message, Prepared):
            prepared = self._preparing.get(message.number)
            if prepared is not None and not prepared.done():
                prepared.set_result(message.failure)
            return
        if message.digests:
            if self._digests is not None and not self._digests.done():
                self._digests.set_result(message.digests)
            return
        now = time.monotonic()
        self._results.came(message.batch, message.last, now)
        for choices in message.earlier:
            self._host.complete(message.batch, choices, {}, last=False)
        self._host.complete(
            message.batch,
            message.choices,
            message.failures,
            message.scores,
            last=message.last,
            guessed=message.guessed,
            forced=message.forced,
            now=now,
        )
        guessed = sum(map(len, message.guessed.values()))
        self.rate.count(sum(map(len, message.earlier)) + len(message.choices) + guessed)
        self.rows += sum(map(len, message.earlier)) + (0 if message.last else len(message.choices))
        self.pump()

    def pump(self) -> None:
        """Send what can be sent: micro-batches to the first stage, news to gateways."""
        if self._host.ready and self._first is not None:
            self._host.guessing.is_on = self.speculates
            while (batch := self._host.next_batch(time.monotonic())) is not None:
                inherited = (each.first_position for each in batch.segments if each.inherit)
                self.inherited_tokens += sum(inherited)
                rows = sum(len(each.tokens) for each in batch.segments)
                self.rows += rows
                self._results.sent(batch.id, rows, time.monotonic())
                frames.write(self._first, *rows_of(self._wiring, batch))
            for number in self._host.halts():
                frames.write(self._first, Halt(self._wiring, number))
        for node, said in self._host.drain():
            self._send(node, said)

    async def _join(self, wiring: str) -> None:
        worker = self._stages.first(wiring)
        try:
            if worker is None:
                raise OSError("its first stage is gone")
            _, writer = await asyncio.open_unix_connection(worker.inbox)
        except OSError as error:
            log.info("the first stage cannot be reached: %s", error)
            self.leave()
            return
        frames.write(writer, Join(wiring))
        self._first = writer
        if worker.description is not None:
            self._can_trim = worker.description.can_trim
            self._host.set_can_trim(self._can_trim)
        if self._stages.inherits(wiring):
            await self._query_kv(wiring, writer)
        self._host.ready = self._is_joined = True
        self.pump()
        self._on_joined()

    async def _query_kv(self, wiring: str, first: asyncio.StreamWriter) -> None:
        """Let streams go on where the placement before left them."""
        loop = asyncio.get_running_loop()
        self._kv_answer = loop.create_future()
        frames.write(first, KvQuery(wiring))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await self._kv_answer
        except TimeoutError:
            log.info("the stages did not answer a KV query: streams are computed again")
            return
        held = answer.held.items()
        self._host.restore({sequence: each.tokens for sequence, each in held if each.tokens})
        self._kv_query_ends = loop.time() + KV_QUERY_SECONDS
        log.info("%d sequences of the placement before can be taken over", len(answer.held))

    def _measure_when_idle(self, now: float) -> None:
        busy = self._host.active or self._host.waiting or self.is_being_checked
        if self.is_measured or not self._host.ready or busy:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= IDLE_SECONDS:
            self._measuring = asyncio.get_running_loop().create_task(self._measure(MEASURE_SECONDS))

    async def measure(self, seconds: float) -> None:
        """Measure batch invariance now, with `seconds` for each micro-batch. If a stage is lost it stays
        unknown."""
        if not self._is_joined:
            return
        self._measuring = asyncio.get_running_loop().create_task(self._measure(seconds))
        await asyncio.wait((self._measuring,))

    async def _measure(self, seconds: float) -> None:
        """Measure batch invariance; nothing else travels meanwhile, and no slot keeps what it held."""
        self._host.ready = False
        wiring, limits = self._wiring, self._limits
        config = StageConfig(context=limits.context, sequences=limits.sequences, batch_rows=limits.batch_rows)
        try:
            async with asyncio.timeout(None) as patience:

                async def send(runs: Sequence[Run], tokens: Sequence[int]) -> dict[int, str]:
                    patience.reschedule(asyncio.get_running_loop().time() + seconds)
                    return await self._send_measured(runs, tokens)

                self.batch_invariant = await batch_invariance.measure(send, self._n_vocab, config)
            self.is_measured = True
        except TimeoutError:
            self.is_measured = True
        except StageFailed:
            pass  # a stream came: again when there are none
        if self._wiring == wiring:
            self._host.lost()
            self._host.ready = True
            self.pump()

    async def _send_measured(self, runs: Sequence[Run], tokens: Sequence[int]) -> dict[int, str]:
        if self._first is None or self._host.waiting:
            raise StageFailed("the stages are needed for a stream")
        self._digests = asyncio.get_running_loop().create_future()
        payload = np.asarray(tokens, dtype=np.int32).data.cast("B")
        frames.write(self._first, Rows(self._wiring, 0, tuple(runs), {}, measure=True), payload)
        return await self._digests


def _piece_rows(goal: HostGoal) -> int:
    """See `Limits.piece_rows`; 0 for one machine alone, whose stages share its cores."""
    stages = goal.placement.stages
    if len({stage.node for stage in stages}) == 1:
        return 0
    return CPU_PIECE_ROWS if all(stage.device == "CPU" for stage in stages) else GPU_PIECE_ROWS


def _in_flight(goal: HostGoal) -> int:
    machines = len({stage.node for stage in goal.placement.stages})
    return 1 if machines == 1 else min(machines + 1, IN_FLIGHT_MAX)


def speculation(host: SchedulerHost) -> dict[str, Any]:
    """What `status` says of guesses, as values for JSON."""
    offered, accepted = host.guesses
    return {"on": host.speculates, "offered": offered, "accepted": accepted}
