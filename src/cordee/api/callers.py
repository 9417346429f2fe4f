"""Who asks: the caller of the request that is being answered, for all that happens on its behalf.

`current` is set for each request (guard.py), and handed on to the tasks that a request starts.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

from cordee.errors import KeyNeeded


class ApiCaller:
    """Who sent a request. `name` is the key's; empty: a program of this machine, which needs none.

    `spend` is told of tokens of prompts and of answers, as they are computed.
    """

    def __init__(
        self,
        name: str = "",
        *,
        is_admin: bool = True,
        spend: Callable[[int, int], None] = lambda _in, _out: None,
    ) -> None:
        self.name = name
        self.is_admin = is_admin
        self.spend = spend
        self._is_revoked = False
        self._under_way: set[asyncio.Timeout] = set()

    def revoke(self) -> None:
        """The key is no more: what is under way for it ends. Revoking twice is harmless."""
        if self._is_revoked:
            return
        self._is_revoked = True
        for each in self._under_way:
            each.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def while_valid(self) -> AsyncGenerator[None]:
        """Do something as long as the key is valid.

        Raises:
            KeyNeeded: it was revoked, before or meanwhile.
        """
        timeout = asyncio.timeout(None)
        try:
            async with timeout:
                self._under_way.add(timeout)
                if self._is_revoked:
                    timeout.reschedule(asyncio.get_running_loop().time())
                yield
        except TimeoutError:
            if timeout.expired():
                raise KeyNeeded("the key that asked for this answer was revoked, or has expired") from None
            raise
        finally:
            self._under_way.discard(timeout)


_current: ContextVar[ApiCaller] = ContextVar("caller")
_LOCAL = ApiCaller()


def current() -> ApiCaller:
    """The caller of the request that is being answered."""
    return _current.get(_LOCAL)


def enter(caller: ApiCaller) -> None:
    """From here on, in this task and those it starts, all is for this caller."""
    _current.set(caller)
