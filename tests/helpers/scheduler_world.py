"""A world for the scheduler: clients that know their answers, a fake pipeline that checks every message.

The fake computes a token as a pure function of all tokens that the stream's sequence holds, so a row that is
wrong, missing or there twice changes the text.
"""

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cordee.generation.batches import Event, Limits, MicroBatch, Segment
from cordee.generation.request import Choice, Request, SamplingParams
from cordee.generation.scheduler import Scheduler
from cordee.generation.tokenlog import TokenLog
from cordee.speculation.guesser import Guess, Guesser

VOCABULARY = 24
END = 0  # the token that ends an answer: one in 24
NEVER = 1000  # an end token that never comes


def next_token(seed: int, history: Sequence[int]) -> int:
    return zlib.crc32(bytes([seed, *history])) % VOCABULARY


def scores_of(prompt: Sequence[int]) -> tuple[Choice, ...]:
    """The log-probabilities of a prompt's tokens but the first, each a function of all that come before."""
    return tuple(
        Choice(prompt[place], -float(zlib.crc32(bytes(prompt[: place + 1]))))
        for place in range(1, len(prompt))
    )


class Oracle(Guesser):
    """Guesses that are right, wrong now and then, or wrong where it hurts: right up to the last one."""

    def __init__(self, log: Sequence[int], seed: int, wrong_percent: int) -> None:
        super().__init__((), (), ())
        self.log, self.seed, self.wrong_percent = list(log), seed, wrong_percent

    def append(self, token: int) -> None:
        self.log.append(token)

    def propose(self, pending: Sequence[int], most: int) -> list[Guess]:
        text = list(self.log)
        for _ in range(len(pending) + most):
            token = next_token(self.seed, text)
            if zlib.crc32(bytes([self.seed, len(text) & 255])) % 100 < self.wrong_percent:
                token = (token + 1) % VOCABULARY
            text.append(token)
        found = text[len(self.log) :]
        return (
            [Guess(token, 0.95) for token in found[len(pending) :]]
            if found[: len(pending)] == [*pending]
            else []
        )


@dataclass(eq=False)
class Client:
    """What the client of one request sees."""

    request: Request
    got: list[int] = field(default_factory=list)
    ended: str | None = None
    cached: int | None = None  # as the events say
    sequence: int | None = None
    first_position: int | None = None  # of the first row that was computed for it
    apart: bool = False
    moved: bool = False  # it gave its slot to another share's stream


