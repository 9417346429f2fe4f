"""What the processes of a node say to each other, as msgspec structs; the frames are in frames.py.

Two kinds of link. On one machine they are Unix sockets in a folder that only this user may enter; data links
between machines are those of tls_link.py.

- *control*, between the pipeline and each worker: Hello, then Load -> Loaded or LoadFailed, Wire -> Wired
  or WireFailed; Broken when a link is lost.
- *data*, from the service to the first worker, from worker to worker, from the last back to the service and
  to the first worker: Join first, which names the placement, then Recall, Rows and Halt onwards and Tokens or
  Recalled at the end. A message of another placement than the link's is refused.
- *hand-over*, from a worker to one of the placement before: Inherit first, which names that placement, then
  Recall -> Recalled and Take -> State; see kv_transfer.py.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from cordee.cluster.facts import KvSource
from cordee.engine.stage import EngineName, StageConfig, StageDescription
from cordee.generation.request import Choice, SamplingParams
from cordee.generation.scheduler import MicroBatch


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First on every control link: the id that the pipeline gave this worker."""

    worker: str


class LoadStage(msgspec.Struct, frozen=True, tag=True):
    """Load this slice into `engine`. `is_last`: its logits are sampled here; `ends` end an answer.

    `embedding` is the model file that turns token ids into rows, for the first of several stages. With an
    `identity`, a member's folder, the worker also takes rows of other machines, at the address `listen`.
    """

    path: str
    config: StageConfig
    is_last: bool
    engine: EngineName = "llama"
    embedding: str | None = None
    ends: tuple[int, ...] = ()
    identity: str | None = None
    listen: str = ""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The stage is loaded; it waits to be wired. `endpoint` is where other machines reach it."""

    description: StageDescription
    endpoint: str = ""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The stage cannot be loaded. `error` is the name of a class in cordee.errors."""

    error: str
    message: str


class Wire(msgspec.Struct, frozen=True, tag=True):
    """Forget all sequences, take rows of this placement only, send on to `downstream`.

    `first` is where the last of several stages sends micro-batches that go round again. Both are paths of
    Unix sockets, or endpoints of other machines. `sources` have the sequences of the placement before, in
    the order of this worker's layers; none: there is nothing to take over.
    """

    wiring: str
    downstream: str
    first: str | None = None
    sources: tuple[KvSource, ...] = ()


class Wired(msgspec.Struct, frozen=True, tag=True):
    """The worker sends to its downstream and waits for rows of this placement."""

    wiring: str


class WireFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot reach the downstream of this placement; it waits to be wired again."""

    wiring: str
    message: str


class KvReaders(msgspec.Struct, frozen=True, tag=True):
    """So many workers of the next placement may take over sequences of this one."""

    count: int


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A link of this placement is gone, on either side of the worker; it waits to be wired again."""

    wiring: str


class Halt(msgspec.Struct, frozen=True, tag=True):
    """Goes through all stages to the last: this micro-batch, and all before, shall not go round again."""

    wiring: str
    batch: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """First on every data link: what follows belongs to this placement.

    `again`: it comes from the last stage, and is micro-batches that go round.
    """

    wiring: str
    again: bool = False


class ReaderJoin(msgspec.Struct, frozen=True, tag=True):
    """First on every hand-over link: sequences of this placement are to be taken over."""

    wiring: str


class HeldSequence(msgspec.Struct, frozen=True, array_like=True):
    """What a stage has of a sequence: `length` positions, which the scheduler computed in this `tenure`.

    `tokens` are those at the positions, where the stage knows them: the first one does.
    """

    tenure: int
    length: int
    tokens: list[int] | None = None


class KvQuery(msgspec.Struct, frozen=True, tag=True):
    """Goes through all stages: which sequences of the placement before could each of them take over?

    `held` is what all stages so far could; None: none has been asked yet.
    """

    wiring: str
    held: dict[int, HeldSequence] | None = None


class KvAnswer(msgspec.Struct, frozen=True, tag=True):
    """What can be taken over, by sequence."""

    wiring: str
    held: dict[int, HeldSequence]


class KvRead(msgspec.Struct, frozen=True, tag=True):
    """The first `length` positions of a sequence are wanted, of layers `first` to `last - 1` of the slice."""

    sequence: int
    length: int
    first: int
    last: int


class KvState(msgspec.Struct, frozen=True, tag=True):
    """What was wanted of this sequence is the payload."""

    sequence: int


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows of a sequence in a micro-batch. `output`: the last row's logits are wanted.

    `tenure` is the scheduler's number for the stream that has the sequence now. `inherit`: all positions
    before the first are to be taken over from the placement before.
    """

    sequence: int
    first_position: int
    rows: int
    output: bool
    tenure: int = 0
    inherit: bool = False


class Opening(msgspec.Struct, frozen=True):
    """What a sampler starts from: a token log."""

    sampling: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]


class Rows(msgspec.Struct, frozen=True, tag=True):
    """A micro-batch. The payload is int32 token ids, or float32 rows of width `n_embd` where that is not 0.

    A run that starts before the end of what its sequence holds replaces the rest of it. `opens` are samplers
    to be made first. Where `steps` is more than 1, every run is one row, and the micro-batch goes round with
    the tokens that it gave, unless one of them ends its answer. `measure`: answer with digests of the logits,
    not with tokens.
    """

    wiring: str
    batch: int
    runs: tuple[Run, ...]
    opens: dict[int, Opening]
    n_embd: int = 0
    steps: int = 1
    measure: bool = False


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """A micro-batch's result, by sequence: choices, or why none could be made, or digests of logits.

    Not the `last`: the micro-batch is on its way again with these tokens. `earlier` are the choices of its
    rounds before, as far as they have not been told yet.
    """

    wiring: str
    batch: int
    choices: dict[int, Choice] = {}
    failures: dict[int, str] = {}
    digests: dict[int, str] = {}
    last: bool = True
    earlier: tuple[dict[int, Choice], ...] = ()


def rows_of(placement: str, batch: MicroBatch) -> tuple[Rows, memoryview]:
    """A scheduler's micro-batch as the first stage takes it, and its payload."""
    runs = tuple(
        Run(each.sequence, each.first_position, len(each.tokens), each.sample, each.tenure, each.inherit)
        for each in batch.segments
    )
    opens = {
        sequence: Opening(log.sampling, log.prompt, list(log.generated))
        for sequence, log in batch.opens.items()
    }
    tokens = np.array([token for each in batch.segments for token in each.tokens], dtype=np.int32)
    return Rows(placement, batch.id, runs, opens, steps=batch.steps), memoryview(tokens).cast("B")


Control = Hello | LoadStage | Loaded | LoadFailed | Wire | Wired | WireFailed | Broken | KvReaders
Data = Join | Rows | Halt | Tokens | KvQuery | KvAnswer | ReaderJoin | KvRead | KvState
Message = Control | Data
