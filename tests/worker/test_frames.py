"""Links between processes: frames survive any fragmentation, and nothing that is no frame gets past them."""

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections.abc import Generator

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cordee.engine.stage import StageConfig, StageDescription
from cordee.generation.request import Choice, Grammar, SamplingParams
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import (
    Hello,
    Join,
    Loaded,
    LoadFailed,
    LoadStage,
    Message,
    Opening,
    Rows,
    Run,
    Tokens,
    Wire,
    Wired,
    WireFailed,
)

SECONDS = 30.0  # a test that waits this long hangs

texts = st.text(max_size=40)
ids = st.integers(0, 2**31 - 1)
floats = st.floats(allow_nan=False)
configs = st.builds(
    StageConfig,
    context=ids,
    sequences=ids,
    batch_rows=ids,
    threads=st.none() | ids,
    devices=st.lists(texts, max_size=3).map(tuple),
    batch_invariant=st.booleans(),
)
descriptions = st.builds(
    StageDescription,
    architecture=texts,
    layers=ids,
    is_last=st.booleans(),
    n_embd=ids,
    n_vocab=ids,
    build=texts,
    weights_bytes=st.integers(0, 2**62),
    kv_bytes=ids,
    scratch_bytes=ids,
    threads=ids,
    devices=st.lists(texts, max_size=3).map(tuple),
)
samplings = st.builds(
    SamplingParams,
    temperature=floats,
    seed=st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(ids, floats, max_size=3),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(["gbnf", "json_schema"]), texts),
    top_logprobs=st.none() | st.integers(0, 20),
)
token_lists = st.lists(ids, max_size=50)
openings = st.builds(Opening, sampling=samplings, prompt=token_lists, generated=token_lists)
runs = st.builds(Run, sequence=ids, first_position=ids, rows=ids, output=st.booleans())
choices = st.builds(
    Choice,
    token=ids,
    logprob=st.none() | floats,
    top_logprobs=st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
)
messages = st.one_of(
    st.builds(Hello, texts),
    st.builds(LoadStage, texts, configs, st.booleans()),
    st.builds(Loaded, descriptions),
    st.builds(LoadFailed, texts, texts),
    st.builds(Wire, texts, texts),
    st.builds(Wired, texts),
    st.builds(WireFailed, texts, texts),
    st.builds(Join, texts),
    st.builds(
        Rows,
        wiring=texts,
        batch=st.integers(-(2**31), 2**62),
        runs=st.lists(runs, max_size=5).map(tuple),
        opens=st.dictionaries(ids, openings, max_size=3),
        n_embd=ids,
        measure=st.booleans(),
    ),
    st.builds(
        Tokens,
        wiring=texts,
        batch=ids,
        choices=st.dictionaries(ids, choices, max_size=3),
        failures=st.dictionaries(ids, texts, max_size=3),
        digests=st.dictionaries(ids, texts, max_size=3),
    ),
)
# Around the bound below which a payload is joined to its message, and beyond a socket's buffer.
payloads = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([frames.JOINED_BYTES_MAX, frames.JOINED_BYTES_MAX + 1, 400_000]).map(
        lambda n: b"row." * n
    ),
)
cuts = st.lists(st.integers(1, 4000), max_size=20)


@contextlib.contextmanager
def linked() -> Generator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(SECONDS)
        right.settimeout(SECONDS)
        yield left, right


def frame(message: Message, payload: bytes = b"") -> bytes:
    """What `send` puts on a socket."""
    with linked() as (left, right):
        sender = threading.Thread(target=lambda: (frames.send(left, message, payload), left.close()))
        sender.start()
        data = b"".join(iter(lambda: right.recv(1 << 20), b""))
        sender.join()
    return data


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    """The data in pieces of these sizes, and the rest as one."""
    parts: list[bytes] = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return [part for part in [*parts, data] if part]


def feed(right: socket.socket, parts: list[bytes]) -> threading.Thread:
    def write() -> None:
        with contextlib.suppress(OSError):  # the reader may refuse before all is written
            for part in parts:
                right.sendall(part)
        with contextlib.suppress(OSError):
            right.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    return writer


def received(parts: list[bytes]) -> list[tuple[Message, bytes]]:
    """All frames that a worker reads from these pieces, until LinkClosed."""
    found: list[tuple[Message, bytes]] = []
    with linked() as (left, right):
        writer = feed(right, parts)
        with pytest.raises(LinkClosed):
            while True:
                message, payload = frames.receive(left)
                found.append((message, bytes(payload)))
        left.close()
        writer.join()
    return found


def read(parts: list[bytes]) -> list[tuple[Message, bytes]]:
    """All frames that a worker's parent reads from these pieces, until LinkClosed."""

    async def run() -> list[tuple[Message, bytes]]:
        reader = asyncio.StreamReader()
        found: list[tuple[Message, bytes]] = []

        async def write() -> None:
            for part in parts:
                reader.feed_data(part)
                await asyncio.sleep(0)
            reader.feed_eof()

        writer = asyncio.create_task(write())
        with pytest.raises(LinkClosed):
            while True:
                found.append(await frames.read(reader))
        await writer
        return found

    return asyncio.run(run())


@given(messages, payloads, cuts)
def test_any_frame_in_any_fragments(message: Message, payload: bytes, sizes: list[int]) -> None:
    parts = pieces(frame(message, payload), sizes)
    assert received(parts) == read(parts) == [(message, payload)]


