"""An admin's invitations, and the endpoint where newcomers use them (see enrolment.py).

The endpoint is open while an invitation is. Wrong proofs are counted by the address that they come from,
which is refused for a while when it sent several; so nobody locks out a newcomer at another address. This
bounds the work. What keeps guessers out is the secret, of 128 bits: with 16 million addresses of a network,
five guesses a minute from each, and the 15 minutes that a code lives, one attack in 10^29 would succeed.
"""

import asyncio
import hmac
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cordee import __version__
from cordee.cluster.membership import WIRE
from cordee.errors import JoinFailed
from cordee.net import address, identity
from cordee.net.doors import Door, Places
from cordee.net.enrolment import (
    SECRET_BYTES,
    Admission,
    Application,
    Cluster,
    Code,
    JoinRefusal,
    pin_of,
    proof_of,
    seal,
)
from cordee.net.http_door import open_http
from cordee.net.identity import Identity
from cordee.net.members import KnownMember
from cordee.net.peers import Peers

INVITES_MAX = 16  # that are remembered, open or not
BODY_BYTES_MAX = 16 << 10  # a request takes 300 bytes
FAILED_ATTEMPT_SECONDS = 60.0  # for which a wrong proof counts
FAILED_ATTEMPTS_MAX = 5  # from one address: a person mistypes a few times
FAILED_ADDRESSES_MAX = 4096  # that are remembered: whoever has more is held up by the handshakes alone
CONNECTIONS_MAX = (32, 8)  # at once, in all and of one address: each has 400 kB
LINGER_SECONDS = 30.0  # after the last invitation was used, for a newcomer whose answer was lost
INVITE_SECONDS = 900  # to walk to the other machine and install
CODE_ADDRESSES_MAX = 3  # so that a code stays one line


@dataclass
class _Invitation:
    """An invitation, open until it expires or is used."""

    secret: bytes
    admin: bool
    expires: float
    used_by: str = ""  # node id


class FailedAttempts:
    """The newest wrong proofs of the last FAILED_ATTEMPT_SECONDS, by the address that they came from."""

    def __init__(self) -> None:
        self._attempts: dict[str, list[float]] = {}  # when; the address that was noted last comes last

    def note(self, who: str, now: float) -> None:
        """A wrong proof came from the address `who`."""
        attempts = [*self._recent(who, now), now][-FAILED_ATTEMPTS_MAX:]
        self._attempts.pop(who, None)
        while len(self._attempts) >= FAILED_ADDRESSES_MAX:
            del self._attempts[next(iter(self._attempts))]
        self._attempts[who] = attempts

    def too_many(self, who: str, now: float) -> bool:
        """Whether requests from this address are to be refused now."""
        return len(self._recent(who, now)) >= FAILED_ATTEMPTS_MAX

    def _recent(self, who: str, now: float) -> list[float]:
        return [then for then in self._attempts.get(who, []) if 0 <= now - then < FAILED_ATTEMPT_SECONDS]


