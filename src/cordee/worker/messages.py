"""The messages between worker processes and their parent, as msgspec structs; the frames are in frames.py.

Four kinds of link. On one machine they are Unix sockets in a folder that only this user may enter; links
between machines are those of tls_link.py. A *wiring* is the set of links between the workers of a placement;
its id changes whenever one of the workers does.

- *control*, between a worker and its parent: Hello, then LoadStage -> Loaded or LoadFailed, Wire -> Wired or
  WireFailed; Broken when a link is lost; AdmitReaders, KvReaders when their number changes.
- *data*, from the scheduler's process to the first worker, from worker to worker, and from the last one back
  to the scheduler's process and to the first worker: Join first, which names the wiring, then KvQuery, Rows,
  Halt and Prepare downstream, and Tokens, KvAnswer or Prepared at the end. A message of another wiring than
  the link's is refused.
- *spot checks*, between agents, at the same doors: RecordQuery -> Record and SpotRequest -> SpotFinding, see
  agent/spot_checks.py. An agent has RecordQuery -> Record with its workers, too, and Recompute -> Recomputed
  with one that computes nothing else.
- *admin*, between agents, where a data link could be: Promotion -> Promoted, see agent/admins.py; DrainOrder
  -> Drained, see agent/orders.py.
- *KV transfer*, from a worker to one of the placement before: ReaderJoin first, which names the wiring of
  that placement, then KvQuery -> KvAnswer and KvRead -> KvState; see kv_transfer.py.
- *streams*, from the gateway of a node to the host of a model on another: StreamsJoin first, then
  StreamMessages in both directions; see agent/stream_links.py.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from cordee.cluster.facts import KvSource
from cordee.engine.stage import EngineName, StageConfig, StageDescription
from cordee.generation.batches import MicroBatch, SequenceCopy
from cordee.generation.request import Choice, Grammar, SamplingParams


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First on every control link: the id that its parent gave this worker."""

    worker: str


class LoadStage(msgspec.Struct, frozen=True, tag=True):
    """Load this slice into `engine`. `is_last`: its logits are sampled here; the tokens `ends` end an answer.
    `name` is what messages call it.

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
    name: str = ""


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The stage is loaded; it waits to be wired. `endpoint` is where other machines reach it."""

    description: StageDescription
    endpoint: str = ""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The stage cannot be loaded. `error` is the name of a class in cordee.errors."""

    error: str
    message: str


class Wire(msgspec.Struct, frozen=True, tag=True):
    """Forget all sequences, take rows of this wiring only, send results to `downstream`.

    `first` is where the last of several stages sends micro-batches that go round again. Both are paths of
    Unix sockets, or endpoints of the nodes `downstream_node` and `first_node`. Rows are taken from
    `upstream_node`, and those that go round from `again_node`; "" is this machine, by a Unix socket.
    `sources` have the sequences of the placement before, in the order of this worker's layers; none: there
    is nothing to take over.
    """

    wiring: str
    downstream: str
    first: str | None = None
    downstream_node: str = ""
    first_node: str = ""
    upstream_node: str = ""
    again_node: str = ""
    sources: tuple[KvSource, ...] = ()


class Wired(msgspec.Struct, frozen=True, tag=True):
    """The worker is connected to its downstream and waits for rows of this wiring."""

    wiring: str


class WireFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot reach its downstream; it waits for another Wire.

    `node` is the one whose doors are closed to this one, if it is not just that a worker has ended there.
    """

    wiring: str
    message: str
    node: str = ""


class KvReaders(msgspec.Struct, frozen=True, tag=True):
    """How many workers of the next placement may take over sequences from this one."""

    count: int


