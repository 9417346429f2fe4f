"""The links between gateways and hosts on different nodes: messages about streams, for those two alone.

They carry prompts and answers, so they do not travel on the bus, where all members could hear them, but over
links of tls_link.py, from a gateway's node to a host's and back. Who sent a message is what the certificate
of its link says, so no member can ask or answer in another's name.

A gateway's node keeps a link to each node that it may ask (`follow`), and opens it again when it ends. A host
answers over the link that the other node opened last; where there is none the answer is lost, and asked for
again, as every message here may be lost (generation/streams.py). What a node says to itself goes by a call.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from cordee.generation.streams import MESSAGE_BYTES_MAX
from cordee.worker import frames, tls_link
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import StreamMessage, StreamsJoin

RETRY_SECONDS = (0.1, 5.0)  # between attempts to open a link: the first pause, which doubles, and the longest
ASKED_BYTES_MAX = 8 << 20  # of a gateway, which any member may be; a log of a million tokens takes 5 MB
WAITING_MAX = 256  # messages that wait for a link to open; the oldest are lost
OUTBOX_BYTES_MAX = 2 * MESSAGE_BYTES_MAX  # that a node does not take: then its link is given up
# Data that is not acknowledged for so long ends the link: the other machine is gone, or has another address.
SILENCE_SECONDS = 5.0

log = logging.getLogger(__name__)


class _Outgoing:
    """The link to a node that we ask."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.writer: asyncio.StreamWriter | None = None
        self.waiting: deque[bytes] = deque(maxlen=WAITING_MAX)
        self.task: asyncio.Task[None] | None = None


class StreamLinks:
    """See the module's docstring. All methods on one event loop.

    `folder` is that of the identity of this node, `me`. `receive` gets the node that sent a message, and the
    message; it must not raise.
    """

    def __init__(self, folder: Path, me: str, receive: Callable[[str, bytes], None]) -> None:
        self._folder = folder
        self._me = me
        self._receive = receive
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[str, asyncio.StreamWriter] = {}  # the last that each node opened

    def follow(self, endpoints: Mapping[str, str]) -> None:
        """Keep links to these nodes, by their inboxes' endpoints, and to no others."""
        for node in [node for node, link in self._outgoing.items() if endpoints.get(node) != link.endpoint]:
            self._end(self._outgoing.pop(node))
        for node, endpoint in endpoints.items():
            if node not in self._outgoing and node != self._me and endpoint:
                link = self._outgoing[node] = _Outgoing(endpoint)
                link.task = asyncio.get_running_loop().create_task(self._keep_open(node, link))

    def ask(self, node: str, data: bytes) -> None:
        """Send a message to the host on a node. It may be lost."""
        if node == self._me:
            asyncio.get_running_loop().call_soon(self._receive, node, data)
        elif (link := self._outgoing.get(node)) is not None:
            if link.writer is None:
                link.waiting.append(data)
            else:
                _write(link.writer, data)

    def answer(self, node: str, data: bytes) -> None:
        """Send a message to the gateway of a node. It may be lost."""
        if node == self._me:
            asyncio.get_running_loop().call_soon(self._receive, node, data)
        elif (writer := self._incoming.get(node)) is not None:
            _write(writer, data)

    async def serve(self, node: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the messages of a link that a node opened, after its StreamsJoin; until the link ends."""
        replaced = self._incoming.get(node)
        if replaced is not None:
            replaced.transport.abort()
        self._incoming[node] = writer
        _notice_silence(writer)
        try:
            await self._read(node, reader, ASKED_BYTES_MAX)
        finally:
            if self._incoming.get(node) is writer:
                del self._incoming[node]

    async def close(self) -> None:
        """End all links; closing twice is harmless."""
        tasks = [link.task for link in self._outgoing.values() if link.task is not None]
        self.follow({})
        for writer in list(self._incoming.values()):
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, link: _Outgoing) -> None:
        if link.task is not None:
            link.task.cancel()

    async def _keep_open(self, node: str, link: _Outgoing) -> None:
        pause_seconds = RETRY_SECONDS[0]
        while True:
            with contextlib.suppress(LinkClosed):
                reader, writer = await tls_link.open_stream(self._folder, link.endpoint, node)
                pause_seconds = RETRY_SECONDS[0]
                try:
                    await self._use(node, link, reader, writer)
                finally:
                    link.writer = None
                    writer.transport.abort()
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, RETRY_SECONDS[1])

    async def _use(
        self, node: str, link: _Outgoing, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        _notice_silence(writer)
        frames.write(writer, StreamsJoin())
        link.writer = writer
        while link.waiting:
            _write(writer, link.waiting.popleft())
        await self._read(node, reader, MESSAGE_BYTES_MAX)

    async def _read(self, node: str, reader: asyncio.StreamReader, bytes_max: int) -> None:
        """Hand on what comes.

        Raises:
            LinkClosed: the link ended, or brings something else.
        """
        while True:
            message, payload = await frames.read(reader, bytes_max, frames.OPENING_BYTES_MAX)
            if not isinstance(message, StreamMessage):
                raise LinkClosed("not a message about streams")
            self._receive(node, payload)


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if writer.transport.get_write_buffer_size() > OUTBOX_BYTES_MAX:
        writer.transport.abort()
    elif not writer.transport.is_closing():
        frames.write(writer, StreamMessage(), data)


def _notice_silence(writer: asyncio.StreamWriter) -> None:
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere the membership notices, and `follow` ends it
        plain = writer.get_extra_info("socket")
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENCE_SECONDS * 1000))
