"""Deployments: which models the cluster is to serve. One map for all nodes; the last writer wins.

Theory of operation. Every node holds the whole map and sends it with every heartbeat. A node that hears one
keeps, for each model, the deployment with the greatest (stamp, author, content). Taking the greatest is
associative, commutative and idempotent, so loss, repetition and order of messages do not matter.

Stamps are seconds of the *cluster's clock*, the median of the live nodes' clocks. One clock that is a day off
does not move it, and a stamp that a fault wrote is not believed:

    stamp <= clock + AHEAD_SECONDS    kept as it is
    later, before 0, or no number     becomes 0: the deployment gives way to any other of its model

    unsound (`is_sound`), or not      dropped, heard or held: no node may hold what others do not take
    signed by its author

It does not become `clock`: then a machine that comes back after a year with a wrong stamp on its disk would
undo what was deployed since. The author signs the stamp that it wrote (`written`), so that a node can doubt a
stamp, but not raise it.

Why that converges: once nodes hear each other, the clocks that they compute differ by little, and time makes
every stamp more credible, never less; so what one node believes all others believe that little later. From
then on the greatest stamp in the cluster neither grows nor shrinks, and reaches every node. A deployment that
is written later wins: its stamp is past the one it replaces, and credible, as it is about now.

**Authors.** A deployment counts if its author is a member, or was one that left. Those of a *removed* node
are dropped, however old: it could write more, and somebody could bring them. So that nothing stops, the admin
that removes a node first writes the node's deployments again in its own name (`adopt`).

**Bounds.** DEPLOYMENTS_MAX in all. Above that the author with the most gives one up, so nobody crowds out
what others deployed: of its own one that was undeployed, else the oldest.
"""

import heapq
import itertools
from collections.abc import Collection, Iterable
from functools import lru_cache

import msgspec

from cordee.cluster.facts import NODES_MAX, ModelShape
from cordee.cluster.soundness import fault
from cordee.cluster.trust import Trust

