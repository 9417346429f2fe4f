"""Which requests are let in: to which names, from which pages, with which keys, and how many at once."""

import ipaddress
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.middleware import cors
from starlette.types import ASGIApp, Receive, Scope, Send

from cordee.api import callers
from cordee.api.authenticator import Authenticator
from cordee.api.failures import AdminKeyNeeded, ForbiddenOrigin, error_response
from cordee.errors import CordeeError, Overloaded

REQUESTS_MAX = 2048  # at once; each costs a task, a connection and its body, beside its place in a queue
HEADER_CHARS_MAX = 100  # of a header that a message quotes
ACCESS = "cordee.access"  # where the scope of a request says through which listener it came
# Schemes of pages that belong to programs of this machine. No site has them.
APP_SCHEMES = {"app", "vscode-webview", "tauri"}
ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]*)(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
METHODS = ("GET", "HEAD", "POST", "DELETE")
# What pages may read beside the body.
EXPOSED = ("retry-after", "www-authenticate", "x-cordee-ignored")
PREFLIGHT_SECONDS = 600  # for which a browser remembers what it may send
# What changes what is served here, for all: not for a key that may only ask.
ADMIN_PATHS = {f"/api/{verb}" for verb in ("pull", "push", "create", "copy", "delete")}
UNCOUNTED = {"GET", "HEAD", "OPTIONS"}
AUTHORITY_PATH = "/authority.pem"  # no secret: whoever comes for the first time needs it


@dataclass(frozen=True)
class Access:
    """What a listener lets in: requests to loopback, and to these `names` (lower case). A request to one of
    them wants a key, since others come through it.

    `is_lan`: it listens for other machines. All requests want a key then, and may name an address.
    """

    names: Collection[str] = ()
    is_lan: bool = False


class Through:
    """An application as one listener has it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, ACCESS: self._access}, receive, send)


class Guard:
    """Lets in requests to the names of this server from pages that may ask, and bounds how many at once.

    A page of another site can make a browser send requests here: to this server's address, which the Origin
    header shows, or to a name of its own that it makes point here (DNS rebinding), which the Host header
    shows. An address in the Host header cannot be made to point elsewhere.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self._app = app
        self._origins = origins
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope = _origin_form(scope)
            self._check(Headers(scope=scope), _access(scope))
            if self._open >= REQUESTS_MAX:
                raise Overloaded(f"{REQUESTS_MAX} requests are being answered; try again in a moment")
        except CordeeError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1

    def _check(self, headers: Headers, access: Access) -> None:
        hosts = headers.getlist("host") or [""]
        for host in hosts:
            name = _hostname(f"//{host}")
            if not (is_loopback(name) or name in access.names or (access.is_lan and _is_address(name))):
                raise ForbiddenOrigin(
                    f"the host {host[:HEADER_CHARS_MAX]!r} is not this machine: "
                    + (
                        "start it with --allow-host"
                        if access.is_lan
                        else "use http://127.0.0.1 or http://localhost"
                    )
                )
        for origin in headers.getlist("origin"):
            is_own = urlsplit(origin).netloc in hosts if origin.startswith(("http://", "https://")) else False
            if not (is_own or may_ask(origin, self._origins)):
                raise ForbiddenOrigin(f"pages of {origin[:HEADER_CHARS_MAX]} may not use this server")


class Cors(cors.CORSMiddleware):
    """Tells browsers what pages of other origins may do: what `may_ask` says, and nothing else."""

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        super().__init__(
            app,
            allow_methods=METHODS,
            allow_headers=["*"],  # those that are asked for: clients name themselves in many
            expose_headers=EXPOSED,
            max_age=PREFLIGHT_SECONDS,
        )
        self._origins = origins

    def is_allowed_origin(self, origin: str) -> bool:
        """See CORSMiddleware."""
        return may_ask(origin, self._origins)


class KeyGuard:
    """Lets in who shows a key, where one is wanted, within the key's bounds. `is_public` says which requests
    are for everybody; `token_of` gives the token of a request's session, if it has one."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        is_public: Callable[[Scope], bool],
        token_of: Callable[[Scope], str],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._is_public = is_public
        self._token_of = token_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == AUTHORITY_PATH or self._is_public(scope):
            await self._app(scope, receive, send)
            return
        headers, method = Headers(scope=scope), scope["method"]
        try:
            key = await self._authenticator.identify(
                headers, address_of(scope), wants_key=wants_key(scope), token=self._token_of(scope)
            )
            if key is not None and not key.admin and scope["path"].rstrip("/") in ADMIN_PATHS:
                raise AdminKeyNeeded(
                    f"the key {key.name} may ask the models, and change nothing here: `cordee key add NAME "
                    "--admin` makes one that may"
                )
            with self._authenticator.admitted(key, is_work=method not in UNCOUNTED) as caller:
                callers.enter(caller)
                await self._app(scope, receive, send)
        except CordeeError as error:
            await error_response(error, scope["path"])(scope, receive, send)


def address_of(scope: Scope) -> str:
    """The address that a request comes from."""
    return (scope.get("client") or ("", 0))[0]


def wants_key(scope: Scope) -> bool:
    """Whether a request has to show a key because of the way it came, or the name it is for."""
    return _access(scope).is_lan or not is_loopback(_hostname(f"//{Headers(scope=scope).get('host', '')}"))


def _origin_form(scope: Scope) -> Scope:
    """A request for an absolute URL as one for its path at that URL's host (RFC 9112, section 3.2.2)."""
    match = ABSOLUTE.match(scope["raw_path"])
    if match is None:
        return scope
    path = match["path"] or b"/"
    headers = [(b"host", match["host"]), *(each for each in scope["headers"] if each[0] != b"host")]
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii")), "headers": headers}


def may_ask(origin: str, origins: Collection[str]) -> bool:
    """Whether pages of an origin may use this server: of this machine, of its programs, or as it was told."""
    scheme = origin.partition("://")[0].lower()
    return scheme in APP_SCHEMES or origin in origins or is_loopback(_hostname(origin))


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own for itself."""
    try:
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _hostname(url: str) -> str:
    """The host of a URL, in lower case; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _access(scope: Scope) -> Access:
    return scope.get(ACCESS) or Access()
