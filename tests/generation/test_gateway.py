"""Streams between gateways and hosts: whatever network, hosts and routes do, every client gets the tokens of
the undisturbed answer, each once; and hosts soon stop computing what no client wants."""

from collections import Counter
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadRequest, ContextExceeded, Overloaded, StageFailed
from cordee.generation import streams
from cordee.generation.batches import Limits
from cordee.generation.gateway import WAIT_SECONDS, Gateway
from cordee.generation.host import LEASE_SECONDS, SESSIONS_MAX, WINDOW_TOKENS, Host
from cordee.generation.request import Choice, Request, SamplingParams
from cordee.generation.scheduler import Scheduler
from cordee.generation.streams import STREAMS_MAX, Ask, Assert, Piece, Said
from cordee.generation.suspects import LOSSES_MAX
from scheduler_world import END, NEVER, VOCABULARY, next_token
from scheduler_world import Client as SchedulerClient
from scheduler_world import World as SchedulerWorld
from stream_world import BAD_TOKEN, Chaos, Weather, World

ROOMY = Limits(sequences=4, context=200, batch_rows=64, queue=30)
NARROW = Limits(sequences=1, context=200, batch_rows=64, queue=1)


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), **rest) -> Request:
    return Request(id=name, prompt=prompt, **rest)


def long_request(name: str, length: int = 60) -> Request:
    """A request whose undisturbed answer has at least `length` tokens."""
    random = Random(name)
    while True:
        prompt = tuple(random.randrange(VOCABULARY) for _ in range(3))
        tokens = list(prompt)
        while len(tokens) < 3 + length and (token := next_token(0, tokens)) != END:
            tokens.append(token)
        if len(tokens) == 3 + length:
            return request(name, prompt, max_tokens=length)


def calm_world(limits: Limits = ROOMY) -> World:
    """A world where all gateways route to `small0`."""
    world = World(1, limits=limits)
    for gateway in world.gateways.values():
        gateway.route("small", "small0")
    return world


def until_tokens(world: World, client, count: int) -> None:
    for _ in range(2000):
        if len(client.got) >= count or client.ended:
            break
        world.step()
    assert client.ended is None and len(client.got) >= count


# --- whatever happens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_whatever_happens_every_client_gets_its_tokens_once(block: int) -> None:
    for seed in range(block * 100, (block + 1) * 100):
        try:
            Chaos(seed).run()
        except BaseException as error:
            error.add_note(f"replay it with Chaos({seed}).run()")
            raise


def test_the_chaos_has_everything_in_it() -> None:
    seen: Counter[str | None] = Counter()
    for seed in range(100):
        chaos = Chaos(seed)
        chaos.run()
        seen.update(client.ended for client in chaos.world.ended)
    wanted = ("stop", "length", "cancelled", "gateway lost", "Overloaded", "ContextExceeded", "BadRequest")
    assert all(seen[what] > 9 for what in wanted) and seen["StageFailed"], seen


def test_in_good_weather_a_stream_is_asked_once_and_tokens_come_as_they_are_made() -> None:
    world = calm_world()
    clients = [world.open("g0", long_request(str(index))) for index in range(4)]
    world.settle(20.0)
    assert {client.ended for client in clients} == {"length"}
    # An Ask each, a Said for each step of all four together, an Assert and its answer each second.
    assert world.messages < 4 + 60 * 1.5 + 4 * world.now


# --- hosts come and go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["crash", "restart", "freeze", "lose pipeline", "two hosts", "no route"])
def test_a_stream_survives(fault: str) -> None:
    world = calm_world()
    client = world.open("g0", long_request("a"))
    until_tokens(world, client, 10)
    old, gateway = world.hosts["small0"], world.gateways["g0"]
    if fault == "crash":
        old.up = False
        world.pass_time(2.0)
        gateway.route("small", "small1")
    elif fault == "restart":
        old.start()
    elif fault == "freeze":
        old.frozen_until = world.now + 3 * LEASE_SECONDS
        world.pass_time(LEASE_SECONDS)
    elif fault == "lose pipeline":
        old.lose()
    elif fault == "two hosts":
        gateway.route("small", "small1")  # and the other goes on
    else:
        old.up = False
        gateway.route("small", None)
        world.pass_time(300.0)
        gateway.route("small", "small1")
    for _ in range(2000):
        world.step()
        if client.ended:
            break
    assert (client.ended, len(client.got)) == ("length", 60)


