"""`GET /v1/usage`: what each key used."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from cordee.access.ledger import Ledger, Used
from cordee.api import callers
from cordee.api.failures import json_response


def usage_response(ledger: Ledger | None) -> Response:
    """All rows for an admin's key, and for programs of this machine; for any other key its own."""
    caller = callers.current()
    used = {} if ledger is None else ledger.read_all()
    if not caller.is_admin:
        used = {name: each for name, each in used.items() if name == caller.name}
    return json_response({"object": "list", "data": rows(used)})


def rows(used: Mapping[str, Used]) -> list[dict[str, Any]]:
    """As `/v1/usage` and `cordee usage --json` have them."""
    return [{"key": name, **msgspec.structs.asdict(each)} for name, each in sorted(used.items())]
