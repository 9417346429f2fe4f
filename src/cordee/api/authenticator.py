"""Keys at the API: who may come in, within which bounds; the end of what is under way for a revoked key."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator

from starlette.datastructures import Headers

from cordee.access.api_keys import HELD_MAX, ApiKey
from cordee.access.elsewhere import NOWHERE
from cordee.access.failed_keys import FailedKeys
from cordee.access.keyring import Keyring
from cordee.access.ledger import LOCAL, Ledger
from cordee.access.limits import Allowance
from cordee.access.local_key import SCHEME, LocalKey
from cordee.access.sessions import Sessions
from cordee.api.callers import ApiCaller
from cordee.errors import KeyNeeded, RateLimited, StorageFailed

LOOK_SECONDS = 0.25  # how often it is looked whether the keys of what is under way still stand
SHOWN_CHARS_MAX = 200  # of what may be a key; longer is none
NO_KEYS = Keyring(tuple)
MISSING = (
    "send 'Authorization: Bearer KEY' or 'x-api-key: KEY'; who looks after the machines makes a key with "
    "`cordee key add NAME`"
)


class Authenticator:
    """Knows the keys; one for all listeners of a process, on one event loop.

    `local_key` is wanted on this machine, too, if there is one. `clock` never jumps, in seconds.
    """

    def __init__(
        self,
        keyring: Keyring = NO_KEYS,
        ledger: Ledger | None = None,
        local_key: LocalKey | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = ledger
        self._keyring = keyring
        self._local_key = local_key
        self._clock = clock
        self._failed = FailedKeys()
        self._sessions = Sessions()
        self._allowances: dict[str, Allowance] = {}  # by the key's id
        self._open: dict[ApiCaller, ApiKey] = {}
        self._watching: asyncio.Task[None] | None = None

    async def identify(
        self, headers: Headers, address: str, *, wants_key: bool, token: str = ""
    ) -> ApiKey | None:
        """The key of a request that comes from `address`; None: it needs none, as it is of this machine.
        `token` is that of a session, if the request shows one.

        Raises:
            KeyNeeded: it shows no key that is one.
            RateLimited: too many wrong keys came from there.
        """
        session = self._sessions.find(token, self._clock()) if token else None
        if session is not None and session.key is None and not wants_key:
            return None
        signed_in = session.key if session is not None else None
        if signed_in is not None and (key := self._keyring.standing(signed_in)) is not None:
            return key
        shown = _shown(headers)
        for each in shown:
            if (key := self._keyring.recall(each)) is not None:
                return key
        if not wants_key and self._local_key is None:
            return await self._recognise(shown)  # so that what it uses is counted for it
        refusal = self._refusal(shown, wants_key=wants_key)
        if refusal is None:
            return None
        now = self._clock()
        if shown and (wait_seconds := self._failed.pause_seconds(address, now)) > 0:
            raise RateLimited("too many wrong keys came from this address", wait_seconds)
        if (key := await self._recognise(shown)) is not None:
            return key
        if shown:
            self._failed.note(address, now)
        raise refusal

    async def sign_in(self, shown: str, address: str, *, wants_key: bool) -> str:
        """The token of a new session for a key that somebody at `address` typed. Raises as `identify`."""
        key = None
        if self._refusal([shown], wants_key=wants_key) is not None:  # it is not the local key
            key = await self.identify(Headers({"x-api-key": shown}), address, wants_key=True)
        return self._sessions.begin(key, self._clock())

    def sign_out(self, token: str) -> None:
        """A session ends."""
        self._sessions.end(token)

    def _refusal(self, shown: list[str], *, wants_key: bool) -> KeyNeeded | None:
        """What is said to who shows no key of ours; None: it is the local key, where that will do."""
        if wants_key or self._local_key is None:
            return KeyNeeded(f"{'this key is not valid here' if shown else 'the API wants a key'}: {MISSING}")
        refusal = None
        for each in shown or [""]:
            try:
                self._local_key.check(f"{SCHEME} {each}" if each else None)
            except KeyNeeded as error:
                refusal = error
            else:
                return None
        return refusal

    @contextlib.contextmanager
    def admitted(self, key: ApiKey | None, *, is_work: bool) -> Generator[ApiCaller]:
        """A request is answered; `is_work`: it may cost tokens, and counts for the key's bounds.

        Raises:
            RateLimited: the key has used what it may for now.
        """
        allowance = self._allowance(key) if key is not None and is_work else None
        if allowance is not None:
            assert key is not None
            elsewhere = NOWHERE if self.ledger is None else self.ledger.elsewhere
            now = self._clock()
            others = elsewhere.at_once(key.name), elsewhere.spent(key.name, now)
            allowance.enter(key.requests, key.tokens, now, *others)
        name = LOCAL if key is None else key.name
        if is_work and self.ledger is not None:
            self.ledger.count(name, requests=1)
            self.ledger.at_once[name] += 1

        def spend(tokens_in: int, tokens_out: int) -> None:
            if allowance is not None:
                allowance.spend(tokens_in + tokens_out)
            if self.ledger is not None:
                self.ledger.count(name, tokens_in=tokens_in, tokens_out=tokens_out)

        caller = ApiCaller() if key is None else ApiCaller(key.name, is_admin=key.admin)
        caller.spend = spend
        try:
            if key is not None:
                self._open[caller] = key
                self._watch()
            yield caller
        finally:
            self._open.pop(caller, None)
            if allowance is not None:
                allowance.leave()
            if is_work and self.ledger is not None:
                self.ledger.at_once[name] -= 1

    async def _recognise(self, shown: list[str]) -> ApiKey | None:
        for each in shown:
            if (key := await self._keyring.recognise(each)) is not None:
                return key
        return None

    def _allowance(self, key: ApiKey) -> Allowance:
        if len(self._allowances) > HELD_MAX and key.id not in self._allowances:  # of keys that are no more
            self._allowances = {name: each for name, each in self._allowances.items() if each.at_once}
        return self._allowances.setdefault(key.id, Allowance())

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._end_revoked())

    async def _end_revoked(self) -> None:
        """As long as anything is under way for a key: end what is of a key that is no more."""
        while self._open:
            await asyncio.sleep(LOOK_SECONDS)
            with contextlib.suppress(StorageFailed):  # the keys cannot be read now; nobody else comes in
                self._look()

    def _look(self) -> None:
        for key in {key.id: key for key in self._open.values()}.values():
            if self._keyring.standing(key) is None:
                for caller in [each for each, own in self._open.items() if own.id == key.id]:
                    caller.revoke()


def _shown(headers: Headers) -> list[str]:
    """What a request shows as a key: some clients send both headers, one of them with a placeholder."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    found = [bearer.strip() if scheme.lower() == SCHEME else "", headers.get("x-api-key", "").strip()]
    return [each for each in dict.fromkeys(found) if each and len(each) <= SHOWN_CHARS_MAX]
