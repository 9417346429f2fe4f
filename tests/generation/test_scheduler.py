"""The scheduler: streams get the tokens of their undisturbed answers, in fair turns, and reuse the cache."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadRequest, ContextExceeded, Overloaded
from cordee.generation.batches import Limits
from cordee.generation.request import Choice, SamplingParams
from cordee.generation.scheduler import PREFILL_ROWS_BESIDE_DECODE
from cordee.generation.tokenlog import TokenLog
from scheduler_world import NEVER, VOCABULARY, Client, World


def tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def random_limits(rng: Random) -> Limits:
    sequences = rng.randint(1, 8)
    return Limits(
        sequences=sequences,
        context=rng.choice((2, 12, 40, 100)),
        batch_rows=sequences + rng.choice((0, 1, 5, 40)),
        queue=rng.choice((0, 1, 5)),
        in_flight=rng.randint(1, 4),
    )


class Chaos:
    """Random requests, cancels, failures, losses and late results, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.world = World(random_limits(self.rng), can_trim=self.rng.random() < 0.5)
        self.texts: list[list[int]] = [tokens(self.rng, 9)]  # what later prompts may begin with
        self.clients: list[Client] = []
        self.lost_before: set[Client] = set()
        self.failing = self.rng.random() < 0.2
        self.shares = self.rng.choice(("", "ab", "abc"))
        self.share = ""  # of those who ask now: they come in floods
        self.transfers = 0
        if self.rng.random() < 0.6:
            self.world.guess(self.rng.choice((0, 10, 50, 100)))

    def submit(self) -> None:
        rng, limits = self.rng, self.world.limits
        start = rng.choice(self.texts)
        start = start[: rng.choice((0, rng.randint(0, len(start)), len(start)))]
        fill = rng.choice((1, rng.randint(1, limits.context), limits.context))
        prompt = (start + tokens(rng, fill))[: limits.context - 1]
        name = str(rng.randrange(12))  # so few that ids come again soon
        used = len(self.world.clients)
        if self.shares and (not self.share or rng.random() < 0.1):
            self.share = rng.choice(self.shares)
        share = self.share
        most = limits.sequences + limits.queue * (2 if share else 1)
        try:
            limit, scored = rng.choice((None, 1, 3, 20)), rng.random() < 0.2
            client = self.world.submit(name, prompt, limit, rng.randrange(3), share, scored=scored)
        except BadRequest:
            assert name in self.world.clients
        except Overloaded:
            assert used == most or share
        else:
            assert used < most
            self.clients.append(client)

    def answer(self) -> None:
        if not self.world.pipeline.under_way:
            return
        self.world.answer(lambda _: self.failing and self.rng.random() < 0.1)

    def lose(self) -> None:
        late = [batch.id for batch, _ in self.world.pipeline.under_way]
        self.world.lose()
        self.lost_before |= set(self.clients)
        for number in late:
            assert self.world.scheduler.complete(number, {}, {}) == []

    def transfer(self) -> None:
        self.world.transfer(lambda length: self.rng.choice((0, self.rng.randint(0, length), length)))
        self.lost_before |= set(self.clients)
        self.transfers += bool(self.world.pipeline.before)

    def run(self) -> None:
        rng = self.rng
        actions = [
            self.submit,
            self.answer,
            self.world.pump,
            self.lose,
            self.transfer,
            self.world.forget_before,
        ]
        weights = [4, 8, 8, *(rng.choice((0, 0.2, 1)) for _ in range(3))]
        cancelling, suspecting = rng.choice((0, 0.05)), rng.choice((0, 0.05))
        for _ in range(rng.choice((20, 150))):
            rng.choices(actions, weights)[0]()
            if self.world.clients and rng.random() < cancelling:
                self.world.cancel(rng.choice(list(self.world.clients)))
            if self.world.clients and rng.random() < suspecting:
                self.world.set_apart(rng.choice(list(self.world.clients)))
            self.texts += [[*client.request.prompt, *client.got] for client in self.clients[-1:]]
        self.failing = False
        self.world.finish()
        self.world.pump()  # late results of cancelled streams may still be due
        assert (self.world.scheduler.active, self.world.scheduler.waiting) == (0, 0)
        for client in self.clients:
            assert client.ended is not None
            if client.cached is not None:
                assert client.moved or client.cached < len(client.request.prompt)
                disturbed = client.moved or client in self.lost_before
                assert disturbed or client.cached == client.first_position


