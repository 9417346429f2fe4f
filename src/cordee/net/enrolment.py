"""How a machine becomes a member, and how members stay members: codes, join, renewals. The admin's side of
join is in invitations.py.

    admin                                     newcomer
    invite: prints a code                      join CODE
      |<---------------- GET /cluster ------------|   TLS, the other side is not known yet
      |----- the authority's certificate, time -->|   is it the one of the code? else stop
      |<------ POST /join: request, proof --------|   TLS verified by that authority
      |- certificate, peers, removed nodes, ... ->|   and the authority's key, if invited as an admin

A code holds the admin's addresses, the first half of the SHA-256 of the authority's certificate, a secret,
and a checksum against typing errors. The secret never travels: the proof is its HMAC over the newcomer's
request, so it is of no use for another key, and the authority's key travels sealed with the secret. A code
works once, for INVITE_SECONDS, and as long as the admin's process lives; the newcomer that used it may repeat
its request, since answers get lost. Renewals go over the bus, where only members can ask; renewal.py has
those of certificates that are not valid now, with which nobody enters the bus.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
import http.client
import os
import ssl
import time
from collections.abc import Callable, Collection
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cordee import __version__
from cordee.cluster.membership import WIRE
from cordee.errors import BadRequest, CordeeError, JoinFailed, SetupNeeded
from cordee.net import address, identity
from cordee.net.bus import PORT, Bus
from cordee.net.identity import Identity
from cordee.net.members import KnownMember, Members
from cordee.net.peers import Peers
from cordee.net.server_certificates import is_of_house, issue, names_of

CODE_PREFIX = "cordee"
SECRET_BYTES = PIN_BYTES = 16  # 128 bits can neither be guessed nor matched by another authority
CHECKSUM_BYTES = 4
ANSWER_BYTES_MAX = 1 << 20  # addresses and removals of SLOTS nodes take a tenth
REACH_SECONDS = 5.0  # for each step with one address of a code
CLOCK_SECONDS_MAX = identity.BACKDATED_SECONDS * 3 / 4  # beyond it a fresh certificate seems not yet valid
KEYS_TRIED_MAX = 16  # until a node's slot is free: with half of them taken, 1 in 65,000 fails
RENEW_SECONDS = 5.0  # for admins to answer
SEAL_NONCE_BYTES = 12

T = TypeVar("T")


class Code(msgspec.Struct, frozen=True, array_like=True):
    """The content of an invitation's code."""

    addresses: tuple[str, ...]
    pin: bytes
    secret: bytes

    def text(self) -> str:
        """The code as one word."""
        packed = msgspec.msgpack.encode(self)
        data = packed + hashlib.sha256(packed).digest()[:CHECKSUM_BYTES]
        return CODE_PREFIX + base64.b32encode(data).decode().rstrip("=").lower()


class Cluster(msgspec.Struct, frozen=True):
    """Answer to GET /cluster: the authority's certificate (PEM), the admin's clock, wire and version."""

    authority: bytes
    now: float
    wire: int = 0  # nodes up to 0.2.0 do not say it
    version: str = "0.2.0 or older"


class Application(msgspec.Struct, frozen=True):
    """POST /join: a request for a certificate, and the secret's HMAC over it."""

    request: bytes
    proof: bytes


class Admission(msgspec.Struct, frozen=True, tag=True):
    """Answer to POST /join. `peers`: addresses by node id; `authority_key`: sealed, for admins only.

    `members`: the admin itself and all that it remembers.
    """

    certificate: bytes
    peers: dict[str, str]
    revocations: tuple[bytes, ...]
    authority_key: bytes
    members: tuple[KnownMember, ...] = ()


class JoinRefusal(msgspec.Struct, frozen=True, tag=True):
    """Why there is no Admission; one of REFUSALS, or `slot`: try another key."""

    reason: str


class Renewal(msgspec.Struct, frozen=True):
    """A member's query to the admins on the bus, answered with a certificate (PEM).

    With `names` it is for the API's listener, which has these names and addresses.
    """

    request: bytes
    certificate: bytes
    names: tuple[str, ...] = ()


