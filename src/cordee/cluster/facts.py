"""What nodes tell each other about themselves: the vocabulary of the cluster, and its wire format (msgpack).

Everything here is soft state. A node says it again and again, the others keep what it said last, and what is
no longer said is forgotten; so nothing that a fault wrote into it survives.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

DeviceKind = Literal["cpu", "gpu"]
StageState = Literal["fetching", "loading", "loaded", "wired", "failed"]

NODES_MAX = 256  # of a cluster, known at once


class Device(msgspec.Struct, frozen=True):
    """Something that runs stages.

    `memory_bytes` is what stages may take of it, reserve subtracted; `read_bytes_per_second` how fast it
    reads weights in a decode, measured on the node.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    read_bytes_per_second: float


class ModelShape(msgspec.Struct, frozen=True, cache_hash=True):
    """What of a model decides where it can run; the tuples have one item a layer.

    `active_bytes` of a layer are read for one token (of a mixture of experts only those chosen), and
    `active_head_bytes` by the last stage beside them. `cell_bytes` is the KV cache of one token in each
    layer, `row_floats` what a row of a batch needs in the buffers of each, `windowed` whether its attention
    has a sliding window. A stage holds `extra_bytes` beside its layers, the last one (the head) instead
    `last_extra_bytes`, and one that is all of the model `whole_extra_bytes`; the host of a model that is cut
    reads from `embedding_bytes`. `cuttable` and the fields after it say what may be cut.
    """

    digest: str
    architecture: str
    n_embd: int
    n_vocab: int
    layer_bytes: tuple[int, ...]
    active_bytes: tuple[int, ...]
    cell_bytes: tuple[int, ...]
    row_floats: tuple[int, ...]
    windowed: tuple[bool, ...]
    embedding_bytes: int
    extra_bytes: int
    last_extra_bytes: int
    whole_extra_bytes: int
    active_head_bytes: int
    cuttable: bool = True
    cut_step: int = 1
    minimum_layers: int = 1
    refused_counts: tuple[int, ...] = ()  # numbers of layers that the engine takes for another model

    def __post_init__(self) -> None:
        by_layer = (self.layer_bytes, self.active_bytes, self.cell_bytes, self.row_floats, self.windowed)
        if {len(items) for items in by_layer} != {self.layers} or not self.layers:
            raise ValueError("a model's shape must have one item for each of its layers")

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.layer_bytes)

    def allows(self, first: int, last: int) -> bool:
        """Whether layers `first` to `last` (exclusive) may be a stage (the rules of models/slices.py)."""
        if not 0 <= first < last <= self.layers:
            return False
        if (first, last) == (0, self.layers):
            return True
        on_steps = first % self.cut_step == 0 and (last % self.cut_step == 0 or last == self.layers)
        count_allowed = last - first >= self.minimum_layers and last - first not in self.refused_counts
        window_allowed = not any(self.windowed) or any(self.windowed[first:last])
        return self.cuttable and on_steps and count_allowed and window_allowed


class StagePlace(msgspec.Struct, frozen=True):
    """A stage's layers, `first` to `last` (exclusive), and the device of the node that runs them."""

    node: str
    device: str
    first: int
    last: int


class Placement(msgspec.Struct, frozen=True, cache_hash=True):
    """Which node runs which layers of a model; the stages cover all layers once, in order.

    `context` is in tokens for each of `sequences` streams. The host (scheduler) is the first stage's node.
    `only` is the deployment's: placements for different ones are different, so that no stream that is to
    stay on some machines gets into one that need not.
    """

    model: str  # the shape's digest
    context: int
    sequences: int
    stages: tuple[StagePlace, ...]
    only: tuple[str, ...] = ()


class StageReport(msgspec.Struct, frozen=True):
    """A stage that a node runs, or is about to.

    `worker` is random and names a KV cache: new with each process, and whenever the cache was lost or is in
    doubt. `endpoint` is where it takes rows. `wiring` names the links it is joined by.
    """

    placement: Placement
    index: int
    state: StageState
    worker: str = ""
    endpoint: str = ""
    wiring: str = ""
    detail: str = ""


class KvSource(NamedTuple):
    """A worker of a serving placement, from which a successor's stage may take sequences over.

    `endpoint` is where it is reached on its `node`, `wiring` what it serves. `first` to `last` (exclusive)
    are the layers to take, counted from the first layer of its own slice.
    """

    endpoint: str
    wiring: str
    first: int
    last: int
    node: str


class Offer(msgspec.Struct, frozen=True):
    """A whole model on a node's disk, which any node may deploy under this name.

    `context` is what it is served with unless the deployment says otherwise, in tokens for each stream;
    `source` where it came from on the hub ('owner/name/file.gguf'), if it did.
    """

    name: str
    shape: ModelShape
    context: int
    source: str = ""


class SliceHeld(msgspec.Struct, frozen=True):
    """Layers of a model that lie whole on the node's disk. With (0, layers) and `whole`, all of the model;
    (0, 0) is its embedding alone."""

    model: str
    first: int
    last: int
    whole: bool = False


class Doubt(msgspec.Struct, frozen=True):
    """That the node that says so could not work with another, `node`, lately, and why (doubts.py)."""

    node: str
    reason: str


