"""The examples of docs/clients.md, as a test runs them: with its own server for the one of the page."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
SERVER = "http://127.0.0.1:8321"


def example(heading: str, port: int) -> str:
    """The first example under a heading, for a server at `port`."""
    _, found, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{PAGE.name} has no {heading}"
    code = re.search(r"^```\w+\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert code is not None, f"{heading} has no example"
    assert SERVER in code[1]
    return code[1].replace(SERVER, f"http://127.0.0.1:{port}")