@given(st.lists(st.tuples(messages, st.binary(max_size=50)), max_size=4), cuts)
def test_frames_keep_their_borders(frames: list[tuple[Message, bytes]], sizes: list[int]) -> None:
    parts = pieces(b"".join(frame(*each) for each in frames), sizes)
    assert received(parts) == read(parts) == frames


def test_an_event_loop_writes_what_workers_read() -> None:
    rows = Rows("p", 7, (Run(0, 0, 3, True),), {}, n_embd=4)
    big = bytes(range(256)) * 5000

    async def run(left: socket.socket) -> None:
        _, writer = await asyncio.open_unix_connection(sock=left)
        for payload in (b"", b"little", big):
            frames.write(writer, rows, payload)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    with linked() as (left, right):
        found: list[tuple[Message, memoryview]] = []
        reader = threading.Thread(target=lambda: found.extend(frames.receive(right) for _ in range(3)))
        reader.start()
        asyncio.run(run(left))
        reader.join()
    assert [(message, bytes(payload)) for message, payload in found] == [
        (rows, b""),
        (rows, b"little"),
        (rows, big),
    ]


@given(messages, st.binary(max_size=50), st.data())
def test_a_cut_frame_is_no_frame(message: Message, payload: bytes, data: st.DataObject) -> None:
    whole = frame(message, payload)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert received([part]) == read([part]) == []


@given(st.binary(max_size=100))
@example(frames.LENGTHS.pack(2, 0) + msgspec.msgpack.encode("x"))
@example(frames.LENGTHS.pack(3, 0) + b"\xa2\xc3(")  # a text that is no UTF-8
@example(frames.LENGTHS.pack(0, 0))
def test_garbage_never_gets_past_the_reader(data: bytes) -> None:
    assert received([data]) == read([data])


@given(messages, st.lists(st.tuples(st.integers(8, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_garbled_message_is_refused_or_still_one(message: Message, changes: list[tuple[int, int]]) -> None:
    data = bytearray(frame(message))
    for place, value in changes:
        data[8 + place % (len(data) - 8)] = value
    for found, payload in received([bytes(data)]) + read([bytes(data)]):
        assert isinstance(found, Message)
        assert payload == b""


def test_a_message_nested_without_end_is_refused() -> None:
    nested = b"\x82\xa1x" + b"\x91" * 100_000
    data = frames.LENGTHS.pack(len(nested), 0) + nested
    assert received([data]) == read([data]) == []


@pytest.mark.parametrize(
    "lengths", [(frames.MESSAGE_BYTES_MAX + 1, 0), (10, frames.PAYLOAD_BYTES_MAX + 1), (2**32 - 1, 2**32 - 1)]
)
def test_absurd_lengths_are_refused_before_anything_is_read(lengths: tuple[int, int]) -> None:
    with linked() as (left, right):
        right.sendall(frames.LENGTHS.pack(*lengths))  # and nothing more, though the link stays open
        with pytest.raises(LinkClosed, match="too long"):
            frames.receive(left)


def test_announced_bytes_take_no_memory_until_they_come() -> None:
    encoded = msgspec.msgpack.encode(Join("p"))
    announced = frames.LENGTHS.pack(len(encoded), frames.PAYLOAD_BYTES_MAX) + encoded + bytes(1000)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert received([announced]) == read([announced]) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def test_a_peer_that_stops_in_mid_frame_is_given_up() -> None:
    with linked() as (left, right):
        left.settimeout(0.05)
        right.sendall(frame(Join("p"))[:-1])
        with pytest.raises(LinkClosed):
            frames.receive(left)


@pytest.mark.parametrize("held_back", [1, 5, 40])
def test_a_peer_that_sends_a_byte_now_and_then_is_late(
    held_back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the lengths, in the message or in the payload."""
    monkeypatch.setattr(frames, "FRAME_SECONDS", 0.3)
    whole = b"".join(frames._pieces(Wired("w"), bytes(100)))
    ours, theirs = socket.socketpair()
    ours.settimeout(60)

    def trickle() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(whole[:held_back])
            for byte in whole[held_back:]:
                time.sleep(0.05)
                theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    with ours, pytest.raises(frames.FrameLate, match="bytes has not come within"):
        frames.receive(ours)
    thread.join()
    theirs.close()


def test_an_event_loop_waits_no_longer() -> None:
    async def story() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(frames._pieces(Wired("w"), bytes(100)))[:-1])
        await frames.read(reader)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(frames.FrameLate):
        patched.setattr(frames, "FRAME_SECONDS", 0.1)
        asyncio.run(story())


def test_a_frame_may_be_waited_for_as_long_as_the_link_says_and_that_stays_so() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        threading.Timer(0.2, frames.send, (theirs, Wired("w"), bytes(1000))).start()
        assert frames.receive(ours)[0] == Wired("w")
        assert ours.gettimeout() == 60


def test_sending_to_a_peer_that_is_gone_or_does_not_read_closes_the_link() -> None:
    with linked() as (left, right):
        left.settimeout(0.05)
        with pytest.raises(LinkClosed):
            frames.send(left, Join("p"), bytes(64 << 20))
        right.close()
        with pytest.raises(LinkClosed):
            frames.send(left, Join("p"))