class Invitations:
    """An admin's invitations and their endpoint.

    `addresses` gives where this node's bus listens now, `members` who is known of the cluster, this node
    included; `host` is where the endpoint listens, empty for all interfaces. Use it in one event loop, and
    `close` it.
    """

    def __init__(
        self,
        member: Identity,
        host: str,
        addresses: Callable[[], list[str]],
        clock: Callable[[], float] = time.time,
        members: Callable[[], Iterable[KnownMember]] = tuple,
    ) -> None:
        self._identity = member
        self._members = members
        self._host = host
        self._addresses = addresses
        self._clock = clock
        self._invitations: deque[_Invitation] = deque(maxlen=INVITES_MAX)
        self._issued: set[str] = set()
        self._failed_attempts = FailedAttempts()
        self._port = 0  # of the endpoint while it is open
        self._serving: set[asyncio.Task[None]] = set()  # the open endpoint, and one that is closing
        self._changed = asyncio.Event()

    async def invite(self, *, admin: bool = False) -> str:
        """A new code; the endpoint opens if it is not open.

        Raises:
            JoinFailed: this node is not an admin.
        """
        if not self._identity.is_admin:
            raise JoinFailed("This node cannot invite, since it is no admin: invite on another node.")
        now = self._clock()
        if self._identity.renewal_due(now):
            self._identity.renew_self(now)
        secret = os.urandom(SECRET_BYTES)
        self._invitations.append(_Invitation(secret, admin, now + INVITE_SECONDS))
        self._changed.set()
        if not self._port:
            listener = address.listener_in_range(self._host)
            self._port = listener.getsockname()[1]
            task = asyncio.create_task(self._serve(listener))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        addresses = address.own(self._host, self._port)[:CODE_ADDRESSES_MAX]
        return Code(tuple(addresses), pin_of(self._identity.authority), secret).text()

    async def close(self) -> None:
        """End all invitations and the endpoint."""
        self._invitations.clear()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, listener: socket.socket) -> None:
        door = self._open(listener)
        try:
            await self._until_unwanted()
        finally:
            self._port = 0  # the next invitation opens another
            door.close()

    def _open(self, listener: socket.socket) -> Door:
        routes = [Route("/cluster", self._show), Route("/join", self._join, methods=["POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.load_cert_chain(self._identity.folder / "node.pem", self._identity.folder / "node.key")
        return open_http(config, listener, Places(CONNECTIONS_MAX, admitted=None), tls)

    async def _until_unwanted(self) -> None:
        """Wait until no invitation is open, and LINGER_SECONDS more."""
        while True:
            self._changed.clear()
            open_until = [each.expires for each in self._invitations if not each.used_by]
            left = max(open_until, default=0.0) - self._clock()
            try:
                async with asyncio.timeout(max(left, LINGER_SECONDS)):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _show(self, _: Request) -> Response:
        authority = identity.pem(self._identity.authority)
        return _packed(Cluster(authority, self._clock(), WIRE, __version__))

    async def _join(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_BYTES_MAX:
                return _packed(JoinRefusal("unknown"), 413)
        who = request.client.host if request.client else ""
        answer = self._decide(body, who)
        return _packed(answer, 403 if isinstance(answer, JoinRefusal) else 200)

    def _decide(self, body: bytes, who: str) -> Admission | JoinRefusal:
        now = self._clock()
        if self._failed_attempts.too_many(who, now):
            return JoinRefusal("busy")
        try:
            application = msgspec.msgpack.decode(body, type=Application)
            node = identity.node_id(identity.requested_key(application.request))
        except (ValueError, msgspec.MsgspecError):
            self._failed_attempts.note(who, now)
            return JoinRefusal("unknown")
        proven = [
            each
            for each in self._invitations
            if hmac.compare_digest(application.proof, proof_of(each.secret, application.request))
        ]
        if not proven:
            self._failed_attempts.note(who, now)
            return JoinRefusal("unknown")
        return self._admit(proven[0], application, node, now)

    def _admit(
        self, invitation: _Invitation, application: Application, node: str, now: float
    ) -> Admission | JoinRefusal:
        if invitation.used_by not in ("", node):
            return JoinRefusal("used")
        if now >= invitation.expires:
            return JoinRefusal("expired")
        if node in self._identity.revoked:
            return JoinRefusal("removed")
        peers = {**Peers(self._identity).known, self._identity.node: ",".join(self._addresses())}
        others = (peers.keys() | self._issued | self._identity.revoked) - {node}
        if identity.slot_of(node) in map(identity.slot_of, others):
            return JoinRefusal("slot")
        invitation.used_by = node
        self._issued.add(node)
        self._changed.set()
        sealed = seal(self._identity.authority_key_pem(), invitation.secret) if invitation.admin else b""
        certificate = self._identity.sign(application.request, now)
        return Admission(certificate, peers, self._identity.revocations, sealed, tuple(self._members()))


def _packed(answer: Cluster | Admission | JoinRefusal, status: int = 200) -> Response:
    return Response(msgspec.msgpack.encode(answer), status, media_type="application/msgpack")
