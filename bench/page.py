"""How smoothly an answer grows in the page: the frames of a browser while 2,000 tokens of Markdown come.

    python bench/page.py [--json]

A real server streams scripted answers to Debian's Chromium: one with headings, a table, lists and code, and
three that are one long table, list or block of code. Measured is the time between frames, in turns with the
same page at rest: on a machine that does other work, the frames at rest show how much of the longest one is
not the page's own. So does the CPU time of the longest task of the page's main thread, which other processes
hardly change: a frame cannot be shorter than it. It is taken in a round of its own, as tracing takes time.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from scripted_service import ScriptedService, scripted

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

ROW = "| Lyon | 12 | a cell with *some* words in it |\n"
HEAD = "| Town | Count | Remark |\n|---|---:|---|\n"
CODE = "    total += measure(sample[1], scale=0.12)  # a line of code\n"
MIXED = (
    "## A heading\n\nA paragraph with **bold** words, `code` and a [link](https://a.example/path). "
    "It goes on for a while, as answers do, and says little.\n\n- one\n- two\n  - three\n\n"
    f"{HEAD}{ROW * 25}\n```python\ndef run(sample):\n    total = 0\n{CODE * 40}    return total\n```\n\n"
)


def answer(part: str, head: str = "") -> str:
    """Markdown of about TOKENS tokens."""
    text = head + part * (TOKENS * CHARS // len(part) + 1)
    return "".join(f"{line}[say]" for line in text[: TOKENS * CHARS].splitlines(keepends=True))


ANSWERS = {
    "mixed": answer(MIXED),
    "table": answer(ROW, HEAD),
    "list": answer("- an item with **bold** words and `code`, a sentence long\n  - below it\n\n"),
    "code": answer(CODE, "```python\n"),
}


def grow(page: Page, service: ScriptedService, text: str) -> None:
    """Have an answer come, to its end."""
    service.script = [text]
    page.keyboard.press("Control+Shift+O")
    page.locator(".composer textarea").fill("Go")
    page.evaluate(FRAMES)
    page.keyboard.press("Enter")
    page.locator(".message.assistant .actions").wait_for(timeout=300_000)


def frames(page: Page) -> tuple[float, float]:
    """The median and the longest time between two frames since they were counted, in ms."""
    found = page.evaluate("window.frames_ms.slice(1)")
    return statistics.median(found), max(found)


def longest_task_ms(trace: bytes) -> float:
    """CPU time of the longest task of the page's main thread, in a trace of Chromium."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    names = {
        (each["pid"], each["tid"]): each["args"]["name"]
        for each in events
        if each.get("name") == "thread_name"
    }
    tasks = (
        each["tdur"]
        for each in events
        if each["name"].endswith("RunTask")
        and "tdur" in each
        and names.get((each["pid"], each["tid"])) == "CrRendererMain"
    )
    return max(tasks) / 1000


def measure(browser: Browser, page: Page, service: ScriptedService, name: str) -> dict[str, Any]:
    """The figures of one answer."""
    rest: list[tuple[float, float]] = []
    grows: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        page.evaluate(FRAMES)
        page.wait_for_timeout(REST_MS)
        rest.append(frames(page))
        grow(page, service, ANSWERS[name])
        grows.append(frames(page))
    browser.start_tracing(page=page, categories=["toplevel"])
    grow(page, service, ANSWERS[name])
    task_ms = longest_task_ms(browser.stop_tracing())
    found: dict[str, Any] = {"case": name, "load": round(os.getloadavg()[0], 1)}
    for prefix, measured in (("", grows), ("rest_", rest)):
        median, worst = (statistics.median(each) for each in zip(*measured, strict=True))
        found |= {f"{prefix}frame_ms": round(median, 1), f"{prefix}longest_frame_ms": round(worst, 1)}
    return found | {"longest_task_cpu_ms": round(task_ms, 1)}


def main() -> None:
    starter = Path(
        os.environ.get("CORDEE_TEST_STARTER") or Path(sys.prefix) / "share" / "cordee" / "starter.gguf"
    )
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
        for name in ANSWERS:
            found = measure(browser, page, service, name)
            if "--json" in sys.argv[1:]:
                print(json.dumps(found), flush=True)
            else:
                print(
                    "{case:6} median frame {frame_ms:5.1f} ms, longest {longest_frame_ms:6.1f} ms (at rest "
                    "{rest_longest_frame_ms:6.1f}), longest task {longest_task_cpu_ms:5.1f} ms of CPU, load "
                    "{load}".format(**found),
                    flush=True,
                )
        browser.close()


if __name__ == "__main__":
    main()
