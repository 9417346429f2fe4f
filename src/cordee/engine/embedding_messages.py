"""What a process and the child that holds an embedding model for it (embedding_child.py) say."""

import msgspec

from cordee.engine.vocabulary_messages import Failed


class EncoderReady(msgspec.Struct, frozen=True, tag=True):
    """The model is ready. `dimension` is the length of a vector; 0 for one that ranks documents.

    `context` is how many tokens a text may have.
    """

    dimension: int
    context: int


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Give a text's vector. With `truncate` the beginning of one that is too long counts, else it is refused.

    `tokens`, where there is no text, are used as they are.
    """

    text: str | None
    tokens: tuple[int, ...] = ()
    truncate: bool = False


class Rank(msgspec.Struct, frozen=True, tag=True):
    """Say how well a document answers a query."""

    query: str
    document: str


class Vector(msgspec.Struct, frozen=True, tag=True):
    """A vector of unit length (of a text) or of one score (of a document): float32 in the machine's order.

    `tokens` is how many were read.
    """

    values: bytes
    tokens: int


EmbeddingMessage = EncoderReady | Embed | Rank | Vector | Failed

decoder = msgspec.msgpack.Decoder(EmbeddingMessage)
