"""Ten thousand mangled model files through the verbs and a node's disk: refused in a sentence, or used.

tests/helpers/mangled_files.py makes them; each seed gives the same file in every run.
"""

import asyncio
import logging
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from cordee.cli.main import cordee, exit_codes
from cordee.distribution.inventory import Inventory
from cordee.distribution.slice_store import SliceStore
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import CordeeError
from cordee.models.store import Store
from mangled_files import make_originals, mangled
from model_files import Original


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    return make_originals(tmp_path_factory.mktemp("originals"))


class Disk:
    """A state folder with a sound model, and what a node would offer of it."""

    def __init__(self, home: Path, sound: Path) -> None:
        self.store = Store(home / "models")
        self.store.add_file(sound, "sound")

    def verb(self, *arguments: str) -> int:
        """Run a verb in this process; its exit code. A failure is one sentence, without a traceback."""
        done = CliRunner().invoke(cordee, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code in {0, *exit_codes()}, (arguments, done.output)
        if done.exit_code:
            said = done.stderr.strip().splitlines()[-1]
            assert said.startswith("cordee: ") and "sha256-" not in said, (arguments, done.stderr)
        assert "Traceback" not in done.output
        return done.exit_code

    def offered(self) -> set[str]:
        """The names of the models that a node with this disk offers, which has just started."""

        async def look() -> set[str]:
            inventory = Inventory(self.store, SliceStore(self.store), lambda: None)
            await inventory.scan()
            while inventory._reader is not None:
                await asyncio.wait([inventory._reader])
                await inventory.scan()
            await inventory.close()
            return {offer.name for offer in inventory.offers}

        return asyncio.run(look())


def through_the_verbs(disk: Disk, path: Path, *, slow: bool) -> str:
    """One mangled file; how far it came.

    What is `slow` measures this machine (`plan`), or starts a process for the vocabulary as `run`, `serve`
    and `up` do.
    """
    if disk.verb("pull", str(path), "--name", "odd"):
        return "not pulled"
    try:
        shown, offered = disk.verb("show", "odd"), disk.offered()
        assert "sound" in offered
        if slow:
            disk.verb("plan", "odd")
            try:
                Vocabulary(disk.store.get("odd").path, "odd").close()
            except CordeeError as error:
                assert "odd" in error.message and "sha256" not in error.message
                return "not run"
        return "used" if shown == 0 and "odd" in offered else "refused"
    finally:
        disk.store.remove("odd")


def hunt(seeds: range, originals: list[Original], folder: Path, *, every: int) -> Counter[str]:
    """Files by seeds; one of `every` so many goes through what is slow, too."""
    logging.disable(logging.WARNING)
    try:
        disk = Disk(folder / "home", originals[0].header.path)
        found: Counter[str] = Counter()
        for seed in seeds:
            mangled(seed, originals, folder / "odd.gguf")
            try:
                found[through_the_verbs(disk, folder / "odd.gguf", slow=seed % every == 0)] += 1
            except BaseException as error:
                error.add_note(f"the file of seed {seed}")
                raise
        return found
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path / "home"))
    return tmp_path


def test_mangled_files_are_refused_in_a_sentence_or_used(originals: list[Original], folder: Path) -> None:
    found = hunt(range(40), originals, folder, every=8)
    assert {"not pulled", "used"} <= set(found)


def test_libllama_s_reason_names_the_model_and_not_its_file(originals: list[Original], folder: Path) -> None:
    assert hunt(range(2063, 2064), originals, folder, every=1) == {"not run": 1}


@pytest.mark.long
def test_ten_thousand_mangled_files(originals: list[Original], folder: Path) -> None:
    found = hunt(range(40, 8540), originals, folder, every=1)  # beside the 1,500 of test_vocabulary.py
    assert set(found) == {"not pulled", "used", "refused", "not run"}
