"""The pages of the map, the models and the administration, on a real cluster of processes."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from axe import violations
from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from cordee.net import enrolment
from page_words import Reader
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


def roomiest(node: Node) -> list[str]:
    """The names of the machines, those with most memory left first."""

    def left(each: dict[str, Any]) -> int:
        lent = sum(device["memory_bytes"] for device in each["devices"])
        return lent - sum(stage["bytes"] for stage in each["stages"])

    return [each["name"] for each in sorted(node.asked("/nodes")["nodes"], key=left, reverse=True)]


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
def test_why_it_runs_there_is_in_the_planners_words(office: Node, visit: Visit, reader: Reader) -> None:
    t = reader.t
    page = visit(base(office), "/cluster", **reader.view)
    page.get_by_text(t("cluster.why")).click()
    expect(page.locator(".verdict > p").first).to_contain_text(
        t("common.fit.shared", count=2).partition("{speed}")[0]
    )
    for name in ("office", "pc-1", "pc-2"):
        expect(row(page, name).first.get_by_role("cell", name=t("common.no"), exact=True)).to_be_visible()
    page.get_by_text(t("common.fit.why"), exact=True).click()
    planned = json.loads(office.do("plan", "starter", *SERVED, "--json"))
    said = page.locator(".verdict details")
    if reader.language == "en":
        expect(said).to_contain_text(planned["why"])
        for machine in planned["machines"]:
            expect(said).to_contain_text(f"{machine['name']}: {machine['why']}")
    else:  # tests/web/test_said.py shows that it says the same
        expect(said.locator("p")).to_contain_text("de mémoire en tout.")
    expect(said.locator("[lang=en]")).to_have_count(4 if reader.language == "en" else 0)


def test_energy_is_told_where_it_is_measured(office: Node, visit: Visit, reader: Reader) -> None:
    """Few machines measure theirs: here it is put into what the server says."""
    t = reader.t

    def measured(route: Route) -> None:
        headers = {name: text for name, text in route.request.headers.items() if name != "if-none-match"}
        found = route.fetch(headers=headers)
        told = found.json()
        told["watts"] = 42.4
        told["nodes"][0]["watts"] = 42.4
        route.fulfill(response=found, json=told)

    page = visit(base(office), "/", **reader.view)
    page.route("**/console/overview", measured)
    page.get_by_role("link", name=t("shell.page.cluster"), exact=True).click()
    watts = t("common.watts", value=42)
    expect(page.get_by_text(t("cluster.health.watts", watts=watts))).to_be_visible()
    expect(page.get_by_role("columnheader", name=t("cluster.power"))).to_be_attached()
    expect(row(page, "office").get_by_role("cell", name=watts, exact=True)).to_be_attached()
    expect(page.locator("svg .machine").first).to_contain_text(watts)


@pytest.mark.slow
def test_a_model_is_judged_fetched_used_and_removed(office: Node, visit: Visit, reader: Reader) -> None:
    t = reader.t
    page = visit(base(office), "/models", **reader.view)
    story = page.get_by_role("listitem").filter(
        has=page.get_by_role("heading", name=re.compile("story-small"))
    )
    story.get_by_role("button", name=t("models.pull")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(re.compile(t("common.fit.alone", speed="[\\d,.\u202f]+ .*/s")))
    assert dialog.get_by_role("row").count() == 5  # a head, three machines, all together
    assert "story-small" not in office.do("ls")
    confirm(page, t("models.pull"))
    idle = page.get_by_role("region", name=t("models.idle"))
    expect(idle.get_by_role("button", name=t("models.deploy"), exact=True)).to_be_visible()
    assert "story-small" in office.do("ls")
    idle.get_by_role("button", name=t("models.deploy"), exact=True).click()
    first, second, _ = roomiest(office)
    dialog.get_by_role("checkbox", name=first).check()
    assert violations(page, visit.faults) == []
    confirm(page, t("models.deploy"))
    expect(page.get_by_text(t("models.deploy.said", name="story-small"))).to_be_visible()
    served = page.get_by_role("region", name=t("models.served"), exact=True)
    mine = served.get_by_role("listitem").filter(has_text="story-small")
    expect(mine.get_by_text(t("common.model.serving"))).to_be_visible()
    expect(mine.get_by_text(t("models.only", names=first))).to_be_visible()
    [placement] = office.model("story-small")["placements"]
    assert [stage["name"] for stage in placement["stages"]] == [first]
    mine.get_by_role("button", name=t("models.change"), exact=True).click()
    expect(dialog.get_by_role("checkbox", name=first)).to_be_checked()
    dialog.get_by_role("checkbox", name=second).check()
    dialog.get_by_label(t("models.copies.label")).fill("2")
    confirm(page, t("models.change"))
    expect(mine.get_by_text(t("models.copies", count=2))).to_be_visible()
    changed = office.model("story-small")
    assert (changed["replicas"], set(changed["only"])) == (2, {first, second})
    mine.get_by_role("button", name=t("models.undeploy")).click()
    confirm(page, t("models.undeploy"))
    expect(idle.get_by_text("story-small").first).to_be_visible()
    idle.get_by_role("button", name=t("models.remove")).click()
    expect(dialog.get_by_text(t("models.remove.last"))).to_be_visible()
    assert violations(page, visit.faults) == []
    confirm(page, t("models.remove"))
    expect(page.get_by_text(t("models.remove.said", name="story-small"))).to_be_visible()
    assert "story-small" not in office.do("ls")


@pytest.mark.slow
def test_machines_and_people_are_let_in(office: Node, visit: Visit, reader: Reader) -> None:
    t = reader.t
    page = visit(base(office), "/admin", **reader.view, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=t("admin.invite")).click()
    confirm(page, t("admin.invite"))
    code = page.get_by_role("group", name=t("admin.invite.code")).locator("code").first.inner_text()
    assert enrolment.read_code(code).addresses
    assert read_qr(page.get_by_role("img", name=t("admin.invite.qr"))) == code
    page.get_by_label(t("admin.key.for")).fill("marie")
    page.get_by_label(t("admin.key.requests")).fill("2")
    page.get_by_label(t("admin.key.tokens")).fill("900")
    page.get_by_role("button", name=t("admin.key.make")).click()
    confirm(page, t("admin.key.make"))
    shown = page.get_by_role("group", name=t("admin.key.once", name="marie"))
    key = shown.locator("code").inner_text()
    shown.get_by_role("button", name=t("admin.copy"), exact=True).click()
    expect(shown.get_by_role("button", name=t("admin.copied"))).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    assert read_qr(shown.get_by_role("img")) == key
    assert violations(page, visit.faults) == []
    bounds = f"{t('admin.limit.requests.other', count=2)}, {t('admin.limit.tokens.other', count=900)}"
    expect(row(page, "marie").get_by_text(bounds)).to_be_visible()
    row(page, "marie").get_by_role("button", name=t("admin.limit")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label(t("admin.key.tokens"))).to_have_value("900")
    dialog.get_by_label(t("admin.key.requests")).fill("")
    dialog.get_by_label(t("admin.key.tokens")).fill("500")
    assert violations(page, visit.faults) == []
    confirm(page, t("admin.limit"))
    limit = t("admin.limit.tokens.other", count=500)
    expect(page.get_by_text(t("admin.limit.said", name="marie", limit=limit))).to_be_visible()
    assert json.loads(office.do("key", "ls", "--json"))[0]["limit"] == "tokens=500/min"
    row(page, "marie").get_by_role("button", name=t("admin.limit")).click()
    dialog.get_by_label(t("admin.key.tokens")).fill("")
    confirm(page, t("admin.limit"))
    expect(page.get_by_text(t("admin.limit.none", name="marie"))).to_be_visible()
    with office.client() as client:
        marie = client.with_options(api_key=key)
        marie.chat.completions.create(model="starter", messages=COUNT, max_tokens=2)
    usage = page.get_by_role("region", name=t("admin.usage"))
    expect(usage.get_by_role("row").filter(has_text="marie")).to_be_visible()
    row(page, "marie").get_by_role("button", name=t("admin.revoke")).click()
    confirm(page, t("admin.revoke"))
    expect(page.get_by_text(t("admin.revoke.said", name="marie"))).to_be_visible()
    keys = page.get_by_role("region", name=t("admin.keys"))
    expect(keys.get_by_text(t("admin.keys.none"))).to_be_visible()
    page.reload()
    expect(keys).to_be_visible()
    assert key not in page.content()
    done = t("admin.action.key/add", who=t("admin.usage.here"), about="marie")
    expect(page.get_by_text(done).first).to_be_visible()


@pytest.mark.slow
def test_another_machine_is_given_no_work(
    cluster: Cluster, office: Node, visit: Visit, reader: Reader
) -> None:
    t = reader.t
    page = visit(base(office), "/admin", **reader.view)
    used = {stage["name"] for stage in office.model("starter")["placements"][0]["stages"]}
    busy = next(name for name in ("pc-2", "pc-1") if name in used)
    row(page, busy).get_by_role("button", name=t("admin.drain")).click()
    confirm(page, t("admin.drain"))
    expect(page.get_by_text(t("admin.drain.said", name=busy).partition(".")[0])).to_be_visible()
    expect(row(page, busy).get_by_text(t("common.state.draining"))).to_be_visible()
    assert cluster.nodes[busy].asked("/nodes")["nodes"][0]["draining"]
    expect(row(page, busy).get_by_text("starter")).to_have_count(0)  # it moved
    row(page, busy).get_by_role("button", name=t("admin.undrain")).click()
    confirm(page, t("admin.undrain"))
    expect(row(page, busy).get_by_text(t("common.state.alive"), exact=True)).to_be_visible()


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