class FakePipeline:
    """Holds for each sequence the tokens of its KV cache and the history of its sampler."""

    def __init__(self, limits: Limits, can_trim: bool = True) -> None:
        self.limits = limits
        self.can_trim = can_trim
        self.end = END
        self.under_way: deque[tuple[MicroBatch, dict[int, tuple[int, list[int]]]]] = deque()
        self.rows_sent = 0
        self.copied_tokens = 0
        self.forget()

    def forget(self) -> None:
        self.cache: dict[int, list[int]] = {sequence: [] for sequence in range(self.limits.sequences)}
        self.samplers: dict[int, tuple[int, list[int]]] = {}
        self.opened: set[TokenLog] = set()
        self.under_way.clear()
        self.halted: set[int] = set()
        self.scores: dict[int, list[Choice]] = {}  # of the micro-batch that was answered last
        self.guessed: dict[int, list[Choice]] = {}  # likewise
        self.before: dict[int, list[int]] = {}  # what the placement before had
        self.may_inherit = True  # whether batches that are sent now may still take it over

    def send(self, batch: MicroBatch) -> None:
        sequences = [segment.sequence for segment in batch.segments]
        rows = sum(len(segment.tokens) for segment in batch.segments)
        assert len(self.under_way) < self.limits.in_flight
        assert 0 < rows <= self.limits.batch_rows
        assert all(segment.tokens for segment in batch.segments)
        assert batch.steps == 1 or rows == len(batch.segments), "only decode rows may go round"
        assert batch.steps == 1 or not any(segment.guesses for segment in batch.segments)
        assert len(set(sequences)) == len(sequences) and set(sequences) <= set(self.cache)
        assert set(batch.opens) <= {
            segment.sequence for segment in batch.segments if segment.sample or segment.score
        }
        logs = batch.opens.items()
        opens = {sequence: (log.sampling.seed, [*log.prompt, *log.generated]) for sequence, log in logs}
        assert self.may_inherit or not any(segment.inherit for segment in batch.segments)
        assert self.opened.isdisjoint(batch.opens.values()), "a sampler is made once"
        self.opened.update(batch.opens.values())
        self.under_way.append((batch, opens))
        self.rows_sent += rows

    def answer(
        self, end: int, failures: Callable[[int], bool]
    ) -> tuple[MicroBatch, dict[int, Choice], dict[int, str], bool]:
        """Compute the oldest micro-batch, and let it go round again if it may; its scores are in `scores`."""
        batch, opens = self.under_way.popleft()
        self.scores, self.guessed = {}, {}
        choices = self.compute(batch, opens)
        failed = {sequence: "no token fits" for sequence in choices if failures(sequence)}
        ended = any(choice.token == end for choice in choices.values())
        last = batch.steps == 1 or bool(failed) or ended or batch.id in self.halted
        if not last:
            segments = tuple(
                replace(
                    segment,
                    first_position=segment.first_position + 1,
                    tokens=[choices[segment.sequence].token],
                    inherit=False,
                )
                for segment in batch.segments
            )
            again = replace(batch, segments=segments, opens={}, steps=batch.steps - 1, copies=())
            self.under_way.append((again, {}))
            self.rows_sent += len(segments)
        return batch, choices, failed, last

    def copy(self, batch: MicroBatch) -> None:
        """Make the copies that go with a micro-batch, once: it may go round."""
        rows = {segment.sequence: segment for segment in batch.segments}
        for copy in batch.copies:
            assert self.can_trim, "a state is copied that cannot be shortened"
            held = self.cache[copy.source]
            assert 0 < copy.length <= len(held), "more is copied than is there"
            assert copy.source != copy.sequence
            if copy.sequence in rows:
                assert rows[copy.sequence].tenure == copy.tenure and not rows[copy.sequence].inherit
            self.cache[copy.sequence] = held[: copy.length]
            self.copied_tokens += copy.length

    def compute(self, batch: MicroBatch, opens: dict[int, tuple[int, list[int]]]) -> dict[int, Choice]:
        choices: dict[int, Choice] = {}
        self.copy(batch)
        for segment in batch.segments:
            held = self.cache[segment.sequence]
            if segment.inherit:
                held[:] = self.before[segment.sequence][: segment.first_position]
                assert len(held) == segment.first_position > 0, "more is taken over than was there"
            assert segment.first_position <= len(held), "rows are missing"
            kept = (0, len(held) if not segment.inherit else len(self.before[segment.sequence]))
            assert self.can_trim or segment.first_position in kept, "a state is shortened that cannot be"
            held[segment.first_position :] = segment.tokens
            assert len(held) < self.limits.context
            if segment.sequence in opens:
                self.samplers[segment.sequence] = opens[segment.sequence]
            if segment.score:
                _, prompt = self.samplers[segment.sequence]
                known = [
                    *held,
                    *prompt[len(held) :][:1],
                ]  # the last row of a piece has the next token to score
                self.scores[segment.sequence] = list(scores_of(known)[segment.first_position :])
            if not segment.sample:
                continue
            seed, history = self.samplers[segment.sequence]
            drawn = self.draw(segment, seed, held, history)
            if drawn:
                choices[segment.sequence] = drawn[0]
                self.guessed[segment.sequence] = drawn[1:]
        return choices

    def draw(self, segment: Segment, seed: int, held: list[int], history: list[int]) -> list[Choice]:
        """The tokens of a segment's rows: of guesses only as long as they are what was drawn before."""
        drawn: list[Choice] = []
        for row in range(len(segment.tokens) - segment.guesses - 1, len(segment.tokens)):
            end = segment.first_position + row + 1
            is_guess = row >= len(segment.tokens) - segment.guesses
            if row < 0 or (drawn and held[:end] != history):
                continue
            if held[:end] != history:
                assert is_guess, "the cache is not the token log"
                break
            if history[-1] == self.end and is_guess:
                break
            token = next_token(seed, held[:end])
            history.append(token)
            drawn.append(Choice(token))
        assert segment.guesses == 0 or segment.sure <= len(history)
        return drawn


