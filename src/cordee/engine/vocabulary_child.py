"""A child process that holds one vocabulary, which may end it at any text.

Run as `python -m cordee.engine.vocabulary_child SOCKET PATH NAME FRESH_SECONDS HOW`: SOCKET is the number of
an open socket to its parent, HOW is `table` or `again`. It first sends the vocabulary's table, once libllama
has tokenized a few ordinary texts with it, or `Ready` if the parent has the table. Then it answers, until its
parent ends, or asks nothing for a while: for FRESH_SECONDS after the start, or IDLE_SECONDS.
"""

import array
import itertools
import os
import sys

from cordee.engine.child import answer, receive
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.engine.vocabulary_messages import (
    Failed,
    FindControls,
    Message,
    Numbers,
    Ready,
    Tokenize,
    decoder,
)
from cordee.errors import BadRequest, CordeeError
from cordee.privacy import no_core_dumps
from cordee.system import processes

# A child takes some 60 MB and starts within half a second: people who pause in a chat should not notice.
IDLE_SECONDS = 600.0
# What people write: a model whose vocabulary cannot take it is of no use, and would end this process later.
ORDINARY_TEXTS = (
    "Hello, world! It's 12:30 on 2024-05-06; 3.14 > 2, isn't it? (Yes.) [x] {y} <z> a_b @c #d $5 50% ^&*~`",
    "Le café d'à côté, où l'été brûle : « Ça va ? » — œuvre, naïve, 20 €.\nÜber Straßen.\t¿Qué?\r\n\r\n    x",
    "漢字とかな、한국어, العربية, עברית, हिन्दी, Ελληνικά, Русский 🧗🏽‍♀️🙂",
    "",
    " ",
)


def main() -> int:
    """Load, prove, answer; 0 unless something is wrong with this program."""
    no_core_dumps()
    os.set_blocking(sys.stderr.fileno(), False)  # its parent reads that when it has ended
    end, path, name, fresh_seconds, how = sys.argv[1:]
    link = processes.link_to_parent(end)
    try:
        vocabulary = LlamaVocabulary(path, name)
        if how == "table":
            table = vocabulary.table()
            _prove(vocabulary)
            answer(link, table)
        else:
            answer(link, Ready())
    except CordeeError as error:
        answer(link, Failed(type(error).__name__, error.message))
        return 0
    seconds = float(fresh_seconds)
    while True:
        try:
            request = receive(link, seconds, decoder)
        except (EOFError, OSError):  # the parent ended, or has asked nothing for long
            return 0
        answer(link, _carried_out(vocabulary, request))
        seconds = IDLE_SECONDS


def _prove(vocabulary: LlamaVocabulary) -> None:
    """Tokenize ordinary texts: if libllama ends this process at one, the parent refuses the model."""
    for text in ORDINARY_TEXTS:
        for special in (True, False):
            vocabulary.tokenize(text, special=special, add_bos=False)


def _carried_out(vocabulary: LlamaVocabulary, request: Message) -> Message:
    try:
        match request:
            case Tokenize(text, special):
                found = vocabulary.tokenize(text, special=special, add_bos=False)
            case FindControls(text):
                found = itertools.chain.from_iterable(vocabulary.control_spans(text))
            case _:
                raise BadRequest(f"{type(request).__name__} is no request")
    except CordeeError as error:
        return Failed(type(error).__name__, error.message)
    return Numbers(array.array("i", found).tobytes())
