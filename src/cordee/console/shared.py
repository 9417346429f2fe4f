"""A value that many pages ask for again and again: made for all of them at once, and not too often."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

FRESH_SECONDS = 0.5  # pages ask once a second
REST_RATIO = 4  # between two makings it rests so many times longer than the last took: a fifth of the time
REST_SECONDS_MAX = 10.0  # however long it took: people watch


class SharedValue:
    """Made by `make` when somebody asks; `clock` never jumps, in seconds.

    Saying why a model does not fit may take seconds on a large cluster; a page that stays open must not keep
    the node at it.
    """

    def __init__(
        self, make: Callable[[], Awaitable[Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._clock = clock
        self._making = asyncio.Lock()
        self._until = float("-inf")
        self._body, self._tag = b"", ""

    def forget(self) -> None:
        """Something has been done: who asks next sees what came of it."""
        self._until = float("-inf")

    async def response(self, request: Request) -> Response:
        """The value as JSON, or 304 if it is still what the client has (RFC 9110, section 13.1.2)."""
        async with self._making:
            if self._clock() >= self._until:
                began = self._clock()
                self._body = msgspec.json.encode(await self._make())
                self._tag = f'"{hashlib.blake2b(self._body, digest_size=12).hexdigest()}"'
                now = self._clock()
                self._until = now + max(FRESH_SECONDS, min(REST_SECONDS_MAX, REST_RATIO * (now - began)))
            body, tag = self._body, self._tag
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type="application/json")
