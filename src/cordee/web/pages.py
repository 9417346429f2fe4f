"""The page's routes: its documents, its files, and the session of whoever types a key into it."""

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from cordee.api.authenticator import Authenticator
from cordee.api.bodies import Bodies
from cordee.api.failures import json_response
from cordee.api.guard import address_of, wants_key
from cordee.errors import KeyNeeded
from cordee.web.bundle import Bundle
from cordee.web.session_cookie import PAGES, SESSION, STATIC, cookie, is_page, token_of

KEEP = "public, max-age=31536000, immutable"
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "worker-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types cordee dompurify",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-DNS-Prefetch-Control": "off",  # a link in an answer must not tell a name server of itself
}


class SignIn(msgspec.Struct, frozen=True):
    """What the page sends to sign in."""

    key: str


class PageRoute(Route):
    """The route of a document: for browsers. Programs that ask for `/` get what stands behind it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Route."""
        return super().matches(scope) if is_page(scope) else (Match.NONE, {})


class Pages:
    """The handlers. `others` gives the `name` and `url` of each other node's page."""

    def __init__(self, authenticator: Authenticator, others: Callable[[], list[dict[str, str]]]) -> None:
        self._others = others
        self._authenticator = authenticator
        self._bundle = Bundle()
        self._bodies = Bodies()
        self._decoder = msgspec.json.Decoder(SignIn)

    def routes(self) -> list[Route]:
        """Its endpoints."""
        return [
            *(PageRoute(path, self.document) for path in PAGES),
            Route(STATIC + "{hash}/{path:path}", self.file),
            Route("/elsewhere", self.elsewhere),
            Route(SESSION, self.show_session),
            Route(SESSION, self.sign_in, methods=["POST"]),
            Route(SESSION, self.sign_out, methods=["DELETE"]),
        ]

    async def document(self, _: Request) -> Response:
        """The one document that all pages are; its script reads the path."""
        headers = {**HEADERS, "Cache-Control": "no-cache", "Vary": "Accept"}
        return Response(self._bundle.document, 200, headers, "text/html")

    async def file(self, request: Request) -> Response:
        """A file of the bundle. One of another release is not here: the page says that it has to be loaded
        anew."""
        found = self._bundle.find(request.path_params["path"])
        if found is None or request.path_params["hash"] != self._bundle.hash:
            headers = {**HEADERS, "Cache-Control": "no-store"}
            return PlainTextResponse("this release has no such file", 404, headers)
        headers = {**HEADERS, "Cache-Control": KEEP, "Vary": "Accept-Encoding"}
        content = found.content
        if "gzip" in request.headers.get("accept-encoding", ""):
            content = found.compressed
            headers["Content-Encoding"] = "gzip"
        return Response(content, 200, headers, found.media_type)

    async def elsewhere(self, _: Request) -> Response:
        """Where a browser can turn when this node is gone."""
        return _told({"others": self._others()})

    async def show_session(self, request: Request) -> Response:
        """Who is there: what the page shows and offers."""
        scope = request.scope
        try:
            key = await self._authenticator.identify(
                request.headers, address_of(scope), wants_key=wants_key(scope), token=token_of(scope)
            )
        except KeyNeeded:
            return _told({"key_needed": True, "name": "", "is_admin": False})
        # Without a key it is somebody at this very machine, who may ask.
        name, is_admin = ("", False) if key is None else (key.name, key.admin)
        return _told({"key_needed": False, "name": name, "is_admin": is_admin})

    async def sign_in(self, request: Request) -> Response:
        """A session for the key that somebody typed; wrong ones slow their address down."""
        given = await self._bodies.read(request, self._decoder)
        scope = request.scope
        shown = given.key.strip()
        token = await self._authenticator.sign_in(shown, address_of(scope), wants_key=wants_key(scope))
        response = _told({})
        response.set_cookie(**cookie(scope), value=token)
        return response

    async def sign_out(self, request: Request) -> Response:
        """The session ends here, and in the browser."""
        self._authenticator.sign_out(token_of(request.scope))
        response = _told({})
        response.delete_cookie(**cookie(request.scope))
        return response


def _told(body: dict[str, Any]) -> Response:
    return json_response(body, headers={**HEADERS, "Cache-Control": "no-store"})
