"""The models that come with the package: their cards tell the truth, and they tell a story.

An emulated PC of 1997 tells it as well: `test_pentium2_machine.py`.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cordee.convert.pentium2 import LAYOUT
from cordee.engine.stage import StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.engine.vocabulary import Vocabulary
from cordee.models.cards import Card, cards
from cordee.models.gguf import read_header
from terminal import PROGRAM, SECONDS

BEGINNING = "Once upon a time"
PACKAGE_BYTES = 8_000_000  # what all of them may add to the package
# By the likeliest token: what every machine makes of these weights.
STORIES = {
    "story-small": ", there was a little girl named Lily. She loved to play outside in the sunshine. One day,"
    " she saw a big, red ball. She wanted to play with it, but it was too big.",
    "story": ", there was a little girl named Emma who lived in a cozy little house. She had a big family of"
    " three and loved to play with her toys. One day, Emma's mom decided to make a special cake",
}
SHIPPED = [card for card in cards().values() if card.file]


def test_each_has_a_story_here_and_the_package_stays_small() -> None:
    assert {card.name for card in SHIPPED} == set(STORIES)
    assert sum(card.path.stat().st_size for card in SHIPPED) < PACKAGE_BYTES


@pytest.mark.parametrize("card", SHIPPED, ids=lambda card: card.name)
def test_the_card_tells_the_truth(card: Card, tmp_path: Path) -> None:
    header = read_header(card.path)
    assert (header.architecture, header.layers) == (card.architecture, card.layers)
    assert header.get(".context_length") == card.context
    assert header.get("general.name") == card.title
    assert header.get("cordee.ternary.layout") == LAYOUT  # so it runs on every machine
    shown = subprocess.run(
        [*PROGRAM, "show", card.name, "--json"],
        capture_output=True,
        check=True,
        timeout=SECONDS,
        env=os.environ | {"CORDEE_HOME": str(tmp_path)},
    )
    facts = json.loads(shown.stdout)
    assert facts["parameters"] == card.parameters


@pytest.mark.parametrize("card", SHIPPED, ids=lambda card: card.name)
def test_it_tells_this_story(card: Card) -> None:
    vocabulary, expected = Vocabulary(card.path), STORIES[card.name]
    stage = TernaryStage(card.path, StageConfig(context=256, sequences=1, batch_rows=16))
    tokens = vocabulary.tokenize(BEGINNING, add_bos=True)
    asked, told = len(tokens), b""
    logits = stage.decode(batch_of_one(tokens, 0, 0))
    while len(told) < len(expected):
        tokens.append(int(np.argmax(logits[0])))
        told = vocabulary.detokenize(tokens[asked:])
        logits = stage.decode(batch_of_one(tokens[-1:], len(tokens) - 1, 0))
    stage.close()
    assert told.decode().startswith(expected)
