"""A child process that holds one embedding model, whose file may end it at any text.

Run as `python -m cordee.engine.embedding_child SOCKET PATH NAME`: SOCKET is the number of an open socket to
its parent. It first sends `EncoderReady`. Then it answers, until its parent ends, or asks nothing for
IDLE_SECONDS.
"""

import os
import sys
from pathlib import Path

from cordee.engine.child import answer, receive
from cordee.engine.embedding_messages import Embed, EmbeddingMessage, EncoderReady, Rank, Vector, decoder
from cordee.engine.llama.encoder import LlamaEncoder
from cordee.engine.vocabulary_messages import Failed
from cordee.errors import BadRequest, CordeeError
from cordee.privacy import no_core_dumps
from cordee.system import processes

# An embedding model is read anew within seconds: its memory is for others when nobody has asked this long.
IDLE_SECONDS = 300.0


def main() -> int:
    """Load, answer; 0 unless something is wrong with this program."""
    no_core_dumps()
    os.set_blocking(sys.stderr.fileno(), False)  # its parent reads that when it has ended
    end, path, name = sys.argv[1:]
    link = processes.link_to_parent(end)
    try:
        encoder = LlamaEncoder(Path(path), name)
        answer(link, EncoderReady(encoder.dimension, encoder.context))
    except CordeeError as error:
        answer(link, Failed(type(error).__name__, error.message))
        return 0
    while True:
        try:
            request = receive(link, IDLE_SECONDS, decoder)
        except (EOFError, OSError):  # the parent ended, or has asked nothing for long
            return 0
        answer(link, _carried_out(encoder, request))


def _carried_out(encoder: LlamaEncoder, request: EmbeddingMessage) -> EmbeddingMessage:
    try:
        match request:
            case Embed(None, tokens, truncate):
                values, count = encoder.embed_tokens(list(tokens), truncate)
            case Embed(str(text), _, truncate):
                values, count = encoder.embed(text, truncate)
            case Rank(query, document):
                values, count = encoder.rank(query, document)
            case _:
                raise BadRequest(f"{type(request).__name__} is no request")
    except CordeeError as error:
        return Failed(type(error).__name__, error.message)
    return Vector(values.tobytes(), count)