_cluster = msgspec.msgpack.Decoder(Cluster)
_joined: msgspec.msgpack.Decoder[Admission | JoinRefusal] = msgspec.msgpack.Decoder(Admission | JoinRefusal)

REFUSALS = {
    "unknown": "The code is not (or no longer) known there: ask for a new one with `cordee invite`.",
    "expired": "The code has expired: ask for a new one with `cordee invite`.",
    "used": "The code was used already, and each works once: ask for a new one with `cordee invite`.",
    "removed": "This node was removed from the cluster for good: `cordee leave` here makes it a new one.",
    "cloned": "Another machine runs as this very node, and has done so for longer: the disk of this one is "
    "probably a copy of its disk. Give this machine an identity of its own: `cordee leave --yes`, then "
    "`cordee join` a code that `cordee invite` prints on an admin. The models here stay.",
    "busy": "Too many wrong codes were tried there: wait a minute, then try again.",
    "slot": "The cluster is full.",
}


def read_code(text: str) -> Code:
    """The code in a text that was pasted; blanks and line breaks in it do not matter.

    Raises:
        JoinFailed: it is not a code, or not exactly the one that was printed.
    """
    word = "".join(text.split()).lower()
    encoded = word.removeprefix(CODE_PREFIX).upper()
    try:
        data = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
        packed, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if not word.startswith(CODE_PREFIX) or hashlib.sha256(packed).digest()[:CHECKSUM_BYTES] != checksum:
            raise ValueError
        return msgspec.msgpack.decode(packed, type=Code)
    except (ValueError, binascii.Error, msgspec.MsgspecError) as error:
        raise JoinFailed(
            "That is not a whole invitation code: copy the line that `cordee invite` printed, all of it."
        ) from error


def join(text: str, clock: Callable[[], float] = time.time) -> Identity:
    """Become a member of the cluster whose code this is; a member of it stays the same node.

    Raises:
        JoinFailed: the code is mistyped, expired or used; no admin is reached, or another cluster answers;
            clocks are too far apart; or this machine is in another cluster. The message says what to do.
        IdentityDamaged: this machine has an identity that cannot be read.
    """
    code = read_code(text)
    member = identity.load() if identity.exists() else None
    if member is not None and pin_of(member.authority) != code.pin:
        raise JoinFailed("This machine belongs to another cluster: `cordee leave` first, then join.")
    where, authority = _find(code, clock)
    reason = ""
    for _ in range(KEYS_TRIED_MAX):
        key = member.key if member is not None else identity.new_key()
        request = identity.certificate_request(key)
        application = Application(request, proof_of(code.secret, request))
        answer = _ask(where, "POST", "/join", authority, _joined, application)
        if isinstance(answer, Admission):
            return _settle(answer, key, authority, code.secret, member)
        reason = answer.reason
        if reason != "slot" or member is not None:
            break
    raise JoinFailed(REFUSALS.get(reason, REFUSALS["unknown"]))


def check(member: Identity, now: float) -> None:
    """Check that the other members will accept this identity.

    Raises:
        JoinFailed: the node was removed, or its certificate is not valid now; the message says what to do.
    """
    if member.node in member.revoked:
        raise JoinFailed(REFUSALS["removed"])
    start, end = identity.validity_of(member.authority)
    if not start <= now < end:
        raise JoinFailed(
            f"The cluster's own certificate {_when((start, end), now)}: check this machine's clock. If it is "
            "right, the clock of the machine that created the cluster was not. Create the cluster anew: "
            "`cordee leave` on every node, then `cordee up` on one, and invite the others."
        )
    if not member.is_valid(now):
        raise JoinFailed(
            f"This node's certificate {when_valid(member, now)}: check this machine's clock. If it is right, "
            "`cordee join` a code that `cordee invite` prints on another node; it remains the same node."
        )


def when_valid(member: Identity, now: float) -> str:
    """In words, why a member's certificate is not valid now: "ran out on 2026-07-01"."""
    return _when(member.validity(), now)


def _when(validity: tuple[float, float], now: float) -> str:
    start, end = validity
    day = time.strftime("%Y-%m-%d", time.gmtime(end if now >= end else start))
    return f"ran out on {day}" if now >= end else f"is not valid before {day}"


