"""What nodes tell each other about themselves: the vocabulary of the cluster, and its wire format (msgpack).

Everything here is soft state. A node says it again and again, whoever hears it keeps the last word, and what
is no longer said is forgotten; so nothing that a fault wrote into it survives.
"""

from typing import Literal

import msgspec

DeviceKind = Literal["cpu", "gpu"]
StageState = Literal["fetching", "loading", "loaded", "wired", "failed"]


class Device(msgspec.Struct, frozen=True):
    """Something that runs stages.

    `memory_bytes` is what stages may take of it, reserve subtracted; `read_bytes_per_second` how fast it
    reads weights in a decode, measured on the node.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    read_bytes_per_second: float


class ModelShape(msgspec.Struct, frozen=True):
    """What of a model decides where it can run; per-layer tuples have one item a layer, bytes throughout.

    `active_bytes` of a layer are read for one token (of a mixture of experts only those chosen).
    `embedding_bytes` lie with the host, `head_bytes` with the last stage. `cell_bytes` is the KV cache of one
    token in each layer. `stage_bytes` is what any stage takes beside weights and KV cache, `head_extra_bytes`
    what the last takes beside that.
    """

    digest: str
    architecture: str
    n_embd: int
    n_vocab: int
    layer_bytes: tuple[int, ...]
    active_bytes: tuple[int, ...]
    cell_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    active_head_bytes: int
    stage_bytes: int
    head_extra_bytes: int
    cuttable: bool = True

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.layer_bytes)


class StagePlace(msgspec.Struct, frozen=True):
    """A stage's layers, `first` to `last` (exclusive), and the device of the node that runs them."""

    node: str
    device: str
    first: int
    last: int


class Placement(msgspec.Struct, frozen=True):
    """Which node runs which layers of a model; the stages cover all layers once, in order.

    `context` is in tokens for each of `sequences` streams. The host (scheduler) is the first stage's node.
    """

    model: str  # the shape's digest
    context: int
    sequences: int
    stages: tuple[StagePlace, ...]


class StageReport(msgspec.Struct, frozen=True):
    """A stage that a node runs, or is about to.

    `worker` is random and new for each process: the KV cache lives and dies with it. `endpoint` is where it
    takes rows. `wiring` names the links it is joined by.
    """

    placement: Placement
    index: int
    state: StageState
    worker: str = ""
    endpoint: str = ""
    wiring: str = ""
    detail: str = ""


class SliceHeld(msgspec.Struct, frozen=True):
    """Layers of a model that lie whole on the node's disk. With (0, layers) and `whole`, all of the model."""

    model: str
    first: int
    last: int
    whole: bool = False


class Facts(msgspec.Struct, frozen=True):
    """What a node is, has and runs now.

    `rtts` are seconds to other nodes and back, as measured; `build` names the engine's build (streams move
    token-identically only between equal ones); `draining`: the node wants its stages elsewhere.
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
