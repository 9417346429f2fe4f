"""The log of `serve` and `up`: lines with times and levels, of each kind only so many a minute.

What other nodes say decides how often some lines are logged, and a log ends up on a disk. Nothing that users
wrote, or models answered, is ever logged.
"""

import json
import logging
from collections import Counter
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from cordee.files import storage_failed

Form = Literal["text", "json"]
FILE_BYTES_MAX, FILES_KEPT = 10 << 20, 3  # weeks of a node that has trouble every minute
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


class _Text(logging.Formatter):
    """`2026-11-30T11:12:13.456Z WARNING cordee.worker.stages: a sentence`; below it a traceback, if there is
    one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _when(record)


class _Json(logging.Formatter):
    """An object on a line of its own: `time`, `level`, `logger`, `message`; `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _when(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def begin(path: Path | None = None, form: Form = "text") -> None:
    """Log from now on: warnings on standard error; or to a file, what the program does as well.

    The file holds FILE_BYTES_MAX bytes; when it is full it goes on under a name with .1 behind, and so on up
    to FILES_KEPT. Only its owner may read it.

    Raises:
        StorageFailed: the file cannot be written.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setLevel(logging.WARNING)
    if path is not None:
        handlers.append(_file(path))
        logging.getLogger("cordee").setLevel(logging.INFO)
    for handler in handlers:
        handler.addFilter(Sparing())
        handler.setFormatter(_Json() if form == "json" else _Text())
        root.addHandler(handler)


def _file(path: Path) -> logging.Handler:
    try:
        path.touch(mode=0o600)
        return RotatingFileHandler(path, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, encoding="utf-8")
    except OSError as error:
        raise storage_failed(path, error, "cannot be written") from error


def _when(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
