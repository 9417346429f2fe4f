"""The pages of the machines, of a machine by itself: who may only look, and who may change things."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from axe import violations
from cordee.access.api_keys import ApiKey
from cordee.access.keyring import Keyring, new_key
from cordee.access.ledger import Ledger
from cordee.access.local_key import LocalKey
from cordee.api.authenticator import Authenticator
from serving import running


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, str]]]:
    """A machine that wants a key of everybody, and the keys of marie, who may ask, and of chef, an admin."""
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path))
    keys: list[ApiKey] = []
    shown: dict[str, str] = {}
    for name, is_admin in (("marie", False), ("chef", True)):
        key, shown[name] = new_key(name, keys, admin=is_admin)
        keys.append(key)
    authenticator = Authenticator(Keyring(lambda: keys), Ledger(tmp_path), LocalKey.made())
    with running(None, tmp_path / "models", authenticator=authenticator) as server:
        yield f"http://127.0.0.1:{server.port}", shown


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Go on").click()


def test_marie_may_look_and_chef_may_change(house: tuple[str, dict[str, str]], visit: Any) -> None:
    base, keys = house
    page = visit(base, "/models")
    sign_in(page, keys["marie"])
    expect(page.get_by_text("You can look around here.")).to_be_visible()
    assert page.get_by_role("button", name="Fetch").count() == 0
    page.get_by_text("Does it fit here?").first.click()
    expect(page.get_by_text("It fits on one machine")).to_be_visible()
    navigation = page.get_by_role("navigation")
    navigation.get_by_role("link", name="Machines").click()
    expect(page.locator("svg .machine")).to_have_count(1)
    expect(page.get_by_text("The machine works. No model is in use.")).to_be_visible()
    navigation.get_by_role("link", name="Administration").click()
    expect(page.get_by_text("The key of marie does not open this page.")).to_be_visible()
    assert violations(page, visit.faults) == []
    sign_in(page, keys["chef"])
    expect(page.get_by_text("This machine works by itself.")).to_be_visible()
    expect(page.get_by_role("region", name="What was used").get_by_text("marie")).to_be_visible()
    navigation.get_by_role("link", name="Models").click()
    expect(page.get_by_role("button", name="Fetch").first).to_be_visible()