# Clocks of a LAN agree better than this; a wrong stamp outlives the cluster's clock by no more.
AHEAD_SECONDS = 60.0
# By how much a deployment's stamp passes that of the one it replaces, if the clock has not. A float of the
# present resolves a quarter of a microsecond.
TICK_SECONDS = 0.001
# Deployments, those with no replicas included. Heartbeats carry all of them.
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
    without one nothing outside the cluster is asked for it. `only` are the nodes (ids, sorted) that may run
    or copy it; empty: all.

    The `signature` is the author's, under all but the certificate, with `written` as the stamp.
    """

    model: str
    shape: ModelShape | None
    context: int
    sequences: int
    replicas: int = 1
    stamp: float = 0.0
    author: str = ""
    source: str = ""
    only: tuple[str, ...] = ()
    written: float = 0.0
    certificate: bytes = b""
    signature: bytes = b""


class Deployments:
    """See the module's theory of operation. `clock` is always the cluster's.

    `deployments` are those of the last run. What an older version wrote there has no signature: it gets this
    node's.
    """

    def __init__(self, trust: Trust, deployments: Iterable[Deployment] = ()) -> None:
        self._trust = trust
        # A heartbeat with what is known costs no signature; what is held may be damaged, which shows.
        self._is_signed = lru_cache(maxsize=4 * DEPLOYMENTS_MAX)(self._check_signature)
        self._deployments: dict[str, Deployment] = {}
        self._sorted: tuple[Deployment, ...] | None = None
        for deployment in deployments:
            signed = deployment if deployment.signature else self._signed(deployment)
            self._keep_greatest(signed)
        self._forget()

    @property
    def all(self) -> tuple[Deployment, ...]:
        """Every deployment, sorted by model; those with `replicas` 0 are models that were undeployed."""
        if self._sorted is None:
            self._sorted = tuple(self._deployments[model] for model in sorted(self._deployments))
        return self._sorted

    def merge(
        self, deployments: Iterable[Deployment], clock: float, removed: Collection[str] = frozenset()
    ) -> str:
        """Take in the map that another node sent; says what was wrong with one that was not taken, if any.

        Deployments of `removed` nodes are passed over.
        """
        wrong = ""
        for deployment in itertools.islice(deployments, DEPLOYMENTS_MAX):
            if deployment.author not in removed:
                wrong = self._keep_greatest(_credible(deployment, clock)) or wrong
        self._forget()
        return wrong

    def settle(self, clock: float, removed: Collection[str] = frozenset()) -> None:
        """Doubt what is held, too: memory and disk may hold what no node would write."""
        for deployment in self.all:
            credible = _credible(deployment, clock)
            if credible.author in removed or self._fault(credible):
                del self._deployments[deployment.model]
                self._sorted = None
            elif credible is not deployment:
                self._put(credible)
        self._forget()

    def write(self, deployment: Deployment, clock: float) -> None:
        """Replace the deployment of its model, here and soon everywhere. Author and stamp are set here."""
        old = self._deployments.get(deployment.model)
        stamp = clock if old is None else max(clock, _credible(old, clock).stamp + TICK_SECONDS)
        self._put(self._signed(msgspec.structs.replace(deployment, stamp=stamp)))
        self._forget()

    def adopt(self, author: str, clock: float) -> None:
        """Write what a node deployed in our own name, before that node is removed."""
        for deployment in self.all:
            if deployment.author == author:
                self.write(deployment, clock)

    def _signed(self, deployment: Deployment) -> Deployment:
        ours = msgspec.structs.replace(
            deployment,
            author=self._trust.node,
            written=deployment.stamp,
            certificate=self._trust.member_certificate,
        )
        return msgspec.structs.replace(ours, signature=self._trust.sign_statement(statement(ours)))

    def _fault(self, deployment: Deployment) -> str:
        """What is wrong with a deployment, "" if nothing is."""
        if not is_sound(deployment):
            return "a deployment that is none"
        if not self._is_signed(deployment):
            return "a deployment that its author did not sign"
        return ""

    def _check_signature(self, deployment: Deployment) -> bool:
        return self._trust.is_signed(
            deployment.author, deployment.certificate, statement(deployment), deployment.signature
        )

    def _keep_greatest(self, deployment: Deployment) -> str:
        """Hold a deployment that is greater than what is held; says what is wrong if that cannot be."""
        held = self._deployments.get(deployment.model)
        if held is not None and (deployment == held or _rank(deployment) <= _rank(held)):
            return ""
        if found := self._fault(deployment):
            return found
        self._put(deployment)
        return ""

    def _put(self, deployment: Deployment) -> None:
        self._deployments[deployment.model] = deployment
        self._sorted = None

    def _forget(self) -> None:
        excess = len(self._deployments) - DEPLOYMENTS_MAX
        if excess <= 0:
            return
        ranked = sorted(self._deployments.values(), key=lambda e: (e.replicas == 0, -e.stamp, e.model))
        own: dict[str, list[Deployment]] = {}
        for each in ranked:
            own.setdefault(each.author, []).append(each)
        most = [(-len(each), author) for author, each in own.items()]
        heapq.heapify(most)
        for _ in range(excess):
            count, author = most[0]
            del self._deployments[own[author].pop().model]
            heapq.heapreplace(most, (count + 1, author))
        self._sorted = None


@lru_cache(maxsize=4 * DEPLOYMENTS_MAX)
def is_sound(deployment: Deployment) -> bool:
    """Whether a deployment is what a node could have written: its counts, its texts, its shape."""
    return (
        1 <= deployment.context <= CONTEXT_MAX
        and 1 <= deployment.sequences <= SEQUENCES_MAX
        and 0 <= deployment.replicas <= REPLICAS_MAX
        and len(deployment.source) <= SOURCE_CHARS_MAX
        and len(deployment.only) <= NODES_MAX
        and deployment.stamp in (deployment.written, 0.0)
        and not fault(deployment)
    )


def statement(deployment: Deployment) -> bytes:
    """What an author signs."""
    said = msgspec.structs.replace(deployment, stamp=deployment.written, certificate=b"", signature=b"")
    return b"cordee deployment " + msgspec.msgpack.encode(said)


def _credible(deployment: Deployment, clock: float) -> Deployment:
    if 0 <= deployment.stamp <= clock + AHEAD_SECONDS:  # false for a NaN
        return deployment
    return msgspec.structs.replace(deployment, stamp=0.0)


def _rank(deployment: Deployment) -> tuple[float, str, bytes]:
    return deployment.stamp, deployment.author, msgspec.msgpack.encode(deployment)
