"""The scheduler: which rows of which streams travel the pipeline together, and in which order.

Pure: it is told what happened and says what to do; no clock, no socket, no thread. The service asks
`next_batch` until it gives None, sends what it gives, and reports each result with `complete`. All messages
travel the pipeline in the order they were sent, so a sequence's rows and replays never overtake.

A stream's life:

    submit -> waiting -> (a slot is free) -> prefill -> decode <-> decode -> finished
                 ^                             |          |
                 '------ cancel anywhere ------'          '-- `lost`: prefill again, from the token log

- **Continuous batching**: streams join and leave between micro-batches. Each has a *slot*, which is a
  sequence number of the KV cache with a fixed context.
- **Chunked prefill**: a prompt goes in chunks, so that it never blocks the others for long. The rows that a
  micro-batch has for prefill are shared out by water-filling: every prompt gets an equal share, and what
  short ones do not need goes to the long ones. So a short request starts after about its own work however
  long its neighbours are.
- **Several micro-batches in flight**: with `in_flight` n the decoding streams go in n groups, so that n
  stages work at once. A stream has at most one decode row under way, since the next needs its token; the
  chunks of one prompt may follow each other closely.
- **Prefix reuse**: a slot remembers the tokens of its last stream; the next turn of a chat finds its history
  there and computes only what is new.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cordee.errors import BadRequest, ContextExceeded, Overloaded
from cordee.generation.request import Choice, FinishReason, Request
from cordee.generation.tokenlog import TokenLog

# Prefill rows that may join a micro-batch while others decode: they wait for it, so it is kept to a few
# decode steps' worth of work.
PREFILL_ROWS_BESIDE_DECODE = 128
# A common prefix shorter than this is not worth giving up another slot's cached tokens for.
PREFIX_TOKENS_MIN = 8


@dataclass(frozen=True)
class Limits:
    """Bounds of a scheduler. `context` is in tokens for each of `sequences` slots; `queue` bounds the
    streams that wait for a slot; `in_flight` the micro-batches under way."""

    sequences: int
    context: int
    batch_rows: int
    queue: int
    in_flight: int = 1


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of one stream in a micro-batch. `sample`: the last one's logits become a token."""

    stream: str
    sequence: int
    first_position: int
    tokens: list[int]
    sample: bool


@dataclass(frozen=True)
class MicroBatch:
    """What travels the pipeline as one message.

    A segment that starts before the end of what its sequence holds replaces the rest of it. `opens` maps a
    sequence to the token log that its new sampler starts from (as it is when the batch is made).
    """

    id: int
    segments: tuple[Segment, ...]
    opens: dict[int, TokenLog]


@dataclass(frozen=True)
class Event:
    """A stream got a token, or ended, or both. `choice` None: it ended without a token of its own.

    `cached_tokens` of its prompt were found in the KV cache.
    """

    stream: str
    choice: Choice | None
    finish_reason: FinishReason | None
    cached_tokens: int


@dataclass
class _Stream:
    request: Request
    log: TokenLog
    sequence: int | None = None
    computed: int = 0  # tokens of the log that were sent to the pipeline, or found there
    cached: int = 0
    sampling: bool = False  # a row that will give a token is under way
    opened: bool = False

    @property
    def rows_left(self) -> int:
        """Rows that can be sent now."""
        return 0 if self.sampling else len(self.log) - self.computed

    @property
    def decodes(self) -> bool:
        """Only the row of the last generated token is left to send."""
        return self.rows_left == 1 and bool(self.log.generated)


@dataclass
class _Slot:
    stream: str | None = None
    tokens: list[int] = field(default_factory=list)  # what the KV cache holds, in order of position
    used: int = 0  # when it was last given out, counted in admissions


