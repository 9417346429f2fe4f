"""The API to other machines: what people chose about it, and its listener."""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from starlette.types import ASGIApp

from cordee.access import lan
from cordee.access.announce import announced
from cordee.access.lan import LanCertificate
from cordee.api.guard import AUTHORITY_PATH, Access, Through
from cordee.api.server import serve
from cordee.errors import BadRequest
from cordee.net import address, identity
from cordee.net.server_certificates import fingerprint, is_of_house

SHOWN_MAX = 3  # addresses in a line


@dataclass(frozen=True)
class LanChoice:
    """What people chose. `lan` None: other machines are not served."""

    lan: str | None
    cert: Path | None
    key_file: Path | None
    plain: bool
    allow_hosts: tuple[str, ...]
    allow_origins: tuple[str, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From a verb's options, checked.

        Raises:
            BadRequest: they do not fit together.
        """
        names = ("lan", "cert", "key_file", "plain", "allow_hosts", "allow_origins")
        chosen = cls(**{name: given[name] for name in names})
        chosen._check()
        return chosen

    @property
    def hosts(self) -> list[str]:
        """The names that people allowed, as they are compared."""
        return [each.lower() for each in self.allow_hosts]

    @property
    def needs_keys(self) -> bool:
        """Whether nobody could ask without a key, by what was chosen."""
        return self.lan is not None or bool(self.allow_hosts)

    def _check(self) -> None:
        if self.lan is None and (self.cert or self.key_file or self.plain):
            raise BadRequest(
                "--cert, --key-file and --plain are for --lan: add it, or leave them out.", "lan"
            )
        if self.plain and (self.cert or self.key_file):
            raise BadRequest(
                "--plain has no TLS, and so no certificate: choose one of --plain and --cert.", "plain"
            )
        if self.key_file and not self.cert:
            raise BadRequest("--key-file is the key of a certificate: add --cert FILE.", "key-file")
        for host in self.allow_hosts:
            if not address.NAME.fullmatch(host) or not host.isascii():
                raise BadRequest(
                    f"--allow-host {host!r} is no host name: write it without http:// and without a port.",
                    "allow-host",
                )
        for origin in self.allow_origins:
            scheme, separator, rest = origin.partition("://")
            if not (scheme and separator) or "*" in origin or rest.endswith("/"):
                raise BadRequest(
                    f"--allow-origin {origin!r} is no origin: write one such as https://chat.example or "
                    "http://192.168.1.20:3000, without a path.",
                    "allow-origin",
                )


class LanServer:
    """The listener for other machines. It is opened at once, so that a port in use shows before models load.

    `name` is this machine's; `warn` is told what is in the way later. `authority` signs its certificate;
    None: people chose another, or none.
    """

    def __init__(self, chosen: LanChoice, name: str, warn: Callable[[str], None]) -> None:
        assert chosen.lan is not None, "somebody asked for it"
        self._chosen = chosen
        self.name = name
        self._warn = warn
        self._listener = lan.listener(chosen.lan)
        host, self._port = self._listener.getsockname()[:2]
        self._host = "" if host in ("0.0.0.0", "::") else host
        self._tls: ssl.SSLContext | None = None
        self._certificate: LanCertificate | None = None
        self.authority: x509.Certificate | None = None
        if chosen.cert is not None:
            self._tls = lan.own_context(chosen.cert, chosen.key_file)

    @property
    def wants_certificate(self) -> bool:
        """Whether an authority of ours has to sign one."""
        return self._tls is None and not self._chosen.plain

    def host_names(self) -> list[str]:
        """The names that requests may be for."""
        return lan.host_names(self.name, self._chosen.hosts)

    async def certify(
        self,
        authority: x509.Certificate,
        folder: Path,
        key: Path,
        sign: Callable[[list[str]], Awaitable[bytes]],
        is_admin: bool,
    ) -> None:
        """Get a certificate, kept in `folder`; see LanCertificate.

        Raises:
            CordeeError: it cannot be had.
        """

        def names() -> list[str]:
            own = lan.addresses(self._host)
            local = [*self.host_names(), *own, *(["127.0.0.1", "localhost"] if not self._host else [])]
            chosen = set(self._chosen.hosts)
            return local if is_admin else [each for each in local if each in chosen or is_of_house(each)]

        self.authority = authority
        self._certificate = lan.LanCertificate(folder, key, sign, names)
        await self._certificate.ensure()
        self._tls = self._certificate.context

    async def serve(self, app: ASGIApp, *, announce: bool = True) -> None:
        """Serve other machines until the task is cancelled; the application has another server already."""
        async with contextlib.AsyncExitStack() as stack:
            if announce:
                plain = self._chosen.plain
                await stack.enter_async_context(
                    announced(self.name, self._host, self._port, is_plain=plain, warn=self._warn)
                )
            if self._certificate is not None:
                keeping = asyncio.create_task(self._certificate.keep(self._warn))
                stack.callback(keeping.cancel)
            access = Access(self.host_names(), is_lan=True)
            await serve(Through(app, access), self._listener, self._tls, is_second=True)

    @property
    def page(self) -> str:
        """Where other machines find the page: by an address, which works without multicast."""
        return f"{self._scheme}://{address.text((lan.addresses(self._host) or [self.name])[0], self._port)}/"

    @property
    def _scheme(self) -> str:
        return "http" if self._chosen.plain else "https"

    def greeting(self) -> list[str]:
        """Where other machines find the API, and how they come to trust it: lines for people."""
        numbers = lan.addresses(self._host)
        names = [*self._chosen.hosts, f"{lan.label(self.name)}.local", *numbers]
        urls = [f"{self._scheme}://{address.text(each, self._port)}/v1" for each in names[:SHOWN_MAX]]
        lines = [f"for other machines, with a key: {', '.join(urls)}", f"the page for them: {self.page}"]
        if self._chosen.plain:
            lines.append(
                "WARNING: --plain: no TLS. Everybody on this network can read keys, questions and answers."
            )
        elif self.authority is not None and self._certificate is not None:
            base = f"https://{address.text((numbers or names)[0], self._port)}"
            lines += [
                f"its certificate is signed by {self._certificate.authority_path}, which clients have to "
                f"trust; SHA-256 fingerprint {fingerprint(self.authority)}",
                f"on another machine: curl -ko cordee.pem {base}{AUTHORITY_PATH}; compare the fingerprint "
                "that `openssl x509 -in cordee.pem -noout -fingerprint -sha256` prints; then `curl --cacert "
                "cordee.pem`, or for most programs SSL_CERT_FILE=cordee.pem (Node.js: "
                "NODE_EXTRA_CA_CERTS=cordee.pem)",
            ]
        return lines

    def authority_pem(self) -> bytes:
        """The authority's certificate, for clients; empty where there is none of ours."""
        return b"" if self.authority is None else identity.pem(self.authority)