@pytest.mark.parametrize("block", range(10))
def test_whatever_happens_every_stream_gets_the_tokens_of_its_undisturbed_answer(block: int) -> None:
    for seed in range(block * 250, (block + 1) * 250):
        try:
            Chaos(seed).run()
        except BaseException as error:
            error.add_note(f"replay it with Chaos({seed}).run()")
            raise


def test_the_chaos_has_everything_in_it() -> None:
    """Guards the test above: without long answers, stops, reuse or losses it would show nothing."""
    seen: Counter[str | None] = Counter()
    for seed in range(200):
        chaos = Chaos(seed)
        chaos.run()
        seen.update(client.ended for client in chaos.clients)
        cached = "cached" if chaos.world.pipeline.can_trim else "gone on from the end"
        seen[cached] += sum(bool(client.cached) for client in chaos.clients)
        seen["lost"] += len(chaos.lost_before)
        seen["transferred"] += chaos.transfers
        seen["scored"] += sum(client.request.scores_prompt and bool(client.got) for client in chaos.clients)
        seen["moved"] += sum(client.moved for client in chaos.clients)
        seen["guessed"] += chaos.world.scheduler.guessing.accepted
        seen["rejected"] += chaos.world.scheduler.guessing.offered - chaos.world.scheduler.guessing.accepted
    wanted = (
        "stop",
        "length",
        "cancelled",
        "failed",
        "cached",
        "gone on from the end",
        "lost",
        "transferred",
        "scored",
        "guessed",
        "rejected",
    )
    assert seen["moved"] > 1  # it takes a flood, and tests/generation/test_shares.py has more of them
    assert all(seen[what] > 5 for what in wanted), seen


# --- what is refused --------------------------------------------------------------------------------------


def test_requests_that_cannot_be_answered_are_refused() -> None:
    world = World(Limits(sequences=1, context=10, batch_rows=4, queue=2))
    with pytest.raises(BadRequest, match="prompt is empty"):
        world.submit("a", [])
    with pytest.raises(ContextExceeded, match="10 tokens; the context holds 10") as refused:
        world.submit("a", range(10))
    assert refused.value.param is None, "where the prompt came from is not known here"
    with pytest.raises(BadRequest, match="at least 1"):
        world.submit("a", [1], max_tokens=0)
    world.submit("a", [1])
    with pytest.raises(BadRequest, match="already running"):
        world.submit("a", [2])  # waiting
    world.pump()
    with pytest.raises(BadRequest, match="already running"):
        world.submit("a", [2])  # active


@pytest.mark.parametrize("queue", [0, 3])
def test_the_queue_is_bounded_whether_or_not_the_pipeline_has_started(queue: int) -> None:
    world = World(Limits(sequences=2, context=10, batch_rows=4, queue=queue))
    for name in range(2 + queue):
        world.submit(str(name), [1, 2])
    with pytest.raises(Overloaded):
        world.submit("more", [1, 2])
    world.pump()
    assert (world.scheduler.active, world.scheduler.waiting) == (2, queue)
    with pytest.raises(Overloaded):
        world.submit("more", [1, 2])
    world.cancel("0")
    world.submit("more", [1, 2])
    world.finish()


def test_a_micro_batch_has_a_row_for_every_sequence() -> None:
    with pytest.raises(BadRequest, match="9 sequences"):
        Limits(sequences=9, context=10, batch_rows=8, queue=1)


def test_streams_get_their_slots_in_the_order_they_came() -> None:
    world = World(Limits(sequences=1, context=20, batch_rows=20, queue=9))
    clients = [world.submit(str(name), [name + 1] * (9 - name), max_tokens=2) for name in range(6)]
    started: list[str] = []
    while world.clients:
        started += [segment.stream for batch in world.pump() for segment in batch.segments]
        world.answer()
    assert sorted(started, key=int) == started
    assert all(client.ended for client in clients)


# --- the ends of streams ----------------------------------------------------------------------------------


