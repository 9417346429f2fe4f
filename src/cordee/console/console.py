"""The console's endpoints, below `/console`: what the pages of the map, the models and the keys ask.

    GET   /console/me           who asks, and what that one may do
    GET   /console/overview     machines, links, models, what is under way; each second, with an ETag
    GET   /console/snapshots       what there was before, to look back at
    GET   /console/models       the models that are known, stored, being fetched
    POST  /console/fit          whether a model fits, before it is fetched
    GET   /console/admin        keys, use, errors: for admins, as all that follows
    POST  /console/pull, /console/pull/stop, /console/model/remove, /console/deploy, /console/undeploy
    POST  /console/invite, /console/node/drain, /console/node/remove
    POST  /console/key/add, /console/key/limit, /console/key/remove

Reading wants a key where the API does. What changes something wants an admin (who.py) and comes from a page
of this very server; it is noted, with who did it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cordee.access import limits
from cordee.access.keyring import described
from cordee.access.ledger import Ledger
from cordee.agent import control
from cordee.api import callers
from cordee.api.bodies import Bodies
from cordee.api.failures import json_response
from cordee.api.usage import rows
from cordee.console import fit, who
from cordee.console.backend import ConsoleBackend
from cordee.console.journal import Journal
from cordee.console.pulls import Pulls
from cordee.console.shared import SharedValue
from cordee.distribution.pull import is_on_hub
from cordee.models.cards import cards
from cordee.models.catalog import card_facts, place_of

DAY_SECONDS = 86_400.0


class Look(msgspec.Struct, frozen=True):
    """`model` is one of the list, or owner/name on the hub, which only admins have asked."""

    model: str


class BeginPull(msgspec.Struct, frozen=True):
    """See Pulls.begin."""

    source: str
    name: str = ""


class StopPull(msgspec.Struct, frozen=True):
    """`number` is that of a PullState."""

    number: int


class RemoveModel(msgspec.Struct, frozen=True):
    """`last`: although there is no other whole copy, or it is served."""

    name: str
    last: bool = False


class NewKey(msgspec.Struct, frozen=True):
    """`limit` as `cordee key add --limit` takes it, `days` until it expires; 0: never."""

    name: str
    admin: bool = False
    limit: str = ""
    days: float = 0.0


class LimitedKey(msgspec.Struct, frozen=True):
    """`limit` as `cordee key limit` takes it; empty: none."""

    name: str
    limit: str = ""


class Console:
    """See the module's docstring. `ledger` is that of the API, if there is one."""

    def __init__(self, backend: ConsoleBackend, ledger: Ledger | None) -> None:
        self._backend = backend
        self._ledger = ledger
        self._journal = Journal()
        self._bodies = Bodies()
        self._pulls = Pulls(backend.store, backend.look)
        self._overview = SharedValue(self._overview_now)
        self._snapshots = SharedValue(self._snapshots_now)

    def routes(self) -> list[Route]:
        """Its endpoints."""
        acts: list[tuple[str, type, Callable[[Any], Awaitable[Any]], str]] = [
            ("pull", BeginPull, self._pull, "source"),
            ("pull/stop", StopPull, self._stop_pull, ""),
            ("model/remove", RemoveModel, self._remove_model, "name"),
            ("deploy", control.Deploy, self._backend.deploy, "model"),
            ("undeploy", control.Undeploy, self._backend.undeploy, "model"),
            ("invite", control.Invite, self._backend.invite, ""),
            ("node/drain", control.Drain, self._backend.drain, "node"),
            ("node/remove", control.Remove, self._backend.remove, "node"),
            ("key/add", NewKey, self._add_key, "name"),
            ("key/limit", LimitedKey, self._limit_key, "name"),
            ("key/remove", control.RemoveKey, self._backend.remove_key, "name"),
        ]
        return [
            Route("/console/me", self._me),
            Route("/console/overview", self._overview.response),
            Route("/console/snapshots", self._snapshots.response),
            Route("/console/models", self._models),
            Route("/console/fit", self._fit, methods=["POST"]),
            Route("/console/admin", self._admin),
            *(
                Route(f"/console/{path}", self._act(path, kind, do, about), methods=["POST"])
                for path, kind, do, about in acts
            ),
        ]

    async def close(self) -> None:
        """End what is being fetched; closing twice is harmless."""
        await self._pulls.close()
        self._journal.close()

    def _act(
        self, path: str, kind: type, do: Callable[[Any], Awaitable[Any]], about: str
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler of what changes something. `about` is the field of its question that is noted."""
        decoder = msgspec.json.Decoder(kind)

        async def handle(request: Request) -> Response:
            who.require_own_page(request)
            name = who.require_admin(request)
            asked = await self._bodies.read(request, decoder)
            found = await do(asked)
            self._overview.forget()
            self._journal.note(name, path, _named(found) or (getattr(asked, about) if about else ""))
            return json_response(found)

        return handle

    async def _me(self, request: Request) -> Response:
        caller = callers.current()
        return json_response({"name": caller.name, "admin": who.is_admin(request)})

    async def _overview_now(self) -> dict[str, Any]:
        return await self._backend.overview() | {"pulls": self._pulls.states()}

    async def _snapshots_now(self) -> list[Any]:
        return self._backend.snapshots()

    async def _models(self, _: Request) -> Response:
        return json_response(await asyncio.to_thread(self._models_now))

    def _models_now(self) -> dict[str, Any]:
        problems: list[str] = []
        stored = {
            each.name: each for each in self._backend.store.list(problems.append) if each.path.is_file()
        }
        known = [card_facts(card, place_of(card, stored), []) for card in cards().values()]
        return {
            "cards": sorted(known, key=lambda card: (card["bytes"], card["name"])),
            "stored": [
                {"name": each.name, "bytes": each.nbytes, "source": each.source, "added": each.added}
                for each in stored.values()
            ],
            "problems": problems,
        }

    async def _fit(self, request: Request) -> Response:
        who.require_own_page(request)
        asked = await self._bodies.read(request, _LOOK)
        model = fit.check_source(asked.model)
        asks_hub = model not in cards() and is_on_hub(model)
        if asks_hub:
            who.require_admin(request)
        return json_response(await self._backend.fit(model, asks_hub=asks_hub))

    async def _admin(self, request: Request) -> Response:
        who.require_admin(request)
        now = time.time()
        used = {} if self._ledger is None else self._ledger.read_all()
        return json_response(
            {
                "here": self._backend.admin_facts(),
                "keys": [described(each, now) for each in self._backend.api_keys() if each.id],
                "usage": rows(used),
                "errors": list(reversed(self._journal.errors)),
                "actions": list(reversed(self._journal.actions)),
            }
        )

    async def _pull(self, asked: BeginPull) -> Any:
        return self._pulls.begin(fit.check_source(asked.source), asked.name.strip())

    async def _stop_pull(self, asked: StopPull) -> Any:
        return {"source": self._pulls.stop(asked.number)}

    async def _remove_model(self, asked: RemoveModel) -> Any:
        await asyncio.to_thread(self._backend.store.get, asked.name)
        if not asked.last:
            await self._backend.check_removal(asked.name)
        await asyncio.to_thread(self._backend.store.remove, asked.name)
        await self._backend.look()
        return control.Empty()

    async def _add_key(self, asked: NewKey) -> Any:
        requests, tokens = _bounds(asked.limit)
        expires = time.time() + asked.days * DAY_SECONDS if asked.days > 0 else 0.0
        return await self._backend.add_key(control.AddKey(asked.name, asked.admin, requests, tokens, expires))

    async def _limit_key(self, asked: LimitedKey) -> Any:
        return await self._backend.limit_key(control.LimitKey(asked.name, *_bounds(asked.limit)))


def _bounds(limit: str) -> tuple[int, int]:
    return limits.parse(limit) if limit.strip() else (0, 0)


def _named(found: Any) -> str:
    """What people call that which was changed, if the answer says so."""
    return cast("dict[str, str]", found).get("name", "") if isinstance(found, dict) else ""


_LOOK = msgspec.json.Decoder(Look)
