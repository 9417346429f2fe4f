"""What a process and the child that tries grammars for it (grammar_child.py) say to each other.

The requests are `Grammar`s, each answered by a `GrammarVerdict`; a first one says whether the vocabulary is
loaded.
"""

import msgspec

from cordee.engine.child import rebuilt
from cordee.errors import BadRequest, CordeeError
from cordee.generation.request import Grammar


class GrammarVerdict(msgspec.Struct, frozen=True):
    """Whether a grammar may be used. `error` is the name of a class in cordee.errors; "": it may."""

    error: str = ""
    message: str = ""
    param: str | None = None

    @classmethod
    def of(cls, error: CordeeError) -> "GrammarVerdict":
        """The verdict that an error stands for."""
        return cls(type(error).__name__, error.message, getattr(error, "param", None))

    def as_error(self) -> CordeeError | None:
        """The error that it stands for; None if there is none."""
        if not self.error:
            return None
        error = rebuilt(self.error, self.message)
        if isinstance(error, BadRequest):
            error.param = self.param
        return error


grammar_decoder = msgspec.msgpack.Decoder(Grammar)
verdict_decoder = msgspec.msgpack.Decoder(GrammarVerdict)
