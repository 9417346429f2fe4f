"""The API's listener to other machines: its names, its certificate, and how clients come to trust it."""

import asyncio
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from cryptography import x509

from cordee import files
from cordee.errors import BadRequest, CordeeError
from cordee.net import address, identity
from cordee.net.server_certificates import NAMES_MAX, names_of

PORT = 8322  # beside that of loopback, so that it can be on all interfaces
LOOK_SECONDS = 60.0  # between looks whether addresses changed, or the certificate is due
LABEL_CHARS_MAX = 63


def listener(where: str) -> socket.socket:
    """A socket that listens on HOST, HOST:PORT, :PORT, or for "" on all interfaces.

    Raises:
        BadRequest: that is none of this machine's addresses, or the port is taken.
    """
    try:
        wanted = address.listening(where, PORT)
    except BadRequest as error:
        raise BadRequest(
            f"{error.message} What follows --lan is where to listen: write models before it.", "lan"
        ) from error
    try:
        return address.listener(wanted.host, wanted.port)
    except OSError as error:
        raise BadRequest(
            f"--lan cannot listen on port {wanted.port} ({address.refusal(error, wanted.port)}): choose "
            "another with --lan HOST:PORT, or --lan :PORT for all interfaces.",
            "lan",
        ) from error


def label(name: str) -> str:
    """A machine's or node's name as one label of a host name; "" if nothing of it can be."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.partition(".")[0].lower()).strip("-")
    return plain[:LABEL_CHARS_MAX].strip("-")


def host_names(name: str, allowed: Collection[str] = ()) -> list[str]:
    """By which names others may call this machine: `name` is the node's, `allowed` what people added."""
    own = [each for each in dict.fromkeys((label(name), label(socket.gethostname()))) if each]
    local = [f"{each}.local" for each in own]
    return list(dict.fromkeys(each.lower() for each in (*allowed, *local, *own)))


def addresses(host: str) -> list[str]:
    """The addresses of what listens on `host`; empty: all interfaces."""
    if host:
        return [host]
    return [str(each) for each in address.ranked(address.interfaces(), ())]


def own_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS with the house's own certificate, a PEM with its chain; without `key`, its key is in there, too.

    Raises:
        BadRequest: they cannot be used.
    """
    context = _context()
    try:
        context.load_cert_chain(certificate, key or certificate, password=_no_password)
    except (OSError, ValueError) as error:  # of which ssl.SSLError is one
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise BadRequest(
            f"{certificate} and {key or 'its key'} cannot be used ({reason}): --cert wants a PEM file with "
            "the certificate and its chain, --key-file one with its private key, not encrypted.",
            "cert",
        ) from error
    return context


class LanCertificate:
    """A certificate of an authority of ours, renewed in time and when this machine's addresses change.

    `sign` gives one (PEM) for names and addresses, for the key in `key`. It is kept in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        key: Path,
        sign: Callable[[list[str]], Awaitable[bytes]],
        names: Callable[[], list[str]],
    ) -> None:
        self.context = _context()
        self.authority_path = folder / "ca.pem"
        self._path = folder / "api.pem"
        self._key = key
        self._sign = sign
        self._names = names
        self._certificate: x509.Certificate | None = None

    async def ensure(self) -> None:
        """Have a certificate that is good now.

        Raises:
            CordeeError: there is none, and none can be had.
        """
        if self._certificate is None:
            with contextlib.suppress(OSError, ValueError):
                self._take(x509.load_pem_x509_certificate(self._path.read_bytes()))
        names = sorted(self._names()[:NAMES_MAX])
        if self._certificate is not None and self._is_good(self._certificate, names):
            return
        found = await self._sign(names)
        with files.atomic_file(self._path) as file:
            files.write_all(file, found)
        self._take(x509.load_pem_x509_certificate(found))

    async def keep(self, warn: Callable[[str], None]) -> None:
        """`ensure`, again and again; `warn` is told once what is in the way."""
        warned = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.ensure()
                warned = ""
            except CordeeError as error:
                if error.message != warned:
                    warned = error.message
                    warn(f"the API's certificate is not renewed yet: {warned}")

    def _take(self, certificate: x509.Certificate) -> None:
        try:
            self.context.load_cert_chain(self._path, self._key)
        except ssl.SSLError:  # it is for another key
            return
        self._certificate = certificate

    def _is_good(self, certificate: x509.Certificate, names: list[str]) -> bool:
        start, end = identity.validity_of(certificate)
        now = time.time()
        due = end - identity.CERTIFICATE_SECONDS + identity.RENEW_SECONDS
        return start <= now < due and names_of(certificate) >= set(names)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _no_password() -> str:
    """Asked for by the library where a key is encrypted: nobody is there to type a pass phrase."""
    raise ValueError("the key is encrypted")