class AdmitReaders(msgspec.Struct, frozen=True, tag=True):
    """Workers on these nodes, and on no others, may take over sequences of this wiring."""

    wiring: str
    nodes: tuple[str, ...]


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A link of this wiring is gone, on either side of the worker; it waits for another Wire.

    `node` is the one from which a frame came too slowly, if it was that, and `message` says so.
    """

    wiring: str
    node: str = ""
    message: str = ""


class Halt(msgspec.Struct, frozen=True, tag=True):
    """Passed on to the last stage: this micro-batch, and all before it, must not go round again."""

    wiring: str
    batch: int


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Passed on to the last stage: compile this grammar, beside what is computed, for a stream to come."""

    wiring: str
    number: int
    grammar: Grammar


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Answers a Prepare: the grammar is compiled, or cannot be used because of `failure`."""

    wiring: str
    number: int
    failure: str = ""


class Join(msgspec.Struct, frozen=True, tag=True):
    """First on every data link: what follows belongs to this wiring.

    `again`: the link comes from the last stage and brings micro-batches that go round.
    """

    wiring: str
    again: bool = False


class ReaderJoin(msgspec.Struct, frozen=True, tag=True):
    """First on every KV transfer link: sequences of this wiring are to be taken over."""

    wiring: str


class StreamsJoin(msgspec.Struct, frozen=True, tag=True):
    """First on a link from the gateway of a node to the host on another: what follows are StreamMessages."""


class Probe(msgspec.Struct, frozen=True, tag=True):
    """First on a link that tries whether links work; then there and back with a payload (agent/probes.py)."""


class StreamMessage(msgspec.Struct, frozen=True, tag=True):
    """The payload is a message of generation/streams.py."""


class HeldSequence(msgspec.Struct, frozen=True, array_like=True):
    """What a stage has of a sequence: `length` positions, computed for the stream of this `tenure`.

    `tokens` are those at the positions, where the stage knows them: the first stage does.
    """

    tenure: int
    length: int
    tokens: list[int] | None = None


class KvQuery(msgspec.Struct, frozen=True, tag=True):
    """Passed on through all stages: which sequences of the placement before could each of them take over?

    `held` is what all stages so far could; None: no stage has been asked yet.
    """

    wiring: str
    held: dict[int, HeldSequence] | None = None


class KvAnswer(msgspec.Struct, frozen=True, tag=True):
    """What can be taken over, by sequence."""

    wiring: str
    held: dict[int, HeldSequence]


class KvRead(msgspec.Struct, frozen=True, tag=True):
    """Asks for the first `length` positions of a sequence, of layers `first` to `last - 1` of the slice."""

    sequence: int
    length: int
    first: int
    last: int


class KvState(msgspec.Struct, frozen=True, tag=True):
    """Answers a KvRead: the payload is the state that was asked for."""

    sequence: int


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows of a sequence in a micro-batch. `output`: the last row's logits are wanted. `score`:
    those of the others are, too, as scores of the tokens of the prompt that follow them.

    `tenure` is the scheduler's number of the stream that has the sequence now. `inherit`: all positions
    before the first are to be taken over from the placement before.

    `guess` are the tokens of the last rows that are guesses: their logits are wanted, too, if they are right.
    `sure` positions of the sequence, at least, are of the stream's log; 0: all of them.
    """

    sequence: int
    first_position: int
    rows: int
    output: bool
    tenure: int = 0
    inherit: bool = False
    score: bool = False
    guess: tuple[int, ...] = ()
    sure: int = 0


class Opening(msgspec.Struct, frozen=True):
    """What a sampler starts from: a token log."""

    sampling: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]


class Rows(msgspec.Struct, frozen=True, tag=True):
    """A micro-batch. The payload is int32 token ids, or float32 rows of width `n_embd` where that is not 0.

    A run that starts before the end of what its sequence holds replaces the rest of it. `opens` are the
    samplers to make first, by sequence. Where `steps` is more than 1, every run is one row, and the
    micro-batch goes round with the tokens that it gave, unless one of them ends its answer. `measure`: answer
    with digests of the logits, not with tokens. The `copies` are made before anything else, in order.
    """

    wiring: str
    batch: int
    runs: tuple[Run, ...]
    opens: dict[int, Opening]
    n_embd: int = 0
    steps: int = 1
    measure: bool = False
    copies: tuple[SequenceCopy, ...] = ()


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """A micro-batch's result, by sequence: choices, or why none could be made, or digests of logits; `scores`
    are the prompt's tokens that followed the rows of runs with `score`. `guessed` are the choices after
    that of `choices`: of guesses that were right. `forced` are tokens that a grammar leaves to come next.

    Not the `last`: the micro-batch is on its way again with these tokens. `earlier` are the choices of its
    rounds before that were not sent yet.
    """

    wiring: str
    batch: int
    choices: dict[int, Choice] = {}
    failures: dict[int, str] = {}
    digests: dict[int, str] = {}
    last: bool = True
    earlier: tuple[dict[int, Choice], ...] = ()
    scores: dict[int, list[Choice]] = {}
    guessed: dict[int, list[Choice]] = {}
    forced: dict[int, list[int]] = {}


