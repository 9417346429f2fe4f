"""The mind of a node: what it heard, what it is, and what it should do; composed of the pure parts.

    heartbeats, liveliness ----> Membership --.
    wishes of all nodes --> Wishes       >--> View --> choose --> goals --> Crew --> orders
    own facts ------------> Mind  -------'

Pure: the shell hands in what happened with the time, and asks for the heartbeat to send and the goals to
pursue. `now` is a clock that never jumps, in seconds since anything; `clock` is seconds since 1970 as the
machine believes, which may be wrong. Nothing here lasts: after a restart all but the wishes is heard again.
"""

import math
from collections.abc import Iterable, Mapping

from cordee.cluster.choose import Chosen, Planning, choose
from cordee.cluster.deployments import Deployment, Deployments
from cordee.cluster.facts import Facts, Gauges, ModelShape
from cordee.cluster.goals import Goals, goals
from cordee.cluster.membership import LISTEN_SECONDS, Farewell, Heartbeat, Liveness, Membership, View

# Goals are computed anew when the view changed, and so often in any case: what is kept may be damaged.
RETHINK_SECONDS = 10.0


class Controller:
    """See the module's theory of operation.

    `session` is random and new with each start of the agent. `wishes` and the nodes that were `remembered`
    are those of the last run, from disk.
    """

    def __init__(
        self,
        me: str,
        session: str,
        planning: Planning,
        deployments: Iterable[Deployment] = (),
        remembered: Iterable[str] = (),
    ) -> None:
        self.me = me
        self._session = session
        self._planning = planning
        self._membership = Membership(me)
        self._deployments = Deployments(deployments)
        self._facts: Facts | None = None
        self._offset = 0.0  # the machine's clock less `now`
        self._revocations: dict[str, bytes] = {}
        self._view: View | None = None
        self._planned = -math.inf
        self._observed = -math.inf
        self._listens_until = 0.0
        # Whom to hear before there is nobody more to listen for; empty: listen for LISTEN_SECONDS.
        self._awaited = set(remembered) - {me}
        self._heard = {me}  # since the start, while anybody is awaited
        self._chosen: dict[str, tuple[Chosen, ...]] = {}
        self._goals = Goals()

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """What the cluster is wished to serve, to be kept on disk; with `replicas` 0: taken back."""
        return self._deployments.all

    @property
    def chosen(self) -> Mapping[str, tuple[Chosen, ...]]:
        """What the last `plan` found should run, by model."""
        return self._chosen

    def observe(
        self, facts: Facts, now: float, clock: float, revocations: Mapping[str, bytes] | None = None
    ) -> None:
        """Our own facts, the machine's clock, and the valid revocations by node; all of them, each time.

        To be called once a heartbeat at least. After its start and after a longer silence the node listens
        before it plans anything; after its start until it heard all whom it remembers or sees, and all of
        whom those tell.
        """
        stopped = not 0 <= now - self._observed <= LISTEN_SECONDS
        if stopped or not self._listens_until <= now + LISTEN_SECONDS:
            self._listens_until = now + LISTEN_SECONDS
        if now >= self._listens_until:
            self._awaited.clear()
        self._observed = now
        self._facts = facts
        self._offset = clock - now
        self._revocations = dict(revocations or {})
        self._membership.settle(now)
        self._deployments.settle(self._clock(now))

    def hear(self, heartbeat: Heartbeat, now: float) -> bool:
        """A heartbeat came; False if it changes nothing. Its revocations are the shell's to check first."""
        if heartbeat.facts.node == self.me or self._refuses(heartbeat.facts.node):
            return False
        if self._awaited:
            self._listen(heartbeat.facts, now)
        before = self._deployments.all
        if heartbeat.deployments != before:
            self._deployments.merge(heartbeat.deployments, self._clock(now))
        return self._membership.hear(heartbeat, now) or self._deployments.all is not before

    def _listen(self, facts: Facts, now: float) -> None:
        """Who was heard may tell of others: all whom it measured, or runs a placement with."""
        self._heard.add(facts.node)
        self._awaited.update(facts.rtts)
        for report in facts.stages:
            self._awaited.update(place.node for place in report.placement.stages)
        if self._awaited <= self._heard:
            self._awaited.clear()
            self._listens_until = now

    def liveliness(self, node: str, alive: bool, now: float) -> None:
        """A node's token came or went."""
        if alive and self._awaited:
            self._awaited.add(node)
        self._membership.liveliness(node, alive, now)

    def deploy(
        self,
        model: str,
        shape: ModelShape | None,
        context: int,
        sequences: int,
        now: float,
        replicas: int = 1,
        source: str = "",
    ) -> None:
        """Wish a model to be served by the cluster, or with `replicas` 0 no more."""
        deployment = Deployment(model, shape, context, sequences, replicas, author=self.me, source=source)
        self._deployments.write(deployment, self._clock(now))

    def nodes(self, now: float) -> dict[str, tuple[Liveness, Facts]]:
        """All known nodes, us included, by id."""
        known = {node: seen for node, seen in self._membership.facts(now).items() if not self._refuses(node)}
        if self._facts is not None:
            known[self.me] = ("alive", self._facts)
        return dict(sorted(known.items()))

    def gauges(self, now: float) -> dict[str, Gauges]:
        """What the other nodes that are alive measured last, by id."""
        return self._membership.gauges(now)

    def heartbeat(self, now: float, gauges: Gauges = Gauges(), farewell: Farewell = "") -> Heartbeat:  # noqa: B008
        """What to say now. `observe` comes first."""
        assert self._facts is not None
        return Heartbeat(
            self._session,
            now,
            now + self._offset,
            self._facts,
            self._deployments.all,
            tuple(self._revocations[node] for node in sorted(self._revocations)),
            gauges,
            farewell,
        )

    def plan(self, now: float) -> Goals:
        """What this node should do. `observe` comes first."""
        view = self._look(now)
        if view != self._view or not 0 <= now - self._planned < RETHINK_SECONDS:
            self._chosen = choose(view, self._planning)
            self._goals = goals(view, self.me, self._chosen, self._planning)
            self._view, self._planned = view, now
        return self._goals

    def _refuses(self, node: str) -> bool:
        return node in self._revocations

    def _look(self, now: float) -> View:
        known = self.nodes(now)
        return View(
            {node: facts for node, (state, facts) in known.items() if state != "gone"},
            frozenset(node for node, (state, _) in known.items() if state == "suspect"),
            tuple(deployment for deployment in self._deployments.all if deployment.replicas > 0),
            now < self._listens_until,
        )

    def _clock(self, now: float) -> float:
        return self._membership.clock(now + self._offset, now)
