"""axe-core (tests/web/vendor): what keeps people from using a page that they see in another way, or not."""

from pathlib import Path

from playwright.sync_api import Page

AXE = Path(__file__).resolve().parents[1] / "web" / "vendor" / "axe.min.js"


def violations(page: Page, faults: list[str]) -> list[str]:
    """The rules that a page breaks, with what breaks them. It comes in by the debugger, past the policy.

    What axe itself does against the policy is taken out of the page's `faults`.
    """
    before = len(faults)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run()")["violations"]
    faults[before:] = [each for each in faults[before:] if "Content Security Policy" not in each]
    return [f"{rule['id']}: {[node['html'][:200] for node in rule['nodes']]}" for rule in found]
