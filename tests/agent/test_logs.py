"""The log of an agent: whatever others say, it has no more than so many lines a minute."""

import logging

from cordee.agent.logs import LINES_MAX, MINUTE_SECONDS, Sparing


def test_of_each_kind_only_so_many_lines_are_written_in_a_minute() -> None:
    sparing = Sparing()

    def written(line: int, created: float) -> list[str]:
        record = logging.LogRecord("x", logging.WARNING, "file.py", line, "%s 100%%", ("said",), None)
        record.created = created
        return [record.getMessage()] if sparing.filter(record) else []

    lines = [text for _ in range(5 * LINES_MAX) for text in written(1, 1000.0)]
    assert lines[:-1] == ["said 100%"] * (LINES_MAX - 1)
    assert lines[-1] == "said 100% (more of these are left out for a minute)"
    assert written(2, 1001.0) == ["said 100%"]  # another kind
    assert written(1, 1000.0 + MINUTE_SECONDS) == ["said 100%"]
    assert written(1, 10.0) == ["said 100%"]  # the clock was set back