def test_a_prompt_that_leaves_room_for_one_token_gets_one() -> None:
    world = World(Limits(sequences=1, context=10, batch_rows=4, queue=1), end=NEVER)
    client = world.submit("a", range(1, 10))
    world.finish()
    assert (len(client.got), client.ended) == (1, "length")


def test_a_result_on_its_way_is_not_given_to_the_next_stream_of_the_slot_or_of_the_name() -> None:
    world = World(Limits(sequences=1, context=40, batch_rows=40, queue=2, in_flight=2))
    for name in ("b", "a"):
        world.submit("a", tokens(Random(1), 20))
        world.pump()
        world.cancel("a")
        client = world.submit(name, tokens(Random(2), 20), max_tokens=1, seed=1)
        world.pump()
        assert world.answer() == []  # of the cancelled stream
        assert [event.stream for event in world.answer()] == [name]
        assert client.ended


def test_a_failure_ends_its_own_stream_and_no_other() -> None:
    world = World(Limits(sequences=2, context=40, batch_rows=40, queue=2, in_flight=2))
    failing, other = world.submit("a", [1, 2, 3]), world.submit("b", [4, 5], max_tokens=5)
    world.pump()
    events = world.answer(lambda sequence: sequence == failing.sequence)
    assert [event.failure for event in events if event.stream == "a"] == ["no token fits"]
    assert failing.ended == "failed"
    world.finish()
    assert other.ended in ("stop", "length")

    world.submit("a", [1, 2, 3])
    world.pump()
    world.cancel("a")
    again = world.submit("a", [7, 8, 9])
    world.pump()
    assert world.answer(lambda _: True) == []  # it was the cancelled stream that failed
    world.finish()
    assert again.ended in ("stop", "length")


# --- fairness ---------------------------------------------------------------------------------------------