class World:
    """A scheduler, a fake pipeline and clients."""

    def __init__(self, limits: Limits, end: int = END, *, can_trim: bool = True) -> None:
        self.limits = limits
        self.end = end
        self.scheduler = Scheduler(limits, {end})
        self.scheduler.can_trim = can_trim
        self.pipeline = FakePipeline(limits, can_trim)
        self.pipeline.end = end
        self.clients: dict[str, Client] = {}  # the running ones

    def guess(self, wrong_percent: int) -> None:
        """Let streams guess from now on."""
        guessing = self.scheduler.guessing
        guessing.is_on = self.pipeline.can_trim
        guessing.make = lambda stream, ends: Oracle(
            stream.log.tokens(0, len(stream.log)), stream.request.sampling.seed, wrong_percent
        )

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int | None = None,
        seed: int = 0,
        share: str = "",
        *,
        scored: bool = False,
    ) -> Client:
        request = Request(
            id=name,
            prompt=tuple(prompt),
            sampling=SamplingParams(seed=seed),
            max_tokens=max_tokens,
            scores_prompt=scored,
            share=share,
        )
        client = Client(request)
        self.scheduler.submit(client.request)
        self.clients[name] = client
        return client

    def cancel(self, name: str) -> None:
        self.scheduler.cancel(name)
        self.clients.pop(name).ended = "cancelled"

    def pump(self) -> list[MicroBatch]:
        """Send all that may be sent now."""
        sent: list[MicroBatch] = []
        while (batch := self.scheduler.next_batch()) is not None:
            self.pipeline.send(batch)
            sent.append(batch)
            self.note_moves()
            for segment in batch.segments:
                client = self.clients[segment.stream]
                if client.sequence is None:
                    taken = [other.sequence for other in self.clients.values()]
                    assert segment.sequence not in taken, "two streams share a slot"
                    client.sequence = segment.sequence
                    if not client.moved:
                        client.first_position = segment.first_position
                assert client.sequence == segment.sequence
                if any(other.apart for other in self.clients.values()):
                    assert client.apart and len(batch.segments) == len(self.pipeline.under_way) == 1
                    assert batch.steps == 1
        self.note_moves()
        self.pipeline.halted.update(self.scheduler.halts())
        self.scheduler.check_slots()
        assert self.pipeline.under_way or not self.clients, "deadlock"
        return sent

    def note_moves(self) -> None:
        """Streams that had a slot and wait again: only where somebody else asks, too."""
        for name, client in self.clients.items():
            if client.sequence is not None and name not in self.scheduler._active:
                assert len({other.request.share for other in self.clients.values()}) > 1
                client.sequence, client.moved = None, True

    def answer(self, failures: Callable[[int], bool] = lambda _: False) -> list[Event]:
        """Let the oldest result come; `failures` says of which sequences the token cannot be chosen."""
        batch, choices, failed, last = self.pipeline.answer(self.end, failures)
        chosen = {sequence: choice for sequence, choice in choices.items() if sequence not in failed}
        guessed = {key: own for key, own in self.pipeline.guessed.items() if key not in failed}
        events = self.scheduler.complete(
            batch.id, chosen, failed, self.pipeline.scores, last=last, guessed=guessed
        )
        self.scheduler.check_slots()
        for event in events:
            self.check_event(event)
        return events

    def check_event(self, event: Event) -> None:
        """Compare an event with the next one of the undisturbed answer."""
        client = self.clients[event.stream]  # KeyError: an event for a stream that ended
        request, got = client.request, (event.choice, event.finish_reason)
        client.cached, client.apart = event.cached_tokens, False
        if event.failure is None:
            scores = scores_of(request.prompt) if request.scores_prompt and not client.got else ()
            assert event.prompt_choices == scores
        expected = next_token(request.sampling.seed, [*request.prompt, *client.got])
        if event.failure is not None:
            assert got == (None, None)
            client.ended = "failed"
        elif expected == self.end:
            assert got == (Choice(expected) if request.scores_prompt else None, "stop")
            client.ended = "stop"
        else:
            client.got.append(expected)
            room = self.limits.context - len(request.prompt)
            full = len(client.got) in (request.max_tokens, room)
            client.ended = "length" if full else None
            assert got == (Choice(expected), client.ended)
        if client.ended:
            del self.clients[event.stream]

    def lose(self) -> None:
        self.pipeline.forget()
        self.scheduler.lost()

    def transfer(self, length_of: Callable[[int], int]) -> None:
        """Another placement follows; of a sequence it may take over `length_of(its length)` tokens."""
        held = {
            sequence: tokens[: length_of(len(tokens))] for sequence, tokens in self.pipeline.cache.items()
        }
        self.lose()
        self.pipeline.before = held
        self.scheduler.restore(held)
        self.scheduler.check_slots()

    def forget_before(self) -> None:
        """The placement before is about to be gone."""
        self.pipeline.may_inherit = False
        self.scheduler.forget_restored()

    def set_apart(self, name: str) -> None:
        self.scheduler.set_apart(name)
        self.clients[name].apart = self.clients[name].sequence is not None

    def step(self) -> list[Event]:
        self.pump()
        return self.answer()

    def finish(self) -> None:
        while self.clients:
            self.step()
