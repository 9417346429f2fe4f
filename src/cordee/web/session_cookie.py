"""Which requests are the page's own: for its documents and files, and with its session.

Documents and files are for everybody who reaches the server: they hold no secret, and somebody without a key
needs them to type one. All that they show comes from endpoints that ask who is there.

A session's cookie counts only beside a header that the page's own requests have. Pages of other origins
cannot send it without a preflight, and no preflight lets credentials through; so none of them acts for
whoever signed in. Cookies know no ports, so a cookie is named after the port of its server: two nodes of one
machine have sessions of their own.
"""

from typing import Any

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

PAGES = ("/", "/cluster", "/models", "/admin")
STATIC = "/static/"
SESSION = "/session"
PAGE_HEADER = "x-cordee-page"


def is_page(scope: Scope) -> bool:
    """Whether a request is a browser's for one of the documents; Ollama's clients ask for `/`, too."""
    wants = Headers(scope=scope).get("accept", "")
    return scope["path"] in PAGES and scope["method"] in ("GET", "HEAD") and "text/html" in wants


def is_public(scope: Scope) -> bool:
    """Whether a request is answered without a key: for what is no secret, or to sign in."""
    return is_page(scope) or scope["path"].startswith(STATIC) or scope["path"] == SESSION


def token_of(scope: Scope) -> str:
    """The token of a request's session; empty where it has none that counts."""
    headers = Headers(scope=scope)
    if PAGE_HEADER not in headers:
        return ""
    return cookie_parser(headers.get("cookie", "")).get(_name(scope), "")


def cookie(scope: Scope) -> dict[str, Any]:
    """The cookie of a session, but for its value: scripts cannot read it, and other sites not send it. The
    browser forgets it when it ends."""
    is_tls = scope["scheme"] == "https"
    return {"key": _name(scope), "path": "/", "secure": is_tls, "httponly": True, "samesite": "strict"}


def _name(scope: Scope) -> str:
    """Over TLS with the prefix by which browsers take the cookie from this very host alone (RFC 6265bis)."""
    prefix = "__Host-" if scope["scheme"] == "https" else ""
    return f"{prefix}cordee-{(scope.get('server') or ('', 0))[1]}"
