"""The pages of the map, the models and the administration, on a real cluster of processes."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from axe import violations
from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from cordee.net import enrolment
from qr import read_qr

COUNT = [{"role": "user", "content": "Tell me a very long story about a mountain."}]
WORDS = {
    "en-GB": {
        "works": "All 3 machines work. All models are being served.",
        "state": "works",
        "table": "All machines",
        "served": "In use",
        "more": "To fetch",
        "keys": "People’s keys",
        "label": re.compile("Map: 3 machines"),
    },
    "fr-FR": {
        "works": "Les 3 machines sont en service. Tous les modèles sont en service.",
        "state": "en service",
        "table": "Toutes les machines",
        "served": "Utilisés",
        "more": "À récupérer",
        "keys": "Clés des personnes",
        "label": re.compile("Plan : 3 machines"),
    },
}
SEEN = [
    ("en-GB", "desk", "light"),
    ("fr-FR", "phone", "dark"),
    pytest.param("en-GB", "phone", "dark", marks=pytest.mark.slow),
    pytest.param("fr-FR", "desk", "dark", marks=pytest.mark.slow),
]

Visit = Any  # a function with `faults`: see conftest.py


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Iterator[Cluster]:
    """office (admin, has the model), pc-1 and pc-2; two of them serve the starter model."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), starter_path, "--memory", MEMORY, "--scouting", "off")
    try:
        made.add("office")
        for name in ("pc-1", "pc-2"):
            made.add(name, "--peer", f"127.0.0.1:{made.port}")
        made.nodes["office"].do("deploy", "starter", *SERVED)
        yield made
    finally:
        made.close()


@pytest.fixture
def office(cluster: Cluster) -> Node:
    """The node whose pages are looked at; the model is served."""
    node = cluster.nodes["office"]
    until(lambda: node.model("starter")["state"] == "serving")
    return node


def base(node: Node) -> str:
    return node.asked("/nodes")["nodes"][0]["api"].removesuffix("/v1")


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=re.compile(rf"^{name}\b")))


def confirm(page: Page, action: str) -> None:
    """Press the button of the dialog, and wait until it is done."""
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize(("language", "size", "theme"), SEEN)
def test_the_map_shows_the_machines_to_everybody(
    office: Node, visit: Visit, language: str, size: str, theme: str
) -> None:
    page, words = visit(base(office), "/cluster", language=language, size=size, theme=theme), WORDS[language]
    expect(page.get_by_text(words["works"])).to_be_visible()
    expect(page.get_by_role("img", name=words["label"])).to_be_visible()
    expect(page.locator("svg .machine")).to_have_count(3)
    expect(page.locator("svg .road")).to_have_count(2)  # there, and back to the first stage
    table = page.get_by_role("group", name=words["table"])
    for name in ("office", "pc-1", "pc-2"):
        expect(row(page, name).get_by_text(words["state"], exact=True)).to_be_visible()
    expect(table.get_by_text("starter")).to_have_count(2)
    expect(table.get_by_text(re.compile(r"\d ms"))).to_have_count(6)
    assert violations(page, visit.faults) == []
    wide = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(wide) <= 0


@pytest.mark.parametrize(("language", "size", "theme"), SEEN)
def test_models_and_administration_are_there_for_everybody(
    office: Node, visit: Visit, language: str, size: str, theme: str
) -> None:
    page, words = visit(base(office), "/models", language=language, size=size, theme=theme), WORDS[language]
    expect(page.get_by_role("region", name=words["served"]).get_by_text("starter").first).to_be_visible()
    expect(page.get_by_role("region", name=words["more"]).get_by_role("listitem").first).to_be_visible()
    assert violations(page, visit.faults) == []
    page.goto(base(office) + "/admin")
    expect(page.get_by_role("region", name=words["keys"])).to_be_visible()
    expect(row(page, "pc-2")).to_be_visible()
    assert violations(page, visit.faults) == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.slow
def test_tokens_move_while_somebody_is_answered(office: Node, visit: Visit) -> None:
    page, ended = visit(base(office), "/cluster"), threading.Event()

    def ask() -> None:
        with office.client() as client:
            for _ in client.chat.completions.create(
                model="starter", messages=COUNT, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            ):
                if ended.is_set():
                    return

    expect(page.locator("svg .machine")).to_have_count(3)
    assert page.locator("svg .token").count() == 0
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        expect(page.locator("svg .token").first).to_be_attached()
        expect(page.get_by_text(re.compile(r"1 of 4 places taken.* now \d+ tokens/s"))).to_be_visible()
    finally:
        ended.set()
        asking.join()
    expect(page.locator("svg .token")).to_have_count(0)


