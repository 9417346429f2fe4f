"""Certificates over time: this node's own is renewed long before it ends; an admin renews those of others."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from cordee.errors import CordeeError
from cordee.net import enrolment, renewal
from cordee.net.bus import Bus
from cordee.net.identity import Identity
from cordee.net.renewal import RenewalEndpoint

RENEW_SECONDS = 3600.0  # how often a renewal is asked for that has time
AGE_SECONDS = 60.0  # how often the certificate's age is looked at: a clock may be set at any time


class Certificates:
    """See the module's docstring. All methods on one event loop.

    `listen` is the host at which an admin serves renewals. `changed` is called when this node begins to;
    `removed` is set when it is told that it was removed from the cluster.
    """

    def __init__(
        self,
        identity: Identity,
        bus: Bus,
        listen: str,
        changed: Callable[[], None],
        removed: asyncio.Event,
    ) -> None:
        self._identity = identity
        self._bus = bus
        self._listen = listen
        self._changed = changed
        self._removed = removed
        self._endpoint: RenewalEndpoint | None = None

    @property
    def renewals(self) -> str:
        """Where this node renews certificates, as Facts.renewals has it."""
        return "" if self._endpoint is None else self._endpoint.addresses

    async def serve_as_admin(self) -> None:
        """Renew certificates, on the bus and outside of it."""
        endpoint = await RenewalEndpoint.open(self._identity, self._listen)
        if self._endpoint is not None:
            endpoint.close()  # it was an admin already
            return
        self._endpoint = endpoint
        enrolment.serve_renewals(self._bus, self._identity)
        self._changed()

    async def renew_always(self) -> None:
        """Renew this node's own certificate whenever that is due."""
        identity, asked = self._identity, -RENEW_SECONDS
        while True:
            due, valid = identity.renewal_due(time.time()), identity.is_valid(time.time())
            if due and (time.monotonic() - asked >= RENEW_SECONDS or identity.is_admin or not valid):
                asked = time.monotonic()
                with contextlib.suppress(CordeeError):  # the disk is full, or a clock is wrong: again later
                    if await self._renew():
                        await self._bus.refresh()
                if identity.node in identity.revoked:
                    self._removed.set()
            await asyncio.sleep(AGE_SECONDS)

    def close(self) -> None:
        """Serve no renewals any more."""
        if self._endpoint is not None:
            self._endpoint.close()

    async def _renew(self) -> bool:
        """On the bus, or where nodes are renewed whose certificates the bus does not accept."""
        if await enrolment.renew(self._bus, self._identity, time.time()):
            return True
        return not await asyncio.to_thread(renewal.renew, self._identity)