def clock_fault(off_seconds: float) -> str:
    """In words, that this machine's clock differs from an admin's."""
    days = abs(off_seconds) / identity.DAY_SECONDS
    side = "ahead of" if off_seconds > 0 else "behind"
    return f"This machine's clock is {days:.1f} days {side} the cluster's"


def pin_of(authority: x509.Certificate) -> bytes:
    """What a code holds of the authority's certificate."""
    return authority.fingerprint(hashes.SHA256())[:PIN_BYTES]


def serve_renewals(bus: Bus, member: Identity, clock: Callable[[], float] = time.time) -> None:
    """Answer the renewals of other members, as an admin."""

    async def answer(question: bytes) -> bytes | None:
        try:
            return _signed(member, msgspec.msgpack.decode(question, type=Renewal), clock())
        except (ValueError, msgspec.MsgspecError):
            return None

    bus.serve(f"renew/{member.node}", answer)


async def renew(bus: Bus, member: Identity, now: float) -> bool:
    """Renew a member's certificate, by itself or any admin on the bus; False when none answered.

    Afterwards the bus needs a `refresh`: its listener still shows the old certificate.
    """
    if member.is_admin:
        member.renew_self(now)
        return True
    question = Renewal(member.request(), identity.pem(member.certificate))
    answers = await bus.query("renew/*", msgspec.msgpack.encode(question), seconds=RENEW_SECONDS)
    for answer in answers:
        with contextlib.suppress(ValueError):
            member.renew(answer, now)
            return True
    return False


async def server_certificate(bus: Bus, member: Identity, names: Collection[str], now: float) -> bytes:
    """A certificate (PEM) for the API's listener, by this node or any admin on the bus.

    Raises:
        SetupNeeded: no admin answers, or none of this version.
        BadRequest: a name is one that admins do not sign for others.
    """
    if member.authority_key is not None:
        return issue(member.key.public_key(), names, member.authority, member.authority_key, now)
    for name in names:
        if not is_of_house(name):
            raise BadRequest(
                f"{name} might be a site of the world, for which admins sign no certificate: use a name that "
                "ends with .local, .lan, .internal or .home.arpa, or a certificate of your own (--cert).",
                "allow-host",
            )
    question = Renewal(member.request(), identity.pem(member.certificate), tuple(names))
    for answer in await bus.query("renew/*", msgspec.msgpack.encode(question), seconds=RENEW_SECONDS):
        with contextlib.suppress(ValueError):
            found = x509.load_pem_x509_certificate(answer)
            if names_of(found) >= set(names):
                member.check_member(found, member.key.public_key())
                return answer
    raise SetupNeeded(
        "No admin answered that could sign the certificate of the API: start `cordee up` on an admin, of "
        "this version, then try again; or give a certificate of your own (--cert, --key-file)."
    )


def _signed(member: Identity, renewal: Renewal, now: float) -> bytes:
    """What an admin answers.

    Raises:
        ValueError: the member is none, or asks for what it must not have.
    """
    if not renewal.names:
        return member.sign_again(renewal.request, renewal.certificate, now)
    if not all(map(is_of_house, renewal.names)):
        raise ValueError("a name is not one of this house")
    assert member.authority_key is not None, "only an admin answers"
    certificate = x509.load_pem_x509_certificate(renewal.certificate)
    key = member.check_member(certificate, identity.requested_key(renewal.request))
    return issue(key, renewal.names, member.authority, member.authority_key, now)


def _settle(
    admission: Admission,
    key: EllipticCurvePrivateKey,
    authority: x509.Certificate,
    secret: bytes,
    member: Identity | None,
) -> Identity:
    """Store what the admin answered."""
    try:
        if member is None:
            certificate = x509.load_pem_x509_certificate(admission.certificate)
            member = identity.install(key, certificate, authority)
        else:
            member.renew(admission.certificate)
        if admission.authority_key:
            member.become_admin(_unseal(admission.authority_key, secret))
    except (ValueError, InvalidTag) as error:
        raise JoinFailed(f"The admin's answer makes no sense ({error}): try again.") from error
    member.admit(admission.revocations)
    peers, members = Peers(member), Members(member)
    for node, addresses in admission.peers.items():
        peers.remember(node, addresses)
    for each in admission.members:
        members.remember(each)
    members.save()
    return member


