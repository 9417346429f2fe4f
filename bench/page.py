"""How smoothly an answer grows in the page: the frames of a browser while 2,000 tokens of Markdown come.

    python bench/page.py [--json]

A real server streams a scripted answer with headings, a table, lists and code to Debian's Chromium. What is
measured is the time between frames, in turns with the same page at rest: on a machine that does other work,
the frames at rest show how much of the longest one is not the page's own.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from scripted_service import scripted

TOKENS = 2000
ROUNDS = 3
TOKENS_PER_SECOND = 200
CHARS = 7  # of a token of the scripted service
REST_MS = 3000
CHROMIUM = "/usr/bin/chromium"

FRAMES = """() => {
  window.frames_ms = []; let last = performance.now();
  const next = (now) => {
    window.frames_ms.push(now - last); last = now; window.going = requestAnimationFrame(next);
  };
  cancelAnimationFrame(window.going); window.going = requestAnimationFrame(next);
}"""


def answer() -> str:
    """Markdown of about TOKENS tokens."""
    row = "| Lyon | 12 | a cell with *some* words in it |\n"
    code = "".join(
        f"    total += measure(sample[{line}], scale=0.{line})  # line {line}\n" for line in range(40)
    )
    part = (
        "## A heading\n\nA paragraph with **bold** words, `code` and a [link](https://a.example/path). "
        "It goes on for a while, as answers do, and says little.\n\n- one\n- two\n  - three\n\n"
        f"| Town | Count | Remark |\n|---|---:|---|\n{row * 25}\n"
        f"```python\ndef run(sample):\n    total = 0\n{code}    return total\n```\n\n"
    )
    text = part * (TOKENS * CHARS // len(part) + 1)
    return "".join(f"{line}[say]" for line in text[: TOKENS * CHARS].splitlines(keepends=True))


def longest(page: Page) -> tuple[float, float]:
    """The median and the longest time between two frames since they were counted, in ms."""
    frames = page.evaluate("window.frames_ms.slice(1)")
    return statistics.median(frames), max(frames)


def main() -> None:
    starter = Path(
        os.environ.get("CORDEE_TEST_STARTER") or Path(sys.prefix) / "share" / "cordee" / "starter.gguf"
    )
    rest: list[tuple[float, float]] = []
    grows: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        scripted(starter, Path(folder), patch) as (server, service),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"http://127.0.0.1:{server.port}/")
        service.pause_seconds = 1 / TOKENS_PER_SECOND
        for _ in range(ROUNDS):
            page.evaluate(FRAMES)
            page.wait_for_timeout(REST_MS)
            rest.append(longest(page))
            service.script = [answer()]
            page.keyboard.press("Control+Shift+O")
            page.locator(".composer textarea").fill("Go")
            page.evaluate(FRAMES)
            page.keyboard.press("Enter")
            page.locator(".message.assistant .actions").wait_for(timeout=300_000)
            grows.append(longest(page))
        browser.close()
    for name, measured in (("at rest", rest), ("answer grows", grows)):
        median, worst = (statistics.median(each) for each in zip(*measured, strict=True))
        if "--json" in sys.argv[1:]:
            print(
                json.dumps({"case": name, "frame_ms": round(median, 1), "longest_frame_ms": round(worst, 1)})
            )
        else:
            print(
                f"{name:14} median frame {median:6.1f} ms, longest {worst:6.1f} ms "
                f"(medians of {ROUNDS} rounds)"
            )


if __name__ == "__main__":
    main()