class Scheduler:
    """See the module's theory of operation. `end_of_generation` are the tokens that end an answer."""

    def __init__(self, limits: Limits, end_of_generation: Collection[int]) -> None:
        self.limits = limits
        self._end_of_generation = frozenset(end_of_generation)
        self._waiting: deque[_Stream] = deque()
        self._active: dict[str, _Stream] = {}
        self._slots = [_Slot() for _ in range(limits.sequences)]
        self._in_flight: dict[int, MicroBatch] = {}
        self._batches = 0
        self._admissions = 0

    @property
    def waiting(self) -> int:
        """Streams that wait for a slot."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Streams that hold a slot."""
        return len(self._active)

    @property
    def in_flight(self) -> int:
        """Micro-batches under way."""
        return len(self._in_flight)

    def submit(self, request: Request) -> None:
        """Queue a stream.

        Raises:
            BadRequest: the prompt is empty, or the id is in use.
            ContextExceeded: prompt and at least one token do not fit the context.
            Overloaded: the queue is full.
        """
        if not request.prompt:
            raise BadRequest("the prompt is empty", "prompt")
        if len(request.prompt) >= self.limits.context:
            raise ContextExceeded(
                f"the prompt has {len(request.prompt)} tokens; the context holds {self.limits.context}, "
                "the answer included: shorten the prompt, or start with a larger --context",
                "messages",
            )
        if request.id in self._active or any(stream.request.id == request.id for stream in self._waiting):
            raise BadRequest(f"a stream {request.id} is already running", "id")
        if len(self._waiting) >= self.limits.queue:
            raise Overloaded(f"{self.limits.queue} requests are waiting already: try again later")
        self._waiting.append(_Stream(request, TokenLog(request.prompt, request.sampling)))

    def cancel(self, stream_id: str) -> None:
        """End a stream without an event; unknown ids are ignored, since it may just have finished."""
        if stream_id in self._active:
            self._release(self._active[stream_id])
        else:
            self._waiting = deque(stream for stream in self._waiting if stream.request.id != stream_id)

    def next_batch(self) -> MicroBatch | None:
        """The next micro-batch to send; None if nothing can be sent now."""
        if len(self._in_flight) >= self.limits.in_flight:
            return None
        self._admit()
        segments = self._decode_segments()
        segments += self._prefill_segments(self._prefill_budget(len(segments)))
        if not segments:
            return None
        self._batches += 1
        batch = MicroBatch(self._batches, tuple(segments), self._take_opens(segments))
        self._in_flight[batch.id] = batch
        return batch

    def complete(self, batch_id: int, choices: Mapping[int, Choice]) -> list[Event]:
        """Take a micro-batch's result: the token chosen for each sampled sequence.

        Results of batches that were lost, and tokens of streams that ended meanwhile, are dropped. A stream
        whose token could not be chosen must have been cancelled before.
        """
        batch = self._in_flight.pop(batch_id, None)
        if batch is None:
            return []
        events = []
        for segment in batch.segments:
            stream = self._active.get(segment.stream)
            if not segment.sample or stream is None or stream.sequence != segment.sequence:
                continue
            events.append(self._advance(stream, choices[segment.sequence]))
        return events

    def lost(self) -> None:
        """The pipeline lost its state: every stream starts again from its token log."""
        self._in_flight.clear()
        for slot in self._slots:
            slot.tokens.clear()
        for stream in self._active.values():
            stream.computed = 0
            stream.sampling = stream.opened = False

    def _advance(self, stream: _Stream, choice: Choice) -> Event:
        stream.sampling = False
        name = stream.request.id
        if choice.token in self._end_of_generation:
            self._release(stream)
            return Event(name, None, "stop", stream.cached)
        stream.log.append(choice.token)
        limit = stream.request.max_tokens
        full = len(stream.log) >= self.limits.context
        if full or (limit is not None and len(stream.log.generated) >= limit):
            self._release(stream)
            return Event(name, choice, "length", stream.cached)
        return Event(name, choice, None, stream.cached)

    def _release(self, stream: _Stream) -> None:
        del self._active[stream.request.id]
        assert stream.sequence is not None
        self._slots[stream.sequence].stream = None

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self.limits.sequences:
            stream = self._waiting.popleft()
            sequence, cached = self._choose_slot(stream.log)
            slot = self._slots[sequence]
            self._admissions += 1
            slot.stream, slot.used = stream.request.id, self._admissions
            del slot.tokens[cached:]
            stream.sequence, stream.computed, stream.cached = sequence, cached, cached
            self._active[stream.request.id] = stream

    def _choose_slot(self, log: TokenLog) -> tuple[int, int]:
        """The free slot with the longest useful prefix, else the longest unused; and the prefix's length."""
        prompt = log.tokens(0, len(log))
        free = [index for index, slot in enumerate(self._slots) if slot.stream is None]
        # The last token is computed in any case: its logits give the first token of the answer.
        prefixes = {index: _common_prefix(self._slots[index].tokens, prompt[:-1]) for index in free}
        best = max(free, key=lambda index: prefixes[index])
        if prefixes[best] >= PREFIX_TOKENS_MIN:
            return best, prefixes[best]
        chosen = min(free, key=lambda index: (self._slots[index].used, index))
        return chosen, prefixes[chosen]

    def _decode_segments(self) -> list[Segment]:
        ready = [stream for stream in self._active.values() if stream.decodes]
        group = -(-len(self._active) // self.limits.in_flight)
        ready.sort(key=lambda stream: stream.sequence)
        return [self._segment(stream, 1) for stream in ready[: min(group, self.limits.batch_rows)]]

    def _prefill_budget(self, decode_rows: int) -> int:
        if not any(stream.log.generated for stream in self._active.values()):
            return self.limits.batch_rows
        return max(0, min(PREFILL_ROWS_BESIDE_DECODE, self.limits.batch_rows - decode_rows))

    def _prefill_segments(self, budget: int) -> list[Segment]:
        streams = [stream for stream in self._active.values() if stream.rows_left and not stream.decodes]
        streams.sort(key=lambda stream: stream.rows_left)
        segments = []
        for index, stream in enumerate(streams):
            share = budget // (len(streams) - index)
            rows = min(stream.rows_left, max(1, share), budget)
            if rows == 0:
                break
            budget -= rows
            segments.append(self._segment(stream, rows))
        return segments

    def _segment(self, stream: _Stream, rows: int) -> Segment:
        assert stream.sequence is not None
        first, stop = stream.computed, stream.computed + rows
        tokens = stream.log.tokens(first, stop)
        stream.computed = stop
        stream.sampling = stop == len(stream.log)
        self._slots[stream.sequence].tokens += tokens
        return Segment(stream.request.id, stream.sequence, first, tokens, stream.sampling)

    def _take_opens(self, segments: list[Segment]) -> dict[int, TokenLog]:
        opens = {}
        for segment in segments:
            stream = self._active[segment.stream]
            if segment.sample and not stream.opened:
                opens[segment.sequence] = stream.log
                stream.opened = True
        return opens


def _common_prefix(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