def test_a_queue_survives_a_new_placement() -> None:
    """Streams that a host had accepted are not refused by the next one, however full it is."""
    limits = Limits(sequences=1, context=200, batch_rows=64, queue=20)
    world = calm_world(limits)
    clients = [world.open("g0", long_request(str(index), 20)) for index in range(12)]
    world.pass_time(0.5)
    world.limits = NARROW
    world.hosts["small1"].start()
    world.hosts["small0"].up = False
    world.gateways["g0"].route("small", "small1")
    for _ in range(4000):
        world.step()
    assert [client.ended for client in clients] == ["length"] * 12


def test_without_a_host_a_stream_waits_then_fails_with_a_remedy() -> None:
    world = World(1)
    client = world.open("g0", request("a"))
    world.pass_time(WAIT_SECONDS - 5)
    assert client.ended is None
    world.pass_time(10.0)
    assert client.ended == "StageFailed"
    gateway = Gateway(1)
    gateway.open(request("a"), "m")
    for second in range(int(WAIT_SECONDS) + 3):
        gateway.tick(float(second))
    (news,) = gateway.drain()[1]
    assert isinstance(news.error, StageFailed) and "cordee status" in news.error.message


def test_time_in_which_the_gateway_was_stopped_does_not_count() -> None:
    gateway = Gateway(1)
    gateway.open(request("a"), "m")
    gateway.tick(0.0)
    gateway.tick(1e9)
    gateway.tick(-1e9)
    assert gateway.drain() == ([], [])


# --- refusals ---------------------------------------------------------------------------------------------


def test_refusals_before_the_first_token_go_to_the_client() -> None:
    world = calm_world(NARROW)
    running = world.open("g0", long_request("running"))
    until_tokens(world, running, 5)
    waiting = world.open("g0", long_request("waiting"))
    world.pass_time(0.5)
    refused = {
        "Overloaded": world.open("g1", long_request("third")),
        "ContextExceeded": world.open("g1", request("long", (1,) * 200)),
        "BadRequest": world.open("g1", request("bad", (BAD_TOKEN,))),
    }
    world.pass_time(1.0)
    assert {client.ended for client in refused.values()} == set(refused)
    assert all(client.ended == name for name, client in refused.items())
    world.settle(60.0)
    assert running.ended == waiting.ended == "length"


def test_errors_arrive_as_they_were_raised() -> None:
    for error in (Overloaded("full"), ContextExceeded("long", "messages"), BadRequest("bad", "prompt")):
        back = streams.as_error(streams.failure(error, refused=True))
        assert (type(back), back.message) == (type(error), error.message)
        assert getattr(back, "param", None) == getattr(error, "param", None)
    for strange in ("os", "Exception", "nonsense"):
        assert type(streams.as_error(streams.Failure(strange, "x", None, True))) is StageFailed


def test_ids_and_numbers_of_open_streams_are_bounded() -> None:
    gateway = Gateway(1)
    gateway.open(request("0"), "m")
    with pytest.raises(BadRequest, match="already"):
        gateway.open(request("0"), "m")
    for index in range(1, STREAMS_MAX):
        gateway.open(request(str(index)), "m")
    with pytest.raises(Overloaded):
        gateway.open(request("more"), "m")
    gateway.cancel("0")
    gateway.open(request("more"), "m")


# --- nobody computes what nobody wants --------------------------------------------------------------------


def endless() -> World:
    """A world whose streams end only when they are cancelled."""
    return calm_world(Limits(sequences=2, context=100_000, batch_rows=8, queue=30))