class RecordQuery(msgspec.Struct, frozen=True, tag=True):
    """Asks a stage what it received and sent for the first `rows` positions of a sequence, in this tenure.

    `whole`: the rows themselves are wanted. `index` is the stage's in the placement; the answer has the same
    `number`.
    """

    wiring: str
    index: int
    sequence: int
    tenure: int
    rows: int
    whole: bool
    number: int = 0


class Record(msgspec.Struct, frozen=True, tag=True):
    """Answers a RecordQuery; with no `rows` there is no such record.

    `received` and `sent` are SHA-256 of rows or, at the first stage, of token ids; where the whole was wanted
    both are the payload, one after the other. `n_embd` is the width of what was received, 0 for token ids.
    `tokens` were chosen, by position, from the start that is `opening`. `settled` are tenure and length of
    all that the first stage could be asked for, by sequence, and that has passed all stages.
    """

    number: int
    rows: int = 0
    received: str = ""
    sent: str = ""
    n_embd: int = 0
    tokens: dict[int, int] = {}
    opening: Opening | None = None
    settled: dict[int, tuple[int, int]] = {}


class Recompute(msgspec.Struct, frozen=True, tag=True):
    """Compute these rows of one sequence, from position 0 on. The payload is as that of Rows.

    `outputs` are the positions whose logits are wanted, in order, of a last stage.
    """

    n_embd: int
    outputs: tuple[int, ...] = ()


class Recomputed(msgspec.Struct, frozen=True, tag=True):
    """Answers a Recompute. The payload are float32 rows of this width."""

    width: int


class SpotRequest(msgspec.Struct, frozen=True, tag=True):
    """From a host to a node of its placement: check the stage `index`, the first `rows` positions of a
    sequence in this tenure. `computes`: by computing them again, else only by what went over a link."""

    wiring: str
    index: int
    sequence: int
    tenure: int
    rows: int
    computes: bool


class SpotFinding(msgspec.Struct, frozen=True, tag=True):
    """Answers a SpotRequest: whether the stage's word agrees with what was computed (else it `differs`) and
    with what went over a link (else that is `disputed`); `reason` says more."""

    state: Literal["agrees", "differs", "disputed", "unknown"]
    reason: str = ""


def rows_of(wiring: str, batch: MicroBatch) -> tuple[Rows, memoryview]:
    """A scheduler's micro-batch as the first stage takes it, and its payload."""
    runs = tuple(
        Run(
            each.sequence,
            each.first_position,
            len(each.tokens),
            each.sample,
            each.tenure,
            each.inherit,
            each.score,
            tuple(each.tokens[len(each.tokens) - each.guesses :]),
            each.sure if each.guesses else 0,
        )
        for each in batch.segments
    )
    opens = {
        sequence: Opening(log.sampling, log.prompt, list(log.generated))
        for sequence, log in batch.opens.items()
    }
    tokens = np.array([token for each in batch.segments for token in each.tokens], dtype=np.int32)
    rows = Rows(wiring, batch.id, runs, opens, steps=batch.steps, copies=batch.copies)
    return rows, tokens.data.cast("B")


class Promotion(msgspec.Struct, frozen=True, tag=True):
    """First and last from an admin to a member's agent: the authority's key (PEM) makes it one, too."""

    authority_key: bytes
    nonce: bytes


class Promoted(msgspec.Struct, frozen=True, tag=True):
    """Answers a Promotion: the node's signature with that key, under its nonce."""

    proof: bytes


class DrainOrder(msgspec.Struct, frozen=True, tag=True):
    """First from an admin to a member's agent: run no stages any more, or (`on` false) take some again.

    The authority's signature says that the sender may order that, of this node.
    """

    on: bool
    signature: bytes


class Drained(msgspec.Struct, frozen=True, tag=True):
    """Answers a DrainOrder: it is obeyed."""


Control = (
    Hello | LoadStage | Loaded | LoadFailed | Wire | Wired | WireFailed | Broken | KvReaders | AdmitReaders
)
Spot = RecordQuery | Record | Recompute | Recomputed | SpotRequest | SpotFinding
Data = Join | Rows | Halt | Tokens | KvQuery | KvAnswer | Prepare | Prepared | ReaderJoin | KvRead | KvState
Streams = StreamsJoin | StreamMessage | Probe
Message = Control | Data | Spot | Streams | Promotion | Promoted | DrainOrder | Drained
