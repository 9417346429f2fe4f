"""`--log-file`: what a server did, with times and levels, and nothing of what was asked."""

import json
import logging
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cordee.agent import logs
from cordee.errors import StorageFailed
from cordee.serving.local_service import ServiceConfig
from serving import CHAT, HELLO, running, user

SECRET = "the-name-of-the-patient"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("cordee")
    handlers, level = list(root.handlers), own.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    own.setLevel(level)


def fault() -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        logging.getLogger("cordee.test").exception("it failed:\n%s", "twice")


def test_lines_have_times_levels_and_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "cordee.log"
    logs.begin(path)
    fault()
    first, second, *trace = path.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR cordee\.test: it failed:", first), (
        first
    )
    assert second == "twice" and trace[-1] == "ValueError: no such thing"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_json_lines_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "cordee.log"
    logs.begin(path, "json")
    fault()
    logging.getLogger("cordee.test").info("é")
    logging.getLogger("elsewhere").info("not ours")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["level"], first["logger"], first["message"]) == (
        "ERROR",
        "cordee.test",
        "it failed:\ntwice",
    )
    assert first["traceback"].endswith("ValueError: no such thing")
    assert (second["level"], second["message"]) == ("INFO", "é") and "traceback" not in second
    assert second["time"].endswith("Z")


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="cannot be written"):
        logs.begin(tmp_path / "nowhere" / "cordee.log")


def test_a_log_tells_what_was_done_and_nothing_of_what_was_asked(
    starter_path: Path, session_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cordee.log"
    logs.begin(path)
    with running(starter_path, tmp_path / "store", config=ServiceConfig(context=256, sequences=1)) as server:
        for change in ({}, {"temperature": 9}, {"messages": [{"role": "user", "content": {"x": SECRET}}]}):
            body = {**HELLO, "messages": user(SECRET), "max_tokens": 4, **change}
            server.request("POST", CHAT, body)
        server.request("POST", "/infill", {"input_prefix": SECRET, "input_suffix": SECRET})
        server.request("POST", "/tokenize", {"content": SECRET})
    log = path.read_text()
    assert re.search(r"Z INFO cordee\.\S+: starter: layers 0 to 29 loaded \(process \d+\)", log), log
    assert SECRET not in log