def never_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers without an end: the tokens 1, 2, 3, 1, ..."""
    monkeypatch.setattr("scheduler_world.next_token", lambda seed, history: 1 + len(history) % 3)
    monkeypatch.setattr("stream_world.next_token", lambda seed, history: 1 + len(history) % 3)


def test_a_cancelled_stream_frees_its_slot_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    never_ending(monkeypatch)
    world = endless()
    world.weather = Weather(loss=0.5)
    until_tokens(world, world.open("g0", request("a")), 5)
    world.cancel("g0", "a")
    world.pass_time(8.0)
    assert world.hosts["small0"].host.active == 0


def test_streams_of_a_gateway_that_is_gone_end_with_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    never_ending(monkeypatch)
    world = endless()
    until_tokens(world, world.open("g0", request("a")), 5)
    until_tokens(world, world.open("g1", request("a")), 5)
    world.restart_gateway("g0")
    world.pass_time(LEASE_SECONDS - 2.0)
    assert world.hosts["small0"].host.active == 2
    world.pass_time(4.0)
    assert world.hosts["small0"].host.active == 1  # the other gateway's


def test_a_moved_stream_is_dropped_by_the_host_that_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    never_ending(monkeypatch)
    world = endless()
    client = world.open("g0", request("a"))
    until_tokens(world, client, 5)
    world.gateways["g0"].route("small", "small1")
    world.pass_time(1.0)
    assert [world.hosts[name].host.active for name in ("small0", "small1")] == [0, 1]
    until_tokens(world, client, 30)


# --- the host alone ---------------------------------------------------------------------------------------


class Lone:
    """A host that a test talks to by hand; its tokens are 1, 2, 3, ..."""

    def __init__(self, limits: Limits = ROOMY) -> None:
        self.host = Host(Scheduler(limits, {0}), 10_000, Random(1))
        self.host.ready = True

    def ask(self, number: int, stream: int = 0, generated: tuple[int, ...] = (), peer: int = 1) -> None:
        self.host.receive("g", Ask(7, peer, "m", number, stream, request("x"), generated))

    def wanted(self, number: int, *asks: tuple[int, int], gateway: int = 7) -> None:
        self.host.receive("g", Assert(gateway, 1, "m", number, asks))

    def work(self, steps: int = 1) -> None:
        for _ in range(steps):
            batch = self.host.next_batch()
            assert batch is not None
            sampled = [segment for segment in batch.segments if segment.sample]
            ends = {each.sequence: each.first_position + len(each.tokens) for each in sampled}
            choices = {sequence: Choice(end - 2) for sequence, end in ends.items()}
            self.host.complete(batch.id, choices, {})

    def said(self) -> list[Said]:
        return [said for _, said in self.host.drain()]


def test_an_ask_that_comes_twice_is_worked_on_once() -> None:
    lone = Lone()
    lone.ask(1)
    lone.work()
    lone.ask(1)
    assert (lone.host.active, lone.host.waiting) == (1, 0)
    assert [said.pieces for said in lone.said()] == [(Piece(1, 0, (1,)),)]


def test_a_newer_ask_replaces_the_older_whatever_comes_first() -> None:
    lone = Lone()
    for number in (5, 3):
        lone.ask(number, stream=1, generated=(9,) * (number - 3))
    lone.work()
    (said,) = lone.said()
    assert [(piece.ask, piece.first) for piece in said.pieces] == [(5, 2)]
    lone.ask(8, stream=1)
    lone.ask(5, stream=1)
    assert lone.host.active + lone.host.waiting == 1


def test_an_ask_that_is_no_longer_wanted_is_not_begun() -> None:
    lone = Lone()
    lone.wanted(9, (4, 0))
    lone.ask(3, stream=3)
    assert lone.host.waiting == 0
    lone.ask(4, stream=4)
    lone.ask(10, stream=10)
    assert lone.host.waiting == 2


def test_a_gateway_that_forgot_the_host_begins_a_new_session() -> None:
    lone = Lone()
    lone.ask(1)
    lone.ask(5, peer=4)
    lone.ask(2, peer=1)  # late
    assert lone.host.waiting == 1
    lone.work()
    assert [(said.peer, said.pieces[0].ask) for said in lone.said()] == [(4, 5)]


def test_an_older_assert_is_not_believed() -> None:
    lone = Lone()
    lone.ask(1)
    lone.wanted(5, (1, 0))
    lone.wanted(4)
    assert lone.host.waiting == 1
    assert [(said.answers, said.unknown) for said in lone.said()] == [(5, ())]


def test_what_was_lost_is_sent_again_until_it_is_acknowledged() -> None:
    lone = Lone()
    lone.ask(1)
    lone.work(4)
    lone.said()
    lone.wanted(2, (1, 1))
    (said,) = lone.said()
    assert said.pieces == (Piece(1, 1, (2, 3, 4)),)
    lone.wanted(3, (1, 4))
    (said,) = lone.said()
    assert (said.answers, said.pieces) == (3, ())
    lone.work()
    assert lone.said()[0].pieces == (Piece(1, 4, (5,)),)


def test_a_gateway_that_never_acknowledges_does_not_fill_the_memory() -> None:
    lone = Lone(Limits(sequences=1, context=5000, batch_rows=8, queue=1))
    lone.ask(1)
    lone.work(WINDOW_TOKENS + 1)
    assert lone.host.active == 0
    (piece,) = lone.said()[-1].pieces
    assert piece.failure is not None and piece.failure.refused and len(piece.tokens) == WINDOW_TOKENS + 1


def test_sessions_are_bounded_and_heal_after_a_lease() -> None:
    lone = Lone()
    for gateway in range(SESSIONS_MAX + 5):
        lone.wanted(1 << 60, gateway=gateway)  # from the future: nothing else would be heard
    assert len(lone.said()) == SESSIONS_MAX
    lone.ask(1)
    lone.wanted(2, (1, 0))
    assert lone.said() == [] and lone.host.waiting == 0
    for second in range(int(LEASE_SECONDS) + 3):
        lone.host.tick(float(second))
    lone.wanted(3, (1, 0))
    assert lone.said()[0].unknown == (1,)


def test_time_in_which_the_host_was_stopped_ends_no_lease() -> None:
    lone = Lone()
    lone.ask(1)
    for now in (0.0, 1e6, 0.0, 1e7):
        lone.host.tick(now)
    assert lone.host.waiting == 1


def test_a_request_that_breaks_the_stages_is_found_alone_and_ended() -> None:
    lone = Lone(Limits(sequences=2, context=200, batch_rows=8, queue=4))
    lone.ask(1, stream=1)
    lone.ask(2, stream=2)
    ended = {}
    for _ in range(4 * LOSSES_MAX):
        batch = lone.host.next_batch()
        names = {segment.stream.rpartition("-")[2] for segment in batch.segments}
        if "1" in names:
            lone.host.lost()
        else:
            lone.host.complete(batch.id, {batch.segments[0].sequence: Choice(1)}, {})
        for said in lone.said():
            ended |= {piece.ask: piece.failure for piece in said.pieces if piece.failure}
    assert set(ended) == {1} and not ended[1].refused
    assert lone.host.active == 1


# --- the gateway alone ------------------------------------------------------------------------------------


def asked(gateway: Gateway) -> Ask:
    (ask,) = [message for _, message in gateway.drain()[0] if isinstance(message, Ask)]
    return ask


def test_tokens_of_another_session_are_not_mixed_in() -> None:
    """A host that restarted may compute otherwise; from it the stream is asked again."""
    gateway = Gateway(7)
    gateway.route("m", "h")
    gateway.open(request("a"), "m")
    ask = asked(gateway)
    gateway.receive("h", Said(7, ask.peer, 1, True, (Piece(ask.number, 0, (1, 2)),)))
    gateway.drain()
    gateway.receive("h", Said(7, ask.peer, 2, True, (Piece(ask.number, 2, (3,)),)))
    again = asked(gateway)
    assert (again.generated, again.stream) == ((1, 2), ask.stream) and again.number > ask.number
    gateway.receive("h", Said(7, ask.peer, 1, True, (Piece(ask.number, 2, (4,)),)))  # late
    assert gateway.drain() == ([], [])
    gateway.receive("h", Said(7, ask.peer, 2, True, (Piece(again.number, 2, (5,)),)))
    assert [news.choices for news in gateway.drain()[1]] == [(Choice(5),)]


def test_a_host_that_forgot_a_stream_is_asked_with_the_log_as_it_is() -> None:
    gateway = Gateway(7)
    gateway.route("m", "h")
    gateway.open(request("a"), "m")
    ask = asked(gateway)
    for forgotten, generated in ((ask.number, ()), (ask.number, (1, 2))):
        if generated:
            gateway.receive("h", Said(7, ask.peer, 1, True, (Piece(ask.number, 0, generated),)))
        gateway.tick(0.0)
        gateway.tick(0.5)
        gateway.tick(1.0)
        (last,) = {message.number for _, message in gateway.drain()[0] if isinstance(message, Assert)}
        gateway.receive("h", Said(7, ask.peer, 1, True, (), answers=last, unknown=(forgotten,)))
        again = asked(gateway)
        assert again.generated == generated
        # One that nobody confirmed may be on its way still: the same again does no harm then.
        assert (again.number == ask.number) == (not generated)


def test_messages_for_another_gateway_or_none_are_dropped() -> None:
    gateway = Gateway(7)
    gateway.route("m", "h")
    gateway.open(request("a"), "m")
    ask = asked(gateway)
    for said in (
        Said(8, ask.peer, 1, True, (Piece(ask.number, 0, (1,)),)),
        Said(7, 99, 1, True, (Piece(ask.number, 0, (1,)),)),
        Said(7, ask.peer, 1, True, (Piece(99, 0, (1,)),), answers=1 << 60, unknown=(ask.number,)),
    ):
        gateway.receive("h", said)
    assert gateway.drain() == ([], [])


def test_a_host_that_does_not_answer_is_asked_again() -> None:
    gateway = Gateway(7)
    gateway.route("m", "h")
    gateway.open(request("a"), "m")
    asks = [asked(gateway)]
    for second in range(40):
        gateway.tick(float(second))
        asks += [message for _, message in gateway.drain()[0] if isinstance(message, Ask)]
    assert len(asks) == 2 and asks[0].peer != asks[1].peer and asks[0].stream == asks[1].stream


def test_a_gateway_without_streams_falls_silent() -> None:
    world = calm_world()
    world.open("g0", request("a", max_tokens=3))
    world.settle(10.0)
    assert world.gateways["g0"].busy
    world.pass_time(70.0)
    assert not world.gateways["g0"].busy
    before = world.messages
    world.pass_time(20.0)
    assert world.messages == before


# --- resumed streams --------------------------------------------------------------------------------------


@given(
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=20),
    cut=st.integers(0, 18),
    rows=st.integers(1, 9),
    warm=st.booleans(),
)
def test_a_resumed_stream_gets_the_rest_of_its_undisturbed_answer(
    prompt: list[int], cut: int, rows: int, warm: bool
) -> None:
    world = SchedulerWorld(Limits(sequences=1, context=40, batch_rows=rows, queue=2), end=NEVER)
    whole = world.submit("whole", prompt, 20)
    world.finish()
    if not warm:
        world.lose()
    cut = min(cut, len(whole.got) - 1)
    resumed = SchedulerClient(msgspec.structs.replace(whole.request, id="resumed"), whole.got[:cut])
    world.scheduler.submit(resumed.request, whole.got[:cut])
    world.clients["resumed"] = resumed
    world.finish()
    assert (resumed.got, resumed.ended) == (whole.got, whole.ended)


def test_resumed_streams_are_refused_like_new_ones() -> None:
    scheduler = Scheduler(Limits(sequences=1, context=10, batch_rows=4, queue=2), {END})
    with pytest.raises(ContextExceeded, match="answer so far have 10 tokens"):
        scheduler.submit(request("a"), [1] * 7)
    with pytest.raises(BadRequest, match="at least 4"):
        scheduler.submit(request("a", max_tokens=3), [1] * 3)
    scheduler.submit(request("a", max_tokens=4), [1] * 3)


# --- messages ---------------------------------------------------------------------------------------------


def test_messages_arrive_as_they_were_sent() -> None:
    choices = (Choice(5, -0.25, ((5, -0.25), (7, -1.5))), Choice(6, -0.5))
    ended = streams.piece(4, 2, choices, 1, "stop", None)
    assert ended.choices == choices
    sampling = SamplingParams(seed=3, logit_bias={4: 1.0})
    for message in (
        Ask(2**63 - 1, 1, "m", 4, 3, request("a", sampling=sampling, stop=("x",)), (1, 2)),
        Assert(1, 2, "m", 5, ((4, 2), (3, 1))),
        Said(1, 2, 3, True, (ended, Piece(7, 0, (1,))), 5, (3,)),
    ):
        assert streams.decode(streams.encode(message)) == message


def test_a_step_of_eight_streams_takes_few_bytes() -> None:
    said = Said(2**62, 5, 2**62, True, tuple(Piece(3000 + n, 500, (100_000 + n,)) for n in range(8)))
    assert len(streams.encode(said)) < 30 + 8 * 24


@given(st.binary(max_size=200))
def test_garbage_is_no_message(data: bytes) -> None:
    with pytest.raises(BadRequest):
        streams.decode(b"\x93" + data)  # an array of three: no message has so few


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_messages_are_refused_or_whole(noise: bytes, at: int) -> None:
    data = streams.encode(Ask(1, 1, "m", 4, 3, request("a"), (1, 2)))
    damaged = data[:at] + noise + data[at + len(noise) :]
    try:
        message = streams.decode(damaged)
    except BadRequest:
        return
    assert isinstance(message, Ask | Assert | Said)


def test_streams_for_two_names_of_one_model_share_a_host_and_do_not_disturb_each_other() -> None:
    """One file is deployed under two names, with a context for each, and one host answers for both."""
    world = calm_world()
    gateway = world.gateways["g0"]
    gateway.route("small by another name", "small0")
    for turn in range(4):
        for model in ("small", "small by another name"):
            client = world.open("g0", request(f"{model} {turn}", max_tokens=3), model)
            began = world.now
            while client.ended is None:
                assert world.now - began < LEASE_SECONDS, f"{model} waits in turn {turn}"
                world.step()
            assert client.ended == "length"