@given(
    in_flight=st.integers(1, 4),
    decoding=st.integers(0, 3),
    long=st.integers(1, 4),
    short=st.integers(1, 60),
    before=st.integers(0, 6),
    batch_rows=st.integers(8, 300),
)
def test_a_short_prompt_starts_after_about_its_own_work(
    in_flight: int, decoding: int, long: int, short: int, before: int, batch_rows: int
) -> None:
    """The bound: of k prompts under computation each gets 1/k of a micro-batch's prefill rows at least, so
    the first token comes with the micro-batch number ceil(rows / share) after those already under way."""
    limits = Limits(sequences=8, context=4000, batch_rows=batch_rows, queue=8, in_flight=in_flight)
    world = World(limits, end=NEVER)
    for name in range(decoding):
        world.submit(f"decoding {name}", [name + 1])
    for _ in range(3 if decoding else 0):
        world.step()
    for name in range(long):
        world.submit(f"long {name}", [name + 9] * 3000)
    for _ in range(before):
        world.step()
    world.pump()
    under_way = len(world.pipeline.under_way)
    world.submit("short", [5] * short)
    budget = batch_rows - decoding
    share = (min(PREFILL_ROWS_BESIDE_DECODE, budget) if decoding else budget) // (long + 1)
    for _ in range(under_way - (-short // share)):
        if any(event.stream == "short" for event in world.step()):
            return
    pytest.fail("the short prompt waits for the long ones")


@pytest.mark.parametrize("in_flight", [1, 2, 3, 4])
def test_decoding_streams_wait_for_few_rows_of_prefill(in_flight: int) -> None:
    """From a stream's first token on, a micro-batch has 128 rows of prefill at most, and its next token
    comes within two rounds of the micro-batches under way: with one at a time, in each."""
    world = World(Limits(sequences=8, context=4000, batch_rows=512, queue=8, in_flight=in_flight), end=NEVER)
    for name in range(5):
        world.submit(f"decoding {name}", [name + 1])
    for _ in range(2 * in_flight):
        world.step()
    for name in range(3):
        world.submit(f"long {name}", [name + 9] * 1500)
    waited = dict.fromkeys((f"decoding {name}" for name in range(5)), 0)
    for _ in range(35):
        for batch in world.pump():
            prefill = sum(len(segment.tokens) for segment in batch.segments if "long" in segment.stream)
            assert prefill <= PREFILL_ROWS_BESIDE_DECODE
        served = {event.stream for event in world.answer()}
        for name in waited:
            waited[name] = 0 if name in served else waited[name] + 1
            assert waited[name] < (1 if in_flight == 1 else 2 * in_flight)


def test_prefill_rows_are_shared_by_water_filling() -> None:
    world = World(Limits(sequences=4, context=2000, batch_rows=64, queue=8))
    for name, length in (("long", 1000), ("short", 3), ("middle", 100)):
        world.submit(name, [1] * length)
    batch = world.scheduler.next_batch()
    assert batch is not None
    rows = {segment.stream: len(segment.tokens) for segment in batch.segments}
    assert rows == {"short": 3, "middle": 30, "long": 31}


def test_every_prompt_advances_in_every_micro_batch_however_many_there_are() -> None:
    world = World(Limits(sequences=200, context=2000, batch_rows=200, queue=0))
    for name in range(200):
        world.submit(str(name), [1 + name % 9] * (1 if name == 0 else 50))
    world.step()
    (batch,) = world.pump()  # one decodes, and 128 rows are not enough
    assert len(batch.segments) == 200


def test_a_replay_is_not_slowed_down_for_streams_that_cannot_decode_yet() -> None:
    world = World(Limits(sequences=2, context=1000, batch_rows=512, queue=2), end=NEVER)
    world.submit("a", [1] * 300)
    world.step()
    world.pump()
    world.lose()
    batch = world.scheduler.next_batch()
    assert batch is not None
    assert [len(segment.tokens) for segment in batch.segments] == [301]


def test_a_suspect_travels_alone_until_it_gets_a_token() -> None:
    world = World(Limits(sequences=3, context=99, batch_rows=20, queue=2, in_flight=2), end=NEVER)
    for name in "abc":
        world.submit(name, [1] * 30)
    world.step()
    world.lose()
    world.set_apart("b")
    travelled = world.pump()
    while not world.answer():
        travelled += world.pump()
    assert [(s.stream, len(s.tokens)) for batch in travelled for s in batch.segments] == [
        ("b", 20),
        ("b", 10),
    ]
    assert {segment.stream for segment in world.pump()[0].segments} == {"a", "b", "c"}


@pytest.mark.parametrize("in_flight", [2, 3, 4])
@pytest.mark.parametrize("streams", range(2, 9))
def test_all_stages_work_at_once(in_flight: int, streams: int) -> None:
    """With as many decoding streams as places there is, one round after they started, a micro-batch under
    way in each place, and none has more than its part of the streams."""
    world = World(Limits(sequences=8, context=4000, batch_rows=64, queue=8, in_flight=in_flight), end=NEVER)
    for name in range(streams):
        world.submit(str(name), [name + 1] * (1 + 5 * name))
    for step in range(80):
        world.pump()
        if step > 30:
            sizes = [len(batch.segments) for batch, _ in world.pipeline.under_way]
            assert len(sizes) == min(in_flight, streams)
            assert max(sizes) <= -(-streams // in_flight)
        world.answer()


# --- slots and prefixes -----------------------------------------------------------------------------------


def roomy(sequences: int, *, can_trim: bool = True) -> World:
    """A world in which answers have a given length, whatever the tokens are."""
    limits = Limits(sequences=sequences, context=250, batch_rows=64, queue=8)
    return World(limits, end=NEVER, can_trim=can_trim)


def answered(world: World, name: str, prompt: list[int], count: int = 4) -> tuple[list[int], int]:
    """Run a request alone; its whole text, and the rows that were computed."""
    before = world.pipeline.rows_sent
    client = world.submit(name, prompt, count)
    world.finish()
    return prompt + client.got, world.pipeline.rows_sent - before


def slot_of_new(world: World, name: str, prompt: list[int]) -> int:
    """Start a stream that goes on; its slot."""
    client = world.submit(name, prompt)
    while client.sequence is None:
        world.step()
    return client.sequence


def test_the_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    rng, world = Random(3), roomy(4)
    history, rows = answered(world, "turn 1", tokens(rng, 60))
    assert rows == 60 + 3  # the last token of an answer is never computed
    history, rows = answered(world, "turn 2", history + tokens(rng, 10))
    assert rows == 1 + 10 + 3
    _, rows = answered(world, "turn 2 again", history[:-4])
    assert rows == 1 + 3  # the last token of the prompt is computed in any case


def test_a_state_that_cannot_be_shortened_goes_on_from_its_end_or_begins_anew() -> None:
    rng, world = Random(3), roomy(1, can_trim=False)
    history, _ = answered(world, "turn 1", tokens(rng, 60))
    longer, rows = answered(world, "turn 2", history + tokens(rng, 10))
    assert rows == 1 + 10 + 3
    _, rows = answered(world, "turn 2 again", longer[:-4])
    assert rows == len(longer) - 4 + 3
    client = world.submit("turn 1 again", history[:60], 4)
    world.finish()
    assert client.cached == 0


def test_what_a_cancelled_stream_still_computes_is_known() -> None:
    """Its micro-batch goes round by itself until it is halted, and a state that is longer cannot go on."""
    rng, world = Random(12), roomy(1, can_trim=False)
    client = world.submit("a", tokens(rng, 20))
    for _ in range(6):
        world.step()
    written = [*client.request.prompt, *client.got]
    world.cancel("a")
    while world.pipeline.under_way:
        world.answer()
        world.pipeline.halted.update(world.scheduler.halts())
    held = world.pipeline.cache[0]
    assert len(held) >= len(written) and held[: len(written)] == written
    _, rows = answered(world, "b", held + tokens(rng, 5))
    assert rows == 5 + 3


def test_chats_with_the_same_system_prompt_do_not_take_each_others_slot() -> None:
    rng, world = Random(4), roomy(4)
    system = tokens(rng, 16)
    histories = [answered(world, f"{n}.1", system + tokens(rng, 40))[0] for n in range(4)]
    for n in (2, 0, 3, 1):
        _, rows = answered(world, f"{n}.2", histories[n] + tokens(rng, 5))
        assert rows == 1 + 5 + 3


def test_a_long_system_prompt_is_reused_where_that_costs_less_than_it_saves() -> None:
    rng, world = Random(5), roomy(4)
    system = tokens(rng, 100)
    answered(world, "a", system + tokens(rng, 10))
    _, rows = answered(world, "b", system + tokens(rng, 12))
    assert rows == 12 + 3


def test_the_longest_prefix_wins_then_the_slot_with_less_to_lose_even_against_neighbours() -> None:
    rng, world = Random(6), roomy(4)
    text = tokens(rng, 50)
    assert slot_of_new(world, "long", text[:40]) == 0
    assert slot_of_new(world, "short", text[:30]) == 1
    assert slot_of_new(world, "other", tokens(rng, 20)) == 2
    world.cancel("long")
    world.cancel("short")
    assert slot_of_new(world, "as long", text) == 0
    world.cancel("as long")
    assert slot_of_new(world, "branches off", text[:30] + tokens(rng, 9)) == 1


def test_a_new_chat_takes_an_empty_slot_then_the_one_released_first() -> None:
    rng, world = Random(7), roomy(3)
    assert slot_of_new(world, "slow", tokens(rng, 20)) == 0
    for expected, name in enumerate(("a", "b"), 1):
        assert slot_of_new(world, name, tokens(rng, 20)) == expected
    for name in ("a", "b", "slow"):
        world.cancel(name)
    assert slot_of_new(world, "c", tokens(rng, 20)) == 1  # not 0, which was given out first but released last
    world.cancel("c")
    assert slot_of_new(world, "d", tokens(rng, 20)) == 2


def test_streams_take_neighbouring_slots_so_that_their_rows_go_in_one_call() -> None:
    rng, world = Random(8), roomy(6)
    assert [slot_of_new(world, name, tokens(rng, 5)) for name in "abcde"] == [0, 1, 2, 3, 4]
    for name in "bad":  # slots 0, 1 and 3
        world.cancel(name)
    world.lose()  # nothing is cached: only the neighbours decide
    assert slot_of_new(world, "f", tokens(rng, 5)) == 3  # joins c in 2 and e in 4
    assert slot_of_new(world, "g", tokens(rng, 5)) == 1  # extends the run
    assert slot_of_new(world, "h", tokens(rng, 5)) == 0


def test_a_few_cached_tokens_do_not_decide() -> None:
    rng, world = Random(9), roomy(4)
    prompts = [tokens(rng, 3) for _ in range(3)]
    assert [slot_of_new(world, str(slot), prompts[slot]) for slot in range(3)] == [0, 1, 2]
    world.cancel("0")
    world.cancel("1")
    assert slot_of_new(world, "new", prompts[0] + tokens(rng, 9)) == 1  # beside 2


# --- the token log ----------------------------------------------------------------------------------------


@given(prompt=st.lists(st.integers(), min_size=1), generated=st.lists(st.integers()), data=st.data())
def test_a_token_log_is_prompt_and_answer_in_one(
    prompt: list[int], generated: list[int], data: st.DataObject
) -> None:
    log = TokenLog(prompt, SamplingParams())
    for token in generated:
        log.append(token)
    whole = prompt + generated
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert len(log) == len(whole)
    assert log.tokens(start, stop) == whole[start:stop]


def one_stream(steps: int) -> tuple[World, TokenLog]:
    """A world whose only stream has `steps` tokens and the row of the last one under way; and its log."""
    world = roomy(1)
    world.submit("a", [1, 2, 3])
    (batch,) = world.pump()
    for _ in range(steps):
        world.answer()
        world.pump()
    return world, batch.opens[0]


def test_a_slot_that_differs_from_its_log_at_the_end_is_noticed_at_the_next_token() -> None:
    world, log = one_stream(steps=1)
    log.generated[-1] += 1
    with pytest.raises(AssertionError, match="its slot is not its log"):
        world.answer()


def test_a_slot_that_is_longer_than_its_log_is_noticed_at_the_next_token() -> None:
    world, log = one_stream(steps=4)
    del log.generated[:]
    with pytest.raises(AssertionError, match="its slot is longer than its log"):
        world.scheduler.complete(2, {0: Choice(5)}, {})


def test_a_slot_that_differs_from_its_log_anywhere_is_noticed_by_tests() -> None:
    world, log = one_stream(steps=4)
    world.scheduler.check_slots()
    log.generated[0] += 1
    with pytest.raises(AssertionError, match="its slot is not its log"):
        world.scheduler.check_slots()


def test_what_the_placement_before_has_is_not_computed_again() -> None:
    rng, world = Random(10), roomy(2)
    history, _ = answered(world, "turn 1", tokens(rng, 60))
    world.transfer(lambda length: length)
    _, rows = answered(world, "turn 2", history + tokens(rng, 10))
    assert rows == 1 + 10 + 3
    world.submit("under way", tokens(rng, 60))
    world.step()
    world.transfer(lambda length: length)
    (batch,) = world.pump()
    assert [(len(segment.tokens), segment.inherit) for segment in batch.segments] == [(1, True)]


def test_what_was_not_taken_over_in_time_is_computed_again() -> None:
    rng, world = Random(11), roomy(2)
    world.submit("a", tokens(rng, 60))
    world.step()
    world.transfer(lambda length: length)
    world.forget_before()
    (batch,) = world.pump()
    assert (batch.segments[0].first_position, batch.segments[0].inherit) == (0, False)


def test_a_newcomer_ends_a_repeated_micro_batch_with_its_next_step() -> None:
    world = World(Limits(sequences=2, context=1000, batch_rows=8, queue=2), end=NEVER)
    world.submit("a", [1, 2])
    world.step()
    (batch,) = world.pump()
    assert batch.steps > 2
    assert [event.stream for event in world.step()] == ["a"]  # goes round by itself
    assert world.pump() == []
    world.submit("b", [3])
    world.step()  # told to halt: this step is the last
    assert {segment.stream for batch in world.pump() for segment in batch.segments} == {"a", "b"}


def test_a_repeated_micro_batch_that_nobody_wants_is_halted() -> None:
    world = World(Limits(sequences=1, context=1000, batch_rows=8, queue=2), end=NEVER)
    world.submit("a", [1, 2])
    world.step()
    (batch,) = world.pump()
    world.cancel("a")
    assert world.scheduler.halts() == [batch.id]
    assert world.scheduler.halts() == []
