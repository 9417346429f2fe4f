"""The last warnings and errors of this program, and what admins had it do: in memory, bounded, for people.

Nothing that users wrote, or models answered, is ever logged; so none of it is here.
"""

import logging
import time
from collections import deque

import msgspec

from cordee.agent.logs import Sparing

ERRORS_KEPT, ACTIONS_KEPT = 100, 100  # some pages of each
TEXT_CHARS_MAX = 500  # of a line; some quote what another machine said

log = logging.getLogger(__name__)


class LoggedError(msgspec.Struct, frozen=True):
    """A line of the log. `clock` is in seconds since 1970; `is_error` false: a warning."""

    clock: float
    is_error: bool
    text: str


class LoggedAction(msgspec.Struct, frozen=True):
    """What an admin had this node do. `clock` is in seconds since 1970; `what` is a verb of the page's."""

    clock: float
    who: str
    what: str
    about: str


class Journal(logging.Handler):
    """See the module's docstring. It listens to the log until it is closed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: deque[LoggedError] = deque(maxlen=ERRORS_KEPT)
        self.actions: deque[LoggedAction] = deque(maxlen=ACTIONS_KEPT)
        self.addFilter(Sparing())
        logging.getLogger().addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        text = record.getMessage()[:TEXT_CHARS_MAX]
        self.errors.append(LoggedError(record.created, record.levelno >= logging.ERROR, text))

    def note(self, who: str, what: str, about: str = "") -> None:
        """An admin had that done; it is logged, too."""
        self.actions.append(LoggedAction(time.time(), who, what, about))
        log.info("%s had it done from the page: %s %s", who, what, about)

    def close(self) -> None:
        """Listen no longer; closing twice is harmless."""
        logging.getLogger().removeHandler(self)
        super().close()