def _find(code: Code, clock: Callable[[], float]) -> tuple[str, x509.Certificate]:
    """The first address of a code behind which its cluster is, and the cluster's authority."""
    unreached: list[str] = []
    strangers: list[str] = []  # where another cluster answers
    for where in code.addresses[: address.ADDRESSES_MAX]:
        try:
            cluster = _ask(where, "GET", "/cluster", None, _cluster, None)
            authority = x509.load_pem_x509_certificate(cluster.authority)
        except (JoinFailed, ValueError) as error:
            unreached.append(f"{where}: {error}")
            continue
        if pin_of(authority) != code.pin:  # a bridge's or a loopback address means other machines to others
            strangers.append(where)
            continue
        off_seconds = clock() - cluster.now
        if abs(off_seconds) > CLOCK_SECONDS_MAX:
            raise JoinFailed(f"{clock_fault(off_seconds)}: set it, then join again.")
        if cluster.wire != WIRE:
            raise JoinFailed(
                f"The machine at {where} runs Cordée {cluster.version} and this one {__version__}, which do "
                "not understand each other: update both to the same version, then join again."
            )
        return where, authority
    raise JoinFailed(_not_found(code, unreached, strangers))


def _not_found(code: Code, unreached: list[str], strangers: list[str]) -> str:
    """Why no address of a code leads to its cluster, and what to do."""
    unreached = unreached + [f"{where} is in another cluster" for where in strangers]
    if all(map(address.is_loopback, code.addresses)):
        return (
            f"The inviting machine cannot be reached ({'; '.join(unreached)}): the code is for nodes on that "
            "machine itself. Connect it to the network, or start `cordee up --listen 0.0.0.0` there, and ask "
            "for a new code."
        )
    if strangers:
        return (
            f"The machine at {' and '.join(strangers)} is in another cluster than this code: the address now "
            "belongs to another machine, or somebody pretends to be the right one. Ask for a new code with "
            "`cordee invite`."
        )
    return (
        f"The inviting machine cannot be reached ({'; '.join(unreached)}): it must be up, on this network, "
        f"and its firewall open for TCP {PORT} to {address.PORTS[-1]} (`cordee doctor` there checks that)."
    )


def _ask(
    where: str,
    method: str,
    path: str,
    authority: x509.Certificate | None,
    decoder: msgspec.msgpack.Decoder[T],
    body: Application | None,
) -> T:
    """One exchange with the endpoint; without `authority` any certificate is accepted.

    Raises:
        JoinFailed: there is no answer, or none that `decoder` takes.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if authority is None else ssl.CERT_REQUIRED
    if authority is not None:
        context.load_verify_locations(cadata=identity.pem(authority).decode())
    try:
        host, port = address.parse(where, 0)
        connection = http.client.HTTPSConnection(host, port, timeout=REACH_SECONDS, context=context)
        with contextlib.closing(connection):
            connection.request(method, path, msgspec.msgpack.encode(body) if body is not None else None)
            answer = connection.getresponse().read(ANSWER_BYTES_MAX)
        return decoder.decode(answer)
    except (OSError, http.client.HTTPException, CordeeError, msgspec.MsgspecError) as error:
        raise JoinFailed(str(error) or type(error).__name__) from error


def proof_of(secret: bytes, request: bytes) -> bytes:
    """Proves knowledge of a code's secret, for this request only."""
    return hmac.digest(secret, b"cordee join " + request, "sha256")


def _sealing(secret: bytes) -> AESGCM:
    return AESGCM(HKDF(hashes.SHA256(), 32, salt=None, info=b"cordee authority key").derive(secret))


def seal(authority_key: bytes, secret: bytes) -> bytes:
    """The authority's key (PEM), encrypted with a code's secret."""
    nonce = os.urandom(SEAL_NONCE_BYTES)
    return nonce + _sealing(secret).encrypt(nonce, authority_key, None)


def _unseal(sealed: bytes, secret: bytes) -> bytes:
    return _sealing(secret).decrypt(sealed[:SEAL_NONCE_BYTES], sealed[SEAL_NONCE_BYTES:], None)
