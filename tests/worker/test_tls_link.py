"""Links between workers over real TLS on loopback: in order, whole, and for members only."""

import asyncio
import re
import selectors
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cordee.net import address
from cordee.net.identity import Identity
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Join, Message
from cordee.worker.tls_link import Handshake, TlsListener
from members import DAY_SECONDS, cluster, founder, newcomer

SIZES = (0, 1, 2_300, 6_000, 70_000, 1 << 20, 64 << 20)


@pytest.fixture(autouse=True)
def own_home(home: Path) -> Path:
    """State of its own for each test, and the old one afterwards."""
    return home


class Worker(threading.Thread):
    """One blocking thread with a selector, as a stage's worker; sends back what it gets."""

    def __init__(self, member: Identity) -> None:
        super().__init__(daemon=True)
        self.listener = TlsListener(member.folder, "127.0.0.1")
        self.refusals: list[str] = []
        self.nodes: list[str] = []  # that came in
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self.listener, selectors.EVENT_READ)
        while not self.ended.is_set():
            for key, _ in selector.select(0.1):
                ready = key.fileobj
                if ready is self.listener:
                    if handshake := self.listener.accept():
                        selector.register(handshake, selectors.EVENT_READ)
                    continue
                assert isinstance(ready, Handshake | socket.socket)
                try:
                    if isinstance(ready, Handshake):
                        if came := ready.proceed():
                            node, link = came
                            self.nodes.append(node)
                            selector.unregister(ready)
                            selector.register(link, selectors.EVENT_READ)
                    else:
                        frames.send(ready, *frames.receive(ready))
                except LinkClosed as error:
                    self.refusals.append(str(error))
                    selector.unregister(ready)
                    ready.close()
        for ready in [key.fileobj for key in selector.get_map().values()]:  # the listener too
            assert isinstance(ready, TlsListener | Handshake | socket.socket)
            ready.close()


