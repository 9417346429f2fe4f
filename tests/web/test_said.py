"""What the machines say in the page, in French: every sentence that they may say there is known.

The sentences are read from the sources that make them, so a new one fails here until it is translated. How
they are put together is tried with the planner itself, on clusters of all kinds.
"""

import ast
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

import cordee
from cordee.cluster import planner
from cordee.cluster.demand import SizeRequest
from cordee.cluster.facts import Device
from cordee.cluster.memory import Demand
from cordee.models.cards import cards
from cordee.web.bundle import ROOT
from plans import device, machine, made_shape
from scripted_service import ScriptedService, scripted
from serving import Running

PACKAGE = Path(cordee.__file__).parent
TABLE: dict[str, str] = json.loads((ROOT / "common" / "said.fr.json").read_text(encoding="utf-8"))
PLACE = re.compile(r"\{(?:(\w+):)?(\w+)\}")
# Who makes sentences that the page shows: the functions of a file; none: all of them.
SPEAKERS: dict[str, tuple[str, ...]] = {
    "cluster/planner.py": ("_summary", "_machine_plan", "_why_out", "_refusal"),
    "cluster/demand.py": ("shortened", "answers", "described"),
    "cluster/patience.py": ("_late",),
    "agent/status.py": ("admins", "find", "stays", "_known_shape", "_reasons", "_why_not", "_plan"),
    "agent/history.py": ("_changes", "_fault"),
    "agent/warnings.py": (),
    "agent/gossip.py": ("_note_stranger",),
    "agent/deploy.py": (),
    "agent/probes.py": ("_failure",),
    "agent/orders.py": ("drain",),
    "net/members.py": ("advice",),
    "access/limits.py": ("parse", "enter"),
    "access/keyring.py": ("new_key", "revoked", "limited", "_named"),
    "console/actions.py": (),
    "console/who.py": (),
    "console/fit.py": (),
    "console/pulls.py": ("begin", "stop"),
    "console/single_backend.py": (),
    "console/cluster_backend.py": (),
    "errors.py": ("nearest",),
}
# No sentences of the page: names, verbs, what the log gets, and parts of sentences above.
OTHERS = {
    "cordee deploy {}",
    "runs nowhere: {}",  # of these three the page has words of its own, and shows what follows
    "interrupted: {}",
    "placed: {}",
    " ({})",
    ", but {}",
    "0.2.0 or older",
    "admin add",
    "key add",
    "key limit",
    "key rm",
    " each",
    " or ",
    " and ",
    "{} answer{}",  # both forms are in the table
    "{} of {} tokens",
    "{}-{} on {}",
    " (host)",
}


