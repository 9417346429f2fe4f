"""The scheduler: which rows of which streams travel the pipeline together, and in which order.

Pure: it is told what happened and says what to do; no clock, no socket, no thread. Its owner calls
`next_batch` until it gives None, sends what it gives, and reports each result with `complete`. All messages
travel the pipeline in the order they were sent, so a sequence's rows and replays never overtake.

A stream's life:

    submit -> waiting -> (a slot is free) -> prefill -> decode <-> decode -> finished
                 ^                             |          |
                 '------ cancel anywhere ------'          '-- `lost`: prefill again, from the token log

- **Continuous batching**: streams join and leave between micro-batches. Each has a *slot*, which is a
  sequence number of the KV cache with a fixed context.
- **Shares**: a free slot goes to the share (`Request.share`: who asks) that has the fewest, and of several to
  the one that was served least recently; within a share first come, first served. Where all slots are taken
  and a share waits that has two fewer than another, the other's newest stream gives its slot: it waits, and
  goes on from its token log. So whoever floods holds up nobody else for longer than one micro-batch goes
  round, and of two who ask each gets half. Only where there is one slot, others wait for an answer's end.
  A share's waiting streams are bounded, too, so that it cannot fill the queue.
- **Chunked prefill**: a prompt is computed in chunks, so that it never blocks the others for long. The rows
  that a micro-batch has for prefill are shared by water-filling: every prompt gets an equal share, and what
  short ones do not need goes to the long ones. So a short request starts after about its own work, however
  long its neighbours are.
- **Several micro-batches in flight**: with `in_flight` n the decoding streams go in n groups, so that n
  stages work at once. Each group has one micro-batch under way, which a stream that joins waits for: streams
  that went as they came would soon be so mixed that each row takes a call of the llama engine. A stream has
  at most one decode row under way, since the next needs its token; the chunks of one prompt follow each other
  closely, and are cut into pieces (`Limits.piece_rows`) so small that each stage soon has one.
- **Repeats**: a micro-batch of decode rows alone may go round by itself, each time with the tokens that it
  gave, for a bounded number of steps; so the scheduler is not needed between two tokens. It ends with the
  first stream that ends, or when `halts` names it because other rows wait. Until it has ended, the slots of
  its streams are not given to others.
- **Prefix reuse**: what a slot holds of a new stream's tokens is not computed again, whether it is the one
  that the stream gets or another one, of which it gets a copy (prefixes.py).
- **Inheritance**: when a placement was followed by another, what its slots held can be restored: those
  positions are taken over instead of computed, when a stream first goes on in such a slot (see
  worker/kv_transfer.py).
- **Resumed streams** begin with tokens that another host generated, or this one before the gateway missed
  something. The next token depends on log, index and parameters alone, so they go on undisturbed.
- **Scored prompts**: a stream may want the log-probabilities of its prompt's tokens. Then all of its rows are
  computed, whatever a slot holds, and the scores are given with the first token; the log has no need of them.
- **Guesses** (docs/speculation.md): tokens that may come next travel before it is known that they do: beside
  the row before them, or as a micro-batch of their own behind it. The last stage draws each token as ever,
  and gives one for a guess only if that is what it drew. A wrong guess leaves rows in the stages behind the
  end of the log; the right row replaces them. Guesses take no place that another row could have.
- **Suspects**: a stream that is set apart travels alone, which shows whether it is what breaks the pipeline.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

from cordee.errors import BadRequest, ContextExceeded, Overloaded
from cordee.generation.batches import Event, Limits, MicroBatch, Segment
from cordee.generation.guessing import Guessing, Left
from cordee.generation.prefixes import Prefixes
from cordee.generation.request import Choice, FinishReason, GuessCounts, PromptProgress, Request
from cordee.generation.shares import Shares, surplus
from cordee.generation.slots import Flight, Slot, SlottedStream
from cordee.generation.tokenlog import TokenLog

# Prefill rows that may join a micro-batch while others decode: they wait for it, so it is kept to a few
# decode steps' worth of work.
PREFILL_ROWS_BESIDE_DECODE = 128
# How often a micro-batch goes round before it comes back to the scheduler: that is then a small part of the
# work, and a stream that was cancelled, or could not be halted, costs no more than this.
STEPS_MAX = 32


class Scheduler:
    """See the module's theory of operation. `end_of_generation` are the tokens that end an answer.

    `can_trim` says whether the stages can shorten a sequence; its owner sets it before the first batch.
    """

    def __init__(self, limits: Limits, end_of_generation: Collection[int]) -> None:
        self._limits = limits
        self._end_of_generation = frozenset(end_of_generation)
        self._waiting: OrderedDict[str, tuple[Request, TokenLog]] = OrderedDict()
        self._shares = Shares()
        self._active: dict[str, SlottedStream] = {}
        self._slots = [Slot(sequence) for sequence in range(limits.sequences)]
        self._in_flight: dict[int, Flight] = {}
        self._prefixes = Prefixes(self._slots, limits.context, self._settled)
        self._batches = 0
        self._tenures = 0
        self.guessing = Guessing(limits.in_flight, self._end_of_generation)

    @property
    def can_trim(self) -> bool:
        """Whether the stages can shorten a sequence."""
        return self._prefixes.can_trim

    @can_trim.setter
    def can_trim(self, can_trim: bool) -> None:
        self._prefixes.can_trim = can_trim

    @property
    def waiting(self) -> int:
        """Streams that wait for a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Streams that hold a slot."""
        return len(self._active)

    @property
    def held_tokens(self) -> int:
        """Tokens in all slots: of streams, and of those that may follow them."""
        return sum(len(slot.tokens) for slot in self._slots)

    def progress(self) -> dict[str, PromptProgress]:
        """How far the streams are that have no token yet."""
        active = ((name, stream) for name, stream in self._active.items() if not stream.log.generated)
        reading = {name: PromptProgress(0, len(stream.slot.tokens)) for name, stream in active}
        return reading | {name: PromptProgress(place) for place, name in enumerate(self._waiting, 1)}

    def submit(self, request: Request, generated: Sequence[int] = ()) -> None:
        """Queue a stream. It goes on after the tokens `generated`, which count for all limits.

        Raises:
            BadRequest: the prompt is empty, no more token is asked for, or the id is in use.
            ContextExceeded: prompt, `generated` and at least one token do not fit the context.
            Overloaded: all slots are taken, or soon will be, and the queue is full.
        """
        if not request.prompt:
            raise BadRequest("the prompt is empty", "prompt")
        if request.max_tokens is not None and request.max_tokens <= len(generated):
            raise BadRequest(
                f"max_tokens is {request.max_tokens}: ask for at least {len(generated) + 1}", "max_tokens"
            )
        log = TokenLog(request.prompt, request.sampling, generated)
        if len(log) >= self._limits.context:
            what = "the prompt has" if not generated else "the prompt and the answer so far have"
            raise ContextExceeded(
                f"{what} {len(log)} tokens; the context holds {self._limits.context}, "
                "the answer included: shorten the prompt, or start with a larger --context"
            )
        if request.id in self._active or request.id in self._waiting:
            raise BadRequest(f"a stream {request.id} is already running", "id")
        self._check_queue(request.share)
        self._waiting[request.id] = (request, log)

    def _check_queue(self, share: str) -> None:
        queue = self._limits.queue
        most = 2 * queue if share else queue
        if self.active + self.waiting >= self._limits.sequences + most:
            raise Overloaded(f"{most} requests are waiting already: try again later")
        own = sum(request.share == share for request, _ in self._waiting.values()) if share else 0
        if own and own >= queue // 2:
            raise Overloaded(f"{own} requests of {share} are waiting already: try again later")

    def cancel(self, stream_id: str) -> None:
        """End a stream without an event; unknown ids are ignored, since it may just have finished."""
        if stream_id in self._active:
            self._release(self._active[stream_id])
        else:
            self._waiting.pop(stream_id, None)

    def set_apart(self, stream_id: str) -> None:
        """Let nothing travel with a stream until it gets its next token: a loss is then its own doing.

        Streams that are set apart go one after the other, and all others wait meanwhile. Streams without a
        slot are ignored: they have nothing under way.
        """
        if stream_id in self._active:
            self._active[stream_id].apart = True

    def next_batch(self, now: float = 0.0) -> MicroBatch | None:
        """The next micro-batch to send, at the time `now` in seconds; None if nothing can be sent now."""
        if len(self._in_flight) >= self._limits.in_flight:
            return None
        apart = next((stream for stream in self._active.values() if stream.apart), None)
        if apart is not None:
            if self._in_flight:
                return None
            segments = [self._segment(apart, min(apart.rows_left, self._limits.batch_rows))]
        else:
            self._admit()
            segments = self._decode_segments()
            segments += self._prefill_segments(self._limits.batch_rows - len(segments))
            segments = segments or self._guess_segments()
        if not segments:
            return None
        self._batches += 1
        sampled = [self._active[segment.stream] for segment in segments if segment.sample]
        scored = [
            (self._active[segment.stream], len(segment.tokens) - segment.sample)
            for segment in segments
            if segment.score
        ]
        opening = [*sampled, *(stream for stream, _ in scored if stream not in sampled)]
        opens = {stream.slot.sequence: stream.log for stream in opening if not stream.opened}
        for stream in opening:
            stream.opened = True
        steps = self._steps(segments)
        rows = sum(len(segment.tokens) for segment in segments)
        decodes = all(segment.sample and len(segment.tokens) == 1 + segment.guesses for segment in segments)
        decoding = {self._active[each.stream] for each in segments if len(each.tokens) == 1 + each.guesses}
        self._in_flight[self._batches] = Flight(
            sampled, scored, decoding, repeats=steps > 1, sent=now, decode_rows=rows if decodes else 0
        )
        return MicroBatch(self._batches, tuple(segments), opens, steps, self._prefixes.take_copies())

    def complete(
        self,
        batch_id: int,
        choices: Mapping[int, Choice],
        failures: Mapping[int, str],
        scores: Mapping[int, Sequence[Choice]] | None = None,
        *,
        last: bool = True,
        guessed: Mapping[int, Sequence[Choice]] | None = None,
        forced: Mapping[int, Sequence[int]] | None = None,
        now: float = 0.0,
    ) -> list[Event]:
        """Handle a micro-batch's result: the token chosen for each sampled sequence, or why there is none,
        and the prompt's tokens of each scored one; `guessed` are those that followed because guesses were
        right, `forced` those that a grammar leaves to come after them.

        Not `last`: it is on its way again with these tokens. Results of batches that were lost, and tokens of
        streams that ended meanwhile, are dropped.
        """
        flight = self._in_flight.get(batch_id)
        if flight is None:
            return []
        flight.rounds += 1
        if last:
            del self._in_flight[batch_id]
            self.guessing.came(flight, now)
        events = self._score(flight, failures, scores or {})
        for stream in flight.streams:
            sequence = stream.slot.sequence
            if self._active.get(stream.request.id) is not stream:
                if not last:  # it was cancelled, and goes round until it is halted
                    stream.slot.tokens.append(choices[sequence].token)
                continue
            first = [choices[sequence]] if sequence in choices else []
            for choice in (*first, *(guessed or {}).get(sequence, ())):
                events.append(self._advance(stream, choice, goes_on=not last))
                if events[-1].finish_reason is not None:
                    break
            else:
                if sequence in failures:
                    self._release(stream)
                    events.append(self._event(stream, failure=failures[sequence]))
                elif forced and sequence in forced:
                    self.guessing.force(stream, forced[sequence])
        return events

    def halts(self) -> list[int]:
        """Micro-batches that should not go round again, each named once.

        That is so when other rows wait for their place, when all of their streams have ended, or when one
        that has ended keeps a slot that another stream could have.
        """
        full = len(self._in_flight) >= self._limits.in_flight
        wanted = full and (self._others_wait() or any(stream.apart for stream in self._active.values()))
        groups = self._groups()
        joined = {group for stream, group in groups.items() if stream.decodes}
        owed = self._waiting and self.active < self._limits.sequences and not self._free_slots()
        found: list[int] = []
        for number, flight in self._in_flight.items():
            lives = [self._active.get(stream.request.id) is stream for stream in flight.streams]
            unwanted = not any(lives) or (owed and not all(lives))
            if not flight.repeats or flight.halted:
                continue
            awaited = any(groups.get(stream) in joined for stream in flight.decoding)
            if wanted or unwanted or awaited or self._guesses_pay(flight.streams):
                flight.halted = True
                found.append(number)
        return found

    def lost(self) -> None:
        """The pipeline lost its state: every stream starts again from its token log."""
        self._in_flight.clear()
        self._prefixes.take_copies()
        for slot in self._slots:
            slot.tokens.clear()
            slot.restored = False
        before: list[SlottedStream] = []
        for stream in self._active.values():
            stream.opened = False
            stream.scores.clear()
            stream.guesses.clear()
            self._prefixes.find_leader(stream, before)
            before.append(stream)

    def restore(self, held: Mapping[int, Sequence[int]]) -> None:
        """The placement before has these tokens, by sequence; to be called after `lost`, before any batch."""
        streams = {stream.slot.sequence: stream for stream in self._active.values()}
        for slot in self._slots:
            tokens = list(held.get(slot.sequence, ()))[: self._limits.context]
            if slot.sequence in streams:
                stream = streams[slot.sequence]
                # Of a scored prompt all rows are computed.
                log = [] if stream.is_scored else stream.log.tokens(0, len(stream.log))
                del tokens[self._prefixes.usable(tokens, log) :]
            slot.tokens, slot.restored = tokens, bool(tokens)

    def forget_restored(self) -> None:
        """The placement before is gone: what was not taken over yet is computed again."""
        for slot in self._slots:
            if slot.restored:
                slot.tokens, slot.restored = [], False

    def check_slots(self) -> None:
        """Assert that the tokens of each stream's slot are the beginning of its token log.

        All tokens are compared, so this is for tests; while streams run, only the ends are (`check_end`).

        Raises:
            AssertionError: they are not.
        """
        for stream in self._active.values():
            stream.check_end()
            held = stream.slot.tokens
            assert held == stream.log.tokens(0, len(held)), f"{stream.request.id}: its slot is not its log"

    def _steps(self, segments: Sequence[Segment]) -> int:
        """How often a micro-batch may go round: as often as each of its streams wants a token."""
        streams = [self._active[segment.stream] for segment in segments]
        if any(stream.apart for stream in streams) or not all(
            segment.sample and len(segment.tokens) == 1 and not segment.guesses for segment in segments
        ):
            return 1
        if any(self.guessing.begins(*each, active=self.active) for each in self._left(streams)):
            return 1
        return min(STEPS_MAX, *(self._tokens_left(stream) for stream in streams))

    def _tokens_left(self, stream: SlottedStream) -> int:
        """Tokens that a stream may still get."""
        room = self._limits.context - len(stream.log)
        limit = stream.request.max_tokens
        return room if limit is None else min(room, limit - len(stream.log.generated))

    def _others_wait(self) -> bool:
        """Whether some stream that is in no micro-batch could have rows in the next one."""
        if self._waiting and (self.active < self._limits.sequences or self._surplus() is not None):
            return True
        return any(stream.rows_left for stream in self._active.values())

    def _score(
        self, flight: Flight, failures: Mapping[int, str], scores: Mapping[int, Sequence[Choice]]
    ) -> list[Event]:
        """Keep what came for scored prompts; the events of those whose sampler could not be made."""
        events: list[Event] = []
        for stream, rows in flight.scored:
            sequence = stream.slot.sequence
            if self._active.get(stream.request.id) is not stream:
                continue
            if sequence not in failures:
                stream.scores += scores.get(sequence, ())[:rows]
            elif stream not in flight.streams:
                self._release(stream)
                events.append(self._event(stream, failure=failures[sequence]))
        return events

    def _advance(self, stream: SlottedStream, choice: Choice, *, goes_on: bool) -> Event:
        """A stream gets a token, whose row travels already if its micro-batch `goes_on` or it was guessed."""
        stream.apart = False
        scores = tuple(stream.scores)
        stream.scores.clear()
        if choice.token in self._end_of_generation:
            self._release(stream)
            shown = choice if stream.request.scores_prompt else None
            return self._event(stream, shown, "stop", scores=scores)
        stream.log.append(choice.token)
        if self.guessing.append(stream, choice.token) or goes_on:
            stream.slot.tokens.append(choice.token)
        stream.check_end()
        limit = stream.request.max_tokens
        full = len(stream.log) >= self._limits.context
        reason = None
        if full or (limit is not None and len(stream.log.generated) >= limit):
            self._release(stream)
            reason = "length"
        return self._event(stream, choice, reason, scores=scores)

    def _event(
        self,
        stream: SlottedStream,
        choice: Choice | None = None,
        finish_reason: FinishReason | None = None,
        *,
        failure: str | None = None,
        scores: tuple[Choice, ...] = (),
    ) -> Event:
        name, cached = stream.request.id, stream.cached
        guesses = GuessCounts(stream.accepted, stream.rejected)
        return Event(name, choice, finish_reason, cached, failure, scores, guesses)

    def _release(self, stream: SlottedStream) -> None:
        self.guessing.forget(stream)
        del self._active[stream.request.id]
        self._prefixes.use(stream.slot)

    def _admit(self) -> None:
        while self._waiting:
            if (surplus := self._surplus()) is not None:
                self._put_back(surplus)
            free = self._free_slots()
            if not free:
                return
            name = self._next_waiting()
            request, log = self._waiting.pop(name)
            self._tenures += 1
            self._shares.serve(request.share, self._tenures)
            self._active[name] = self._begin(request, log, free)
        self._shares.forget({*self._held(), *(request.share for request, _ in self._waiting.values())})

    def _begin(self, request: Request, log: TokenLog, free: list[Slot]) -> SlottedStream:
        """Give a stream one of the free slots, and what is there already of its tokens."""
        scored = request.scores_prompt and not log.generated
        tokens = [] if scored else log.tokens(0, len(log))
        slot = self._prefixes.choose(tokens, free)
        slot.tenure = self._tenures
        self._prefixes.copy_best(slot, tokens)
        stream = SlottedStream(request, log, slot, min(len(slot.tokens), len(request.prompt)))
        self._prefixes.find_leader(stream, (each for each in self._active.values() if each.rows_left > 1))
        return stream

    def _settled(self, slot: Slot) -> int:
        """See `Prefixes`. A token's row may be on its way from the last stage to the first one, where nothing
        keeps it in order with what is sent from here; but only that of the newest token."""
        for stream in self._active.values():
            if stream.slot is slot:
                return max(len(stream.request.prompt), len(stream.log) - 1)
        return len(slot.tokens) - 1

    def _next_waiting(self) -> str:
        """Whose turn it is: the first that waits of the share that is served next."""
        firsts: dict[str, str] = {}
        for name, (request, _) in self._waiting.items():
            firsts.setdefault(request.share, name)
        return firsts[self._shares.next(firsts, self._held())]

    def _held(self) -> Counter[str]:
        """How many slots each share has."""
        return Counter(stream.request.share for stream in self._active.values())

    def _surplus(self) -> SlottedStream | None:
        """The stream that has to give its slot to one of another share, if so: the newest of its share, as
        least of it has to be computed again."""
        if self.active < self._limits.sequences:
            return None
        share = surplus((request.share for request, _ in self._waiting.values()), self._held())
        own = [stream for stream in self._active.values() if stream.request.share == share]
        return max(own, key=lambda stream: stream.slot.tenure, default=None)

    def _put_back(self, stream: SlottedStream) -> None:
        """Let a stream wait, before all others of its share. What is under way for it is dropped."""
        self._release(stream)
        request, log = stream.request, stream.log
        self._waiting[request.id] = request, TokenLog(request.prompt, request.sampling, log.generated)
        self._waiting.move_to_end(request.id, last=False)

    def _free_slots(self) -> list[Slot]:
        """Slots that no stream holds, and for which no micro-batch brings further rows by itself."""
        taken = {stream.slot.sequence for stream in self._active.values()}
        for flight in self._in_flight.values():
            if flight.repeats:
                taken |= {stream.slot.sequence for stream in flight.streams}
        return [slot for slot in self._slots if slot.sequence not in taken]

    def _decode_segments(self) -> list[Segment]:
        """One row each of the streams of a group that can all go, of that with most."""
        groups = self._groups()
        under_way = {
            groups[stream]
            for flight in self._in_flight.values()
            for stream in flight.decoding
            if stream in groups
        }
        ready: dict[int, list[SlottedStream]] = {}
        for stream, group in groups.items():
            if stream.decodes and group not in under_way:
                ready.setdefault(group, []).append(stream)
        chosen = max(ready.values(), key=len) if ready else []
        guesses = [list[int]() for _ in chosen]
        if all(stream.decodes or not stream.rows_left for stream in self._active.values()):
            guesses = self.guessing.beside(self._left(chosen), self._limits.batch_rows)
        return [self._segment(stream, 1, own) for stream, own in zip(chosen, guesses, strict=True)]

    def _groups(self) -> dict[SlottedStream, int]:
        """The groups in which streams decode: `in_flight` of them, as even as can be, of neighbouring slots,
        since the llama engine computes consecutive sequences in one call."""
        streams = sorted(self._active.values(), key=lambda stream: stream.slot.sequence)
        count = self._limits.in_flight
        return {stream: place * count // len(streams) for place, stream in enumerate(streams)}

    def _guess_segments(self) -> list[Segment]:
        """A guess as a micro-batch of its own, where no other row could go instead."""
        flights = self._in_flight.values()
        rounds = {stream for flight in flights if flight.repeats for stream in flight.streams}
        waiting = [each for each in self._active.values() if not each.rows_left and each not in rounds]
        found = self.guessing.alone(self._left(waiting), self.active)
        return [] if found is None else [self._segment(found[0], 0, [found[1]])]

    def _guesses_pay(self, streams: Sequence[SlottedStream]) -> bool:
        """Whether streams whose micro-batch goes round should rather guess."""
        if not self.guessing.is_on or any(stream.rows_left for stream in streams):
            return False
        return self.guessing.pays(self._left(streams), self.active)

    def _left(self, streams: Iterable[SlottedStream]) -> list[Left]:
        return [(stream, self._tokens_left(stream)) for stream in streams]

    def _prefill_segments(self, budget: int) -> list[Segment]:
        """Water-filling of at most `budget` rows over the prompts, at least one row each."""
        active = self._active.values()
        streams = [stream for stream in active if stream.rows_left and not stream.decodes]
        streams = [stream for stream in streams if not self._prefixes.awaits(stream, active)]
        streams.sort(key=lambda stream: stream.rows_left)
        if self._limits.piece_rows:
            budget = min(budget, max(self._limits.piece_rows, len(streams)))
        if any(stream.decodes or not stream.rows_left for stream in self._active.values()):
            beside = self._limits.piece_rows // 2 or PREFILL_ROWS_BESIDE_DECODE
            budget = min(budget, max(beside, len(streams)))
        segments: list[Segment] = []
        for index, stream in enumerate(streams):
            rows = min(stream.rows_left, budget // (len(streams) - index))
            budget -= rows
            segments.append(self._segment(stream, rows))
        return segments

    def _segment(self, stream: SlottedStream, rows: int, guesses: Sequence[int] = ()) -> Segment:
        stream.check_end()
        slot = stream.slot
        first = len(slot.tokens) + len(stream.guesses)
        tokens = stream.log.tokens(first, first + rows)
        slot.tokens += tokens
        self.guessing.sent(stream, guesses)
        inherit, slot.restored = slot.restored and first > 0, False
        return Segment(
            stream.request.id,
            slot.sequence,
            first,
            [*tokens, *guesses],
            sample=stream.rows_left == 0,
            tenure=slot.tenure,
            inherit=inherit,
            score=stream.is_scored and first < len(stream.request.prompt) - 1,
            guesses=len(guesses),
            sure=min(len(stream.log), first + rows) if rows else len(stream.log),
        )
