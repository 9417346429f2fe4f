"""The agent's log: lines on standard error, of each kind only so many a minute.

What other nodes say decides how often some lines are logged, and a log ends up on a disk.
"""

import logging
from collections import Counter

LINES_MAX = 60  # in a minute from one place in the program: one a second is more than anybody reads
MINUTE_SECONDS = 60.0


class Sparing(logging.Filter):
    """Passes LINES_MAX lines of each kind in a minute; the last of them says that more are left out."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._counts: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        if not 0 <= record.created - self._began < MINUTE_SECONDS:
            self._began = record.created
            self._counts.clear()
        kind = record.pathname, record.lineno
        self._counts[kind] += 1
        if self._counts[kind] == LINES_MAX:
            record.msg = f"{record.getMessage()} (more of these are left out for a minute)"
            record.args = ()
        return self._counts[kind] <= LINES_MAX


def begin() -> None:
    """Log like this from now on."""
    handler = logging.StreamHandler()
    handler.addFilter(Sparing())
    logging.getLogger().addHandler(handler)