class Facts(msgspec.Struct, frozen=True):
    """What a node is, has and runs now.

    `api` is where it serves clients, `inbox` where the last stages of the models it hosts send their tokens.
    What it *has* (devices' memory, disk) counts as if nothing of this cluster ran or was half fetched, so
    that a decision does not undo itself. `rtts` are seconds to other nodes and back, as measured; `build`
    names the engine's build, its CPU variant last (streams move token-identically only between equal ones),
    `version` that of Cordée; `draining`: the node wants its stages elsewhere; `admin`: it can invite and
    remove nodes, and renews certificates that ran out at the addresses `renewals`, joined by commas. Its own
    is valid until `certificate_ends`, in seconds since 1970. `page` is where other machines find its page;
    empty: nowhere.
    """

    node: str
    name: str
    build: str
    devices: tuple[Device, ...]
    disk_free_bytes: int
    api: str
    rtts: dict[str, float]
    bytes_per_second: dict[str, float]  # to other nodes, where it was measured
    slices: tuple[SliceHeld, ...]
    stages: tuple[StageReport, ...]
    draining: bool = False
    inbox: str = ""
    offers: tuple[Offer, ...] = ()
    admin: bool = False
    version: str = ""
    renewals: str = ""
    certificate_ends: float = 0.0
    doubts: tuple[Doubt, ...] = ()
    page: str = ""

    @property
    def cpu_variant(self) -> str:
        """Which of libllama's CPU backends the node computes with."""
        return self.build.rpartition(" ")[2]


class Hosted(msgspec.Struct, frozen=True):
    """How busy a model is at its host, by stream key: streams, and the tokens per second of all together.

    `inherited_tokens` were taken over from the placement before instead of being computed again.
    `batch_invariant`: a row gives the same bits alone, batched and replayed; None: not known (yet).
    `spot_checks`: how often stages were checked by computing again, and were right. Of the tokens to come
    `guessed` were computed before it was known that they come, and `accepted` of these came; `speculates`:
    that is done now.
    """

    key: str
    active: int
    waiting: int
    tokens_per_second: float
    inherited_tokens: int = 0
    batch_invariant: bool | None = None
    spot_checks: int = 0
    speculates: bool = False
    guessed: int = 0
    accepted: int = 0


class Fetching(msgspec.Struct, frozen=True):
    """How far a node is with a slice."""

    model: str
    first: int
    last: int
    done_bytes: int
    total_bytes: int


class Reading(msgspec.Struct, frozen=True):
    """How far a node is with reading a whole model once, to know its chunks; then it is deployed as `name`.

    With a `source` ('owner/name/file.gguf') it is read from the hub, else from the node's disk.
    """

    name: str
    source: str
    done_bytes: int
    total_bytes: int


class KeyUse(msgspec.Struct, frozen=True):
    """What one key of the API used at a gateway: counts only. `at_once` are its requests under way; the
    others are those of its ledger (access/ledger.py), and only grow."""

    name: str
    at_once: int = 0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    joules: float | None = None
    first: float = 0.0
    last: float = 0.0


class Gauges(msgspec.Struct, frozen=True):
    """What changes all the time at a node. Nothing is placed by it: it travels beside the facts.

    `watts` is what its processors take, where the machine tells; `used` by which keys, lately.
    """

    hosted: tuple[Hosted, ...] = ()
    fetching: tuple[Fetching, ...] = ()
    watts: float | None = None
    reading: tuple[Reading, ...] = ()
    used: tuple[KeyUse, ...] = ()


@lru_cache(maxsize=4096)
def placement_id(placement: Placement) -> str:
    """The id of a placement: the hash of its content."""
    return hashlib.sha256(msgspec.msgpack.encode(placement)).hexdigest()[:16]


def stream_key(model: str, context: int, only: tuple[str, ...] = ()) -> str:
    """What streams ask for: a model, by its digest, and at least `context` tokens of context.

    One file may be deployed under two names, with a context for each. A scheduler host answers the streams of
    either if its own context does, and if both may run on the same nodes: a deployment's `only`.
    """
    kept = "@" + hashlib.sha256(",".join(only).encode()).hexdigest()[:16] if only else ""
    return f"{model}{kept}/{context}"


def best_host(wirings: Mapping[str, str], wanted: str) -> str | None:
    """Of the scheduler hosts of a node the one that is to answer streams of the key `wanted`, by its own key.

    `wirings` has the wiring of each, "" where it has none: one that can answer now is better, then the one
    with the least context that does.
    """
    model, context = _parts(wanted)
    found: list[tuple[bool, int, str]] = []
    for key, wiring in wirings.items():
        other, held = _parts(key)
        if other == model and held >= context:
            found.append((not wiring, held, key))
    return min(found)[2] if found else None


def _parts(key: str) -> tuple[str, int]:
    """Model (and where it may run) and context of a stream key; no model's where another node says something
    else."""
    model, _, context = key.rpartition("/")
    return (model, int(context)) if re.fullmatch("[0-9]{1,18}", context) else ("", 0)


def wiring_id(placement: Placement, workers: Sequence[str]) -> str:
    """The id of the links between these workers, one for each stage of the placement, in order."""
    return _wiring_id(placement, tuple(workers))


@lru_cache(maxsize=4096)
def _wiring_id(placement: Placement, workers: tuple[str, ...]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode((placement_id(placement), workers))).hexdigest()[:16]
