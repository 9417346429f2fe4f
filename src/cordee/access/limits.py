"""Bounds of a key, as people write them, and how they are held: `requests=4,tokens=20000/min`.

Tokens are counted as they come, those of prompts when their answer begins. A request is let in while the
budget is above zero, so a single long answer may overdraw it; the next request then waits until the budget
has grown above zero again, at its rate. So on average over some minutes nobody gets more than the bound.
"""

import math
import re
from dataclasses import dataclass, field

from cordee.errors import BadRequest, RateLimited

LIMIT = re.compile(r"(?:requests=(?P<requests>\d{1,6})|tokens=(?P<tokens>\d{1,12})(?:/min)?)")
# At once, of a key without a bound of its own: so one key alone cannot take all of guard.REQUESTS_MAX.
REQUESTS_AT_ONCE = 256
BUSY_SECONDS = 1  # until one of somebody's own requests may have ended
MINUTE_SECONDS = 60.0


def parse(text: str) -> tuple[int, int]:
    """Requests at once and tokens a minute, 0 for what is not bounded.

    Raises:
        BadRequest: it is not what the module's docstring shows.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = LIMIT.fullmatch(part.strip())
        said = {} if match is None else {name: int(n) for name, n in match.groupdict().items() if n}
        if not said or not all(said.values()) or found.keys() & said.keys():
            raise BadRequest(
                f"{text!r} is no limit: write requests=4, tokens=20000/min, or both with a comma; numbers "
                "above 0.",
                "limit",
            )
        found |= said
    return found.get("requests", 0), found.get("tokens", 0)


def written(requests: int, tokens: int) -> str:
    """The bounds as `parse` takes them; "" for none."""
    parts = [f"requests={requests}"] if requests else []
    return ",".join([*parts, *([f"tokens={tokens}/min"] if tokens else [])])


@dataclass
class Allowance:
    """What a key may still use. `now` is a clock that never jumps, in seconds."""

    at_once: int = 0
    level: float = math.inf  # tokens; below zero, they were overdrawn
    seen: float = field(default=-math.inf)

    def enter(
        self, requests: int, tokens: int, now: float, at_once_elsewhere: int = 0, spent_elsewhere: int = 0
    ) -> None:
        """A request begins, under these bounds (0: none); `leave` ends it. Of other gateways it counts what
        is under way there, and the tokens that were spent there since the last request here.

        Raises:
            RateLimited: it has to come again later.
        """
        self._refill(tokens, now)
        self.level -= spent_elsewhere
        most = requests or REQUESTS_AT_ONCE
        if self.at_once + (at_once_elsewhere if requests else 0) >= most:
            raise RateLimited(f"this key has {most} requests at once already", BUSY_SECONDS)
        if tokens and self.level <= 0:
            wait_seconds = math.floor(-self.level / tokens * MINUTE_SECONDS) + 1
            raise RateLimited(f"this key has used its {tokens} tokens a minute", wait_seconds)
        self.at_once += 1

    def leave(self) -> None:
        """A request has ended."""
        self.at_once -= 1

    def spend(self, tokens: int) -> None:
        """These were computed for it."""
        self.level -= tokens

    def _refill(self, tokens: int, now: float) -> None:
        """Let the budget grow since it was last seen, up to what a minute has."""
        if tokens and math.isfinite(self.level):
            self.level = min(tokens, self.level + max(0.0, now - self.seen) * tokens / MINUTE_SECONDS)
        else:
            self.level = float(tokens) if tokens else math.inf
        self.seen = now
