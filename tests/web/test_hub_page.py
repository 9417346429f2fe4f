"""A model of the hub that is used without being fetched as a whole, from the page."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from cluster_processes import Cluster, until
from fake_hub import FakeHub
from page_words import Reader

pytestmark = pytest.mark.slow
SOURCE = "o/Small-GGUF"


@pytest.fixture
def hub(starter_path: Path) -> Iterator[FakeHub]:
    made = FakeHub({SOURCE: {"small-Q4_K_M.gguf": starter_path.read_bytes()}})
    yield made
    made.close()


@pytest.fixture
def cluster(short_path: Path, hub: FakeHub) -> Iterator[Cluster]:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    with closing(Cluster(short_path, None, "--scouting", "off")) as cluster:
        cluster.add("a", environment=environment)
        yield cluster


def test_a_model_is_used_straight_from_the_hub(
    cluster: Cluster, hub: FakeHub, visit: Any, reader: Reader
) -> None:
    t, node = reader.t, cluster.nodes["a"]
    page = visit(node.do("open").strip().rstrip("/"), "/models", **reader.view)
    page.get_by_label(t("models.another.name")).fill("none")
    page.get_by_role("button", name=t("models.hub"), exact=True).click()
    expect(page.get_by_role("dialog")).to_have_count(0)  # that is no name of a model there
    page.get_by_label(t("models.another.name")).fill(SOURCE)
    hub.slow = True  # so that it is seen how far it is
    page.get_by_role("button", name=t("models.hub"), exact=True).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(re.compile(t("common.fit.alone", speed=".*")))
    expect(dialog).to_contain_text(t("models.hub.body"))
    dialog.get_by_role("button", name=t("models.deploy"), exact=True).click()
    expect(page.get_by_text(t("models.hub.reading", node="a"))).to_be_visible()
    expect(page.get_by_role("progressbar")).to_be_visible()
    served = page.get_by_role("region", name=t("models.served"), exact=True)
    expect(served.get_by_text(t("common.model.serving"))).to_be_visible()
    until(lambda: node.model("Small")["state"] == "serving")
    assert "Small" not in node.do("ls")
