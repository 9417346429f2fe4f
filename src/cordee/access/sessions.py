"""Who signed in at the page: a random token stands for a key that was typed once.

Tokens are kept in memory, as their SHA-256, and so end with the process; a revoked key ends its sessions,
since a session is worth what its key is. The browser has the token in a cookie that scripts cannot read.
"""

import hashlib
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from cordee.access.api_keys import ApiKey

TOKEN_BYTES = 32  # random ones, which nobody guesses
SESSIONS_MAX = 4096  # some 500 bytes each; the one that was used longest ago makes room
UNUSED_SECONDS = 12 * 3600.0  # a working day: who comes back the next morning types the key again


@dataclass
class SignedIn:
    """`key` None: the key of this machine's own programs (`--local-key`)."""

    key: ApiKey | None
    used: float


class Sessions:
    """All sessions of a process. `now` is a clock that never jumps, in seconds."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[bytes, SignedIn] = OrderedDict()  # by the token's SHA-256

    def begin(self, key: ApiKey | None, now: float) -> str:
        """A new session's token."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._sessions[_mark(token)] = SignedIn(key, now)
        while len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return token

    def find(self, token: str, now: float) -> SignedIn | None:
        """The session of a token; None if there is none such, or it was not used for UNUSED_SECONDS."""
        mark = _mark(token)
        session = self._sessions.get(mark)
        if session is None or now - session.used > UNUSED_SECONDS:
            self._sessions.pop(mark, None)
            return None
        session.used = now
        self._sessions.move_to_end(mark)
        return session

    def end(self, token: str) -> None:
        """Sign out; ending twice is harmless."""
        self._sessions.pop(_mark(token), None)


def _mark(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
