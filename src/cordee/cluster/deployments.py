"""Deployments: which models the cluster is to serve. One map for all nodes; the last writer wins.

Theory of operation. Every node holds the whole map and sends it with every heartbeat. A node that hears one
keeps, for each model, the deployment with the greatest (stamp, author, content). Taking the greatest is
associative, commutative and idempotent, so loss, repetition and order of messages do not matter.

Stamps are seconds of the *cluster's clock*, the median of the live nodes' clocks. One clock that is a day off
does not move it, and a stamp that a fault wrote is not believed:

    stamp <= clock + AHEAD_SECONDS    kept as it is
    later, before 0, or no number     becomes 0: the deployment gives way to any other of its model

    unsound (`is_sound`)              dropped, heard or held: no node may hold what others do not take

It does not become `clock`: then a machine that comes back after a year with a wrong stamp on its disk would
undo what was deployed since.

Why that converges: once nodes hear each other, the clocks that they compute differ by little, and time makes
every stamp more credible, never less; so what one node believes all others believe that little later. From
then on the greatest stamp in the cluster neither grows nor shrinks, and reaches every node. A deployment that
is written later wins: its stamp is past the one it replaces, and credible, as it is about now.
"""

import itertools
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from cordee.cluster.facts import NODES_MAX, ModelShape
from cordee.cluster.soundness import fault

# Clocks of a LAN agree better than this; a wrong stamp outlives the cluster's clock by no more.
AHEAD_SECONDS = 60.0
# By how much a deployment's stamp passes that of the one it replaces, if the clock has not. A float of the
# present resolves a quarter of a microsecond.
TICK_SECONDS = 0.001
# Deployments, those with no replicas included; the latest stay. Heartbeats carry all of them.
DEPLOYMENTS_MAX = 64
# The name of a repository has at most 96 characters, the path of a file in it seldom more than 100.
SOURCE_CHARS_MAX = 400
# More than these nobody could serve, but it would be planned for.
CONTEXT_MAX = 1 << 24  # tokens; sixteen times the longest that any model is made for
SEQUENCES_MAX = 4096
REPLICAS_MAX = NODES_MAX


class Deployment(msgspec.Struct, frozen=True, cache_hash=True):
    """Serve `model` (a name), or with `replicas` 0 serve it no longer.

    The shape comes along so that every node can plan. `context` is in tokens for each of `sequences` streams.
    `source` is where on the hub ('owner/name/file.gguf') the model may be fetched from if no node has it;
    without one nothing outside the cluster is asked for it.
    """

    model: str
    shape: ModelShape | None
    context: int
    sequences: int
    replicas: int = 1
    stamp: float = 0.0
    author: str = ""
    source: str = ""


class Deployments:
    """See the module's theory of operation. `clock` is always the cluster's."""

    def __init__(self, deployments: Iterable[Deployment] = ()) -> None:
        self._deployments: dict[str, Deployment] = {}
        self._sorted: tuple[Deployment, ...] | None = None
        for deployment in deployments:
            self._keep_greatest(deployment)

    @property
    def all(self) -> tuple[Deployment, ...]:
        """Every deployment, sorted by model; those with `replicas` 0 are models that were undeployed."""
        if self._sorted is None:
            self._sorted = tuple(self._deployments[model] for model in sorted(self._deployments))
        return self._sorted

    def merge(self, deployments: Iterable[Deployment], clock: float) -> None:
        """Take in the map that another node sent, as far as it is sound."""
        for deployment in itertools.islice(deployments, DEPLOYMENTS_MAX):
            if deployment is not self._deployments.get(deployment.model):
                credible = _credible(deployment, clock)
                if is_sound(credible):
                    self._keep_greatest(credible)
        self._forget()

    def settle(self, clock: float) -> None:
        """Doubt what is held, too: memory and disk may hold what no node would write."""
        for deployment in self.all:
            credible = _credible(deployment, clock)
            if not is_sound(credible):
                del self._deployments[deployment.model]
                self._sorted = None
            elif credible is not deployment:
                self._put(credible)

    def write(self, deployment: Deployment, clock: float) -> None:
        """Replace the deployment of its model, here and soon everywhere. The stamp is set here."""
        old = self._deployments.get(deployment.model)
        stamp = clock if old is None else max(clock, _credible(old, clock).stamp + TICK_SECONDS)
        self._put(msgspec.structs.replace(deployment, stamp=stamp))
        self._forget()

    def _keep_greatest(self, deployment: Deployment) -> None:
        old = self._deployments.get(deployment.model)
        if old is None or (deployment != old and _rank(deployment) > _rank(old)):
            self._put(deployment)

    def _put(self, deployment: Deployment) -> None:
        self._deployments[deployment.model] = deployment
        self._sorted = None

    def _forget(self) -> None:
        excess = len(self._deployments) - DEPLOYMENTS_MAX
        if excess > 0:
            for oldest in sorted(self._deployments.values(), key=_rank)[:excess]:
                del self._deployments[oldest.model]
            self._sorted = None


@lru_cache(maxsize=4 * DEPLOYMENTS_MAX)
def is_sound(deployment: Deployment) -> bool:
    """Whether a deployment is what a node could have written: its counts, its texts, its shape."""
    return (
        1 <= deployment.context <= CONTEXT_MAX
        and 1 <= deployment.sequences <= SEQUENCES_MAX
        and 0 <= deployment.replicas <= REPLICAS_MAX
        and not fault(deployment)
    )


def _credible(deployment: Deployment, clock: float) -> Deployment:
    if len(deployment.source) > SOURCE_CHARS_MAX:
        deployment = msgspec.structs.replace(deployment, source="")
    if 0 <= deployment.stamp <= clock + AHEAD_SECONDS:  # false for a NaN
        return deployment
    return msgspec.structs.replace(deployment, stamp=0.0)


def _rank(deployment: Deployment) -> tuple[float, str, bytes]:
    return deployment.stamp, deployment.author, msgspec.msgpack.encode(deployment)