@pytest.mark.slow
def test_why_it_runs_there_is_in_the_planners_words(office: Node, visit: Visit) -> None:
    page = visit(base(office), "/cluster")
    page.get_by_text("Why there?").click()
    expect(page.get_by_text("It fits when 2 machines share it")).to_be_visible()
    for name in ("office", "pc-1", "pc-2"):
        expect(row(page, name).first.get_by_role("cell", name="no", exact=True)).to_be_visible()
    page.get_by_text("In the planner’s words").click()
    planned = json.loads(office.do("plan", "starter", *SERVED, "--json"))
    expect(page.get_by_text(planned["why"])).to_be_visible()
    for machine in planned["machines"]:
        expect(page.get_by_text(f"{machine['name']}: {machine['why']}")).to_be_visible()


@pytest.mark.slow
def test_a_model_is_judged_fetched_used_and_removed(office: Node, visit: Visit) -> None:
    page = visit(base(office), "/models")
    story = page.get_by_role("listitem").filter(
        has=page.get_by_role("heading", name=re.compile("story-small"))
    )
    story.get_by_role("button", name="Fetch").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text(re.compile("It fits on one machine: about [\\d,.]+ tokens/s"))).to_be_visible()
    assert dialog.get_by_role("row").count() == 5  # a head, three machines, all together
    assert "story-small" not in office.do("ls")
    confirm(page, "Fetch")
    idle = page.get_by_role("region", name="Here, not in use")
    expect(idle.get_by_role("button", name="Use")).to_be_visible()
    assert "story-small" in office.do("ls")
    idle.get_by_role("button", name="Use").click()
    dialog.get_by_role("checkbox", name="pc-1").check()
    assert violations(page, visit.faults) == []
    confirm(page, "Use")
    expect(page.get_by_text("story-small is being loaded")).to_be_visible()
    served = page.get_by_role("region", name="In use")
    mine = served.get_by_role("listitem").filter(has_text="story-small")
    expect(mine.get_by_text("serving")).to_be_visible()
    expect(mine.get_by_text("only on pc-1")).to_be_visible()
    [placement] = office.model("story-small")["placements"]
    assert [stage["name"] for stage in placement["stages"]] == ["pc-1"]
    mine.get_by_role("button", name="Change").click()
    expect(dialog.get_by_role("checkbox", name="pc-1")).to_be_checked()
    dialog.get_by_role("checkbox", name="pc-2").check()
    dialog.get_by_label("Copies, each on other machines").fill("2")
    confirm(page, "Change")
    expect(mine.get_by_text("2 copies")).to_be_visible()
    until(lambda: len(office.model("story-small")["placements"]) == 2)
    used = {each["stages"][0]["name"] for each in office.model("story-small")["placements"]}
    assert used == {"pc-1", "pc-2"}
    mine.get_by_role("button", name="Stop using").click()
    confirm(page, "Stop using")
    expect(idle.get_by_text("story-small").first).to_be_visible()
    idle.get_by_role("button", name="Remove").click()
    expect(page.get_by_role("dialog").get_by_text("No other machine has the whole model")).to_be_visible()
    assert violations(page, visit.faults) == []
    confirm(page, "Remove")
    expect(page.get_by_text("story-small is removed from this machine.")).to_be_visible()
    assert "story-small" not in office.do("ls")


