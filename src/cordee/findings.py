"""What is wrong with a machine, or with its place in a cluster: the vocabulary of `cordee doctor`."""

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """Something to know, as two sentences for people: what it is, and what to do (often a line to paste).

    A problem must be fixed before models can run, or before nodes can work together; the rest is advice.
    """

    what: str
    remedy: str
    problem: bool
