"""docs/office.md and docs/bureau.md, followed to the letter on four hosts; guide.py explains the marks."""

import os
from pathlib import Path

import pytest

import cordee
from guide import Office, Reader, differences, steps
from netfaults import fake_clock
from netlab import MEGABYTE, Machine

DOCS = Path(__file__).parents[2] / "docs"
ENGLISH, FRENCH = DOCS / "office.md", DOCS / "bureau.md"
# The starter model takes several of them, any three suffice: one can be drained, stolen or lost.
PC = Machine(memory_bytes=760 * MEGABYTE, cpus=1.0)


def test_both_languages_have_the_same_steps() -> None:
    english, french = (steps(path.read_text(encoding="utf-8")) for path in (ENGLISH, FRENCH))
    assert differences(english, french) == []


@pytest.mark.long
@pytest.mark.parametrize("path", [ENGLISH, FRENCH], ids=["english", "french"])
def test_the_guide_works_as_it_is_written(path: Path, starter_path: Path) -> None:
    if not fake_clock("+1d"):
        pytest.skip("needs libfaketime (Debian: libfaketime)")
    os.environ["PYTHONPATH"] = str(Path(cordee.__file__).parents[1])
    found = steps(path.read_text(encoding="utf-8"))
    assert all(step.target for step in found), "what is not run has a reason"
    with Office(path.stem, PC) as office:
        reader = Reader(office)
        for step in found:
            reader.follow(step)
    assert max(reader.spread) > 1, "the model was cut over several machines"