@pytest.mark.slow
def test_machines_and_people_are_let_in(office: Node, visit: Visit) -> None:
    page = visit(base(office), "/admin", permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Make an invitation").click()
    confirm(page, "Make an invitation")
    code = page.get_by_role("group", name="Invitation").locator("code").first.inner_text()
    assert enrolment.read_code(code).addresses
    assert read_qr(page.get_by_role("img", name="The invitation as a QR code")) == code
    page.get_by_label("For whom, or what").fill("marie")
    page.get_by_label("Questions at once").fill("2")
    page.get_by_label("Tokens a minute").fill("9000")
    page.get_by_role("button", name="Make a key").click()
    confirm(page, "Make a key")
    shown = page.get_by_role("group", name=re.compile("Key of marie"))
    key = shown.locator("code").inner_text()
    shown.get_by_role("button", name="Copy").click()
    expect(shown.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    assert read_qr(shown.get_by_role("img")) == key
    assert violations(page, visit.faults) == []
    expect(row(page, "marie").get_by_text("2 questions at once, 9,000 tokens a minute")).to_be_visible()
    row(page, "marie").get_by_role("button", name="Change the limit").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Tokens a minute")).to_have_value("9000")
    dialog.get_by_label("Questions at once").fill("")
    dialog.get_by_label("Tokens a minute").fill("500")
    assert violations(page, visit.faults) == []
    confirm(page, "Change the limit")
    expect(page.get_by_text("The limit of marie is now: 500 tokens a minute.")).to_be_visible()
    assert json.loads(office.do("key", "ls", "--json"))[0]["limit"] == "tokens=500/min"
    row(page, "marie").get_by_role("button", name="Change the limit").click()
    dialog.get_by_label("Tokens a minute").fill("")
    confirm(page, "Change the limit")
    expect(page.get_by_text("marie has no limit any more.")).to_be_visible()
    with office.client() as client:
        marie = client.with_options(api_key=key)
        marie.chat.completions.create(model="starter", messages=COUNT, max_tokens=2)
    usage = page.get_by_role("region", name="What was used")
    expect(usage.get_by_role("row").filter(has_text="marie")).to_be_visible()
    row(page, "marie").get_by_role("button", name="Revoke").click()
    confirm(page, "Revoke")
    expect(page.get_by_text("The key of marie is revoked.")).to_be_visible()
    expect(
        page.get_by_role("region", name="People’s keys").get_by_text("There is no key yet.")
    ).to_be_visible()
    page.reload()
    expect(page.get_by_role("region", name="People’s keys")).to_be_visible()
    assert key not in page.content()
    expect(page.get_by_text("this machine, without a key made a key for marie.")).to_be_visible()


@pytest.mark.slow
def test_another_machine_is_given_no_work(cluster: Cluster, office: Node, visit: Visit) -> None:
    page = visit(base(office), "/admin")
    used = {stage["name"] for stage in office.model("starter")["placements"][0]["stages"]}
    busy = next(name for name in ("pc-2", "pc-1") if name in used)
    row(page, busy).get_by_role("button", name="Give it no work").click()
    confirm(page, "Give it no work")
    expect(page.get_by_text(f"{busy} takes no more work")).to_be_visible()
    expect(row(page, busy).get_by_text("takes no work")).to_be_visible()
    assert cluster.nodes[busy].asked("/nodes")["nodes"][0]["draining"]
    expect(row(page, busy).get_by_text("starter")).to_have_count(0)  # it moved
    row(page, busy).get_by_role("button", name="Give it work again").click()
    confirm(page, "Give it work again")
    expect(row(page, busy).get_by_text("works")).to_be_visible()


def test_a_machine_that_falls_is_seen_and_what_it_ran_is_healed(
    cluster: Cluster, office: Node, visit: Visit
) -> None:
    page = visit(base(office), "/cluster")
    expect(page.locator("svg .machine")).to_have_count(3)
    used = {stage["name"] for stage in office.model("starter")["placements"][0]["stages"]}
    lost = next(name for name in ("pc-1", "pc-2") if name in used)
    other = ({"pc-1", "pc-2"} - {lost}).pop()
    process = cluster.nodes[lost].process
    process.kill()
    process.wait()
    expect(page.get_by_text(f"{lost} does not answer.")).to_be_visible()
    expect(row(page, lost).get_by_text("gone", exact=True)).to_be_visible()
    expect(page.locator("svg .machine.gone")).to_have_count(1)
    expect(page.get_by_text("All models are being served.")).to_be_visible()
    expect(row(page, other).get_by_text("starter")).to_be_visible()
    lately = page.get_by_role("region", name="What changed lately")
    for said in (
        f"{lost} is gone.",
        f"starter is to run on .*{other}",
        f"starter is being served by .*{other}",
    ):
        expect(lately.get_by_text(re.compile(said)).first).to_be_visible()
    slider = page.get_by_role("slider")
    slider.focus()
    slider.press("Home")  # with the keyboard alone
    expect(page.get_by_text("This is how it was from")).to_be_visible()
    expect(page.locator("svg .machine.gone")).to_have_count(0)
    assert violations(page, visit.faults) == []
    page.get_by_role("button", name="Now", exact=True).click()
    expect(page.locator("svg .machine.gone")).to_have_count(1)
    page.goto(base(office) + "/admin")
    row(page, lost).get_by_role("button", name="Remove").click()
    confirm(page, "Remove")
    expect(page.get_by_text(f"{lost} is removed for good.")).to_be_visible()
    expect(row(page, lost)).to_have_count(0)