def template(node: ast.AST) -> str:
    """A string as it is written, with `{}` for what differs; "" for what is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return ""


def sentences(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and form of each string with words in it, but docstrings."""
    parsed = ast.parse(path.read_text(encoding="utf-8"))
    functions = [
        node for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert set(names) <= {node.name for node in functions}, f"{path}: a function was renamed"
    chosen = [node for node in functions if not names or node.name in names]
    for function in chosen:
        documented = function.body[0].value if isinstance(function.body[0], ast.Expr) else None
        inner = {
            part
            for node in ast.walk(function)
            if isinstance(node, ast.JoinedStr)
            for value in node.values
            for part in (value, *ast.walk(getattr(value, "format_spec", None) or value))
            if isinstance(part, ast.Constant | ast.JoinedStr)
        }
        for node in ast.walk(function):
            text = template(node)
            if node is not documented and node not in inner and re.search(r"[a-z] |[a-z]{} | [a-z]", text):
                yield node.lineno, text


def form(english: str) -> str:
    return PLACE.sub("{}", english)


@pytest.mark.parametrize("name", SPEAKERS)
def test_every_sentence_of_the_machines_is_known(name: str) -> None:
    known = {form(each) for each in TABLE} | OTHERS
    faults = [
        f"{name}:{line}: {text!r} is not in common/said.fr.json"
        for line, text in sentences(PACKAGE / name, SPEAKERS[name])
        if text not in known and text.removeprefix(", but ") not in known
    ]
    assert faults == []


def test_every_purpose_of_a_model_is_known() -> None:
    assert {card.purpose for card in cards().values()} <= TABLE.keys()


def test_every_french_sentence_says_the_same_things() -> None:
    for english, french in TABLE.items():
        said, shown = ({name for _, name in PLACE.findall(each)} for each in (english, french))
        assert said == shown, english
        assert french.strip() and french != english


@pytest.fixture(scope="module")
def translate(page_of_words: Page) -> Callable[[list[str]], list[str | None]]:
    return lambda texts: page_of_words.evaluate("texts => texts.map(window.inWords)", texts)


@pytest.fixture(scope="module")
def page_of_words(
    browser: Any, starter_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """A French page, in which `inWords` is the page's own translation."""
    with (
        pytest.MonkeyPatch.context() as patch,
        scripted(starter_path, tmp_path_factory.mktemp("said"), patch) as (server, _),
    ):
        context = browser.new_context(locale="fr-FR")
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.evaluate(
            """async () => {
              const main = document.querySelector("script[type=module]").src;
              window.inWords = (await import(new URL("../common/said.js", main).href)).inWords;
            }"""
        )
        yield page
        context.close()


def filled(text: str, number: int) -> str:
    """A form with something in each place."""
    samples = {"size": f"{number}.5 GB", "number": str(number), "said": "1 answer", "list": "pc-1, b or c"}
    named = {"nearest": " (did you mean pc-1 or b?)", "among": " of 64 devices"}

    def sample(match: re.Match[str]) -> str:
        kind, name = match.groups()
        return named.get(name) or samples.get(kind or name) or f"pc-{number}"

    return PLACE.sub(sample, text)


def test_each_sentence_is_found_again(translate: Callable[[list[str]], list[str | None]]) -> None:
    texts = [filled(english, number) for number, english in enumerate(TABLE, 1)]
    found = translate(texts)
    assert [text for text, french in zip(texts, found, strict=True) if french is None] == []
    english = (
        "It needs 3.42 GB of memory in all for 4 answers of 512 tokens each, and the machines have 3.41 GB: "
        "`cordee deploy big --context 2048` fits."
    )
    french = (
        "Il demande 3,42\xa0Go de mémoire en tout pour 4 réponses de 512 jetons chacune, et les machines "
        "en ont 3,41\xa0Go : « cordee deploy big --context 2048 » convient."
    )
    assert translate([english]) == [french]
    assert translate(["Nothing that a machine says.", "x" * 100_000]) == [None, None]


def made_device(rng: random.Random, number: int) -> Device:
    return device(rng.choice([0.01, 1, 6, 40]), rng.choice([0, 5, 50, 900]), name=f"GPU{number}")


def reasons(seed: int) -> Iterator[str]:
    """What the planner says of a model and machines that are made up."""
    rng = random.Random(seed)
    shape = made_shape(rng.choice([2, 8, 30]), rng.choice([10**8, 10**9]), cuttable=rng.random() < 0.8)
    nodes = {
        name: machine(
            name,
            *(
                device(rng.choice([0.01, 1, 6, 40]), rng.choice([0, 5, 50, 900]), name=f"GPU{each}")
                for each in range(rng.randint(0, 2))
            ),
            draining=rng.random() < 0.15,
            disk_free_bytes=rng.choice([10**6, 10**13]),
            rtts={other: rng.choice([0.0002, 0.3]) for other in "abcd" if other != name},
        )
        for name in "abcd"[: rng.randint(1, 4)]
    }
    demand = Demand(rng.choice([1024, 8192, 10**6]), rng.choice([1, 4]))
    found = planner.plan(shape, nodes, demand, command="cordee deploy big")
    yield found.why
    yield from (each.why for each in found.machines)
    yield SizeRequest(8192, 4, 8192).shortened(demand)


def test_all_that_the_planner_says_is_known(translate: Callable[[list[str]], list[str | None]]) -> None:
    said = sorted({text for seed in range(300) for text in reasons(seed) if text})
    assert len(said) > 50
    assert [text for text, french in zip(said, translate(said), strict=True) if french is None] == []


Talk = tuple[Running, ScriptedService]


@pytest.mark.parametrize("language", ["en", "fr"])
def test_the_planners_words_are_in_the_readers_language(
    talk: Talk, visit: Callable[..., Page], language: str
) -> None:
    page = visit(f"http://127.0.0.1:{talk[0].port}", "/models", language=language)
    verdict = page.locator("details.wide-line").first
    verdict.locator("summary").first.click()
    verdict.locator(".verdict details summary").click()
    said = verdict.locator(".verdict details p")
    words = {"en": "of memory in all.", "fr": "de mémoire en tout."}
    assert words[language] in said.inner_text()
    assert said.locator("[lang=en]").count() == (language == "en")