def test_frames_of_all_sizes_arrive_whole_and_in_order(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    worker = Worker(second)
    downstream = tls_link.connect(first.folder, worker.listener.endpoint, second.node)
    random = np.random.default_rng(0)
    for size in SIZES:
        payload = random.bytes(size)
        frames.send(downstream, Join(str(size)), payload)  # all of it is read before any comes back
        message, answer = frames.receive(downstream)
        assert message == Join(str(size)) and answer == payload
        assert downstream.pending() == 0  # so a selector misses nothing
    downstream.close()
    worker.ended.set()


def test_the_end_of_either_side_is_noticed_at_once(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    worker = Worker(second)
    downstream = tls_link.connect(first.folder, worker.listener.endpoint, second.node)
    worker.ended.set()
    downstream.settimeout(20)
    with pytest.raises(LinkClosed, match=r"closed|reset"):
        frames.receive(downstream)
    again = Worker(second)
    tls_link.connect(first.folder, again.listener.endpoint, second.node).close()
    wait_for(lambda: any("closed" in each for each in again.refusals))
    again.ended.set()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["foreign", "expired", "removed", "none"])
def test_strangers_are_refused_as_clients_and_as_servers(tmp_path: Path, kind: str) -> None:
    admin, member, removed = cluster(tmp_path, 3)
    admin.revoke(removed.node)
    stranger = {
        "foreign": lambda: founder(tmp_path / "foreign"),
        "expired": lambda: newcomer(tmp_path / "expired", admin, time.time() - 40 * DAY_SECONDS),
        "removed": lambda: removed,
        "none": lambda: founder(tmp_path / "none"),
    }[kind]()
    shutil.copy(admin.folder / "ca.pem", stranger.folder / "ca.pem")  # so it trusts the cluster's authority
    worker = Worker(admin)
    if kind == "none":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        where = ("127.0.0.1", port_of(worker.listener))
        with socket.create_connection(where) as plain, context.wrap_socket(plain) as tls:
            assert alert_or_end(tls)
    else:
        with pytest.raises(LinkClosed):
            tls_link.connect(stranger.folder, worker.listener.endpoint, admin.node)
        pretender = Worker(stranger)
        with pytest.raises(LinkClosed):
            tls_link.connect(admin.folder, pretender.listener.endpoint, stranger.node)
        pretender.ended.set()
    wait_for(lambda: worker.refusals)
    tls_link.connect(member.folder, worker.listener.endpoint, admin.node).close()  # members still come in
    worker.ended.set()


def test_a_member_in_another_members_place_is_refused(tmp_path: Path) -> None:
    first, second, third = cluster(tmp_path, 3)
    worker = Worker(second)
    with pytest.raises(LinkClosed, match=f"node {second.node} answers there, not {third.node}"):
        tls_link.connect(first.folder, worker.listener.endpoint, third.node)

    async def story() -> None:
        with pytest.raises(LinkClosed, match=f"node {second.node} answers there, not {third.node}"):
            await tls_link.open_stream(first.folder, worker.listener.endpoint, third.node)

    asyncio.run(story())
    tls_link.connect(third.folder, worker.listener.endpoint, second.node).close()
    wait_for(lambda: worker.nodes[-1:] == [third.node])  # the listener knows who came
    worker.ended.set()


def alert_or_end(tls: ssl.SSLSocket) -> bool:
    """Whether the other side refuses instead of sending anything."""
    try:
        return tls.recv(1) == b""
    except OSError:
        return True


def port_of(listener: TlsListener) -> int:
    return int(listener.endpoint.rpartition(":")[2])


def test_silent_strangers_do_not_keep_the_worker_from_its_work(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    worker = Worker(second)
    silent = [socket.create_connection(("127.0.0.1", port_of(worker.listener))) for _ in range(20)]
    silent[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
    silent[1].sendall(b"\x16\x03\x01")
    downstream = tls_link.connect(first.folder, worker.listener.endpoint, second.node)
    frames.send(downstream, Join("x"), b"rows")
    assert bytes(frames.receive(downstream)[1]) == b"rows"
    for each in (*silent, downstream):
        each.close()
    worker.ended.set()


def test_an_event_loop_exchanges_frames_with_workers(tmp_path: Path) -> None:
    """As the host of a pipeline, which sends to the first worker and reads from the last."""
    first, second = cluster(tmp_path, 2)
    worker = Worker(second)

    async def story() -> None:
        heard: asyncio.Queue[tuple[Message, bytes]] = asyncio.Queue()

        async def on_link(node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert node == second.node
            heard.put_nowait(await frames.read(reader))
            writer.close()

        server, endpoint = await tls_link.open_listener(first.folder, "127.0.0.1", on_link)
        downstream = await asyncio.to_thread(tls_link.connect, second.folder, endpoint, first.node)
        await asyncio.to_thread(frames.send, downstream, Join("tokens"), b"t")
        assert (await heard.get())[0] == Join("tokens")
        downstream.close()
        reader, writer = await tls_link.open_stream(first.folder, worker.listener.endpoint, second.node)
        frames.write(writer, Join("rows"), b"r" * 100_000)
        assert await frames.read(reader) == (Join("rows"), b"r" * 100_000)
        writer.close()
        stranger = founder(tmp_path / "stranger")
        with pytest.raises(LinkClosed):
            await tls_link.open_stream(stranger.folder, worker.listener.endpoint, second.node)
        server.close()

    asyncio.run(story())
    worker.ended.set()


def test_a_listener_that_stays_open_shows_the_certificate_that_was_renewed_meanwhile(tmp_path: Path) -> None:
    """As the inbox of a node that runs for longer than a certificate lasts."""
    admin = founder(tmp_path / "0")
    host = newcomer(tmp_path / "1", admin, time.time() - 40 * DAY_SECONDS)

    async def story() -> None:
        async def on_link(node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        server, endpoint = await tls_link.open_listener(host.folder, "127.0.0.1", on_link)
        with pytest.raises(LinkClosed, match="expired"):
            await asyncio.to_thread(tls_link.connect, admin.folder, endpoint, host.node)
        host.renew(admin.sign(host.request(), time.time()))
        (await asyncio.to_thread(tls_link.connect, admin.folder, endpoint, host.node)).close()
        server.close()

    asyncio.run(story())


def test_a_listener_is_found_at_any_of_its_addresses(tmp_path: Path) -> None:
    first, second = cluster(tmp_path, 2)
    worker = Worker(second)
    port = port_of(worker.listener)
    downstream = tls_link.connect(first.folder, f"127.0.0.1:1,127.0.0.1:{port}", second.node)
    downstream.close()
    for nowhere in ("127.0.0.1:1", "x y:1,http://pc-1:7331,192.168.1:7", "localhost:99999"):
        with pytest.raises(LinkClosed, match=re.escape(nowhere.partition(",")[0])):
            tls_link.connect(first.folder, nowhere, second.node)
        with pytest.raises(LinkClosed):
            asyncio.run(tls_link.open_stream(first.folder, nowhere, second.node))
    worker.ended.set()


def test_an_endpoint_follows_its_machine_to_another_address() -> None:
    assert address.renewed("192.0.2.7:7000,[2001:db8::7]:7000", "127.0.0.1") == "127.0.0.1:7000"
    assert address.renewed("[2001:db8::7]:7000", "::1") == "[::1]:7000"
    assert address.renewed("192.0.2.7:7000", "") == ",".join(address.own("", 7000))
