"""The controller of a node: from what it heard, is and runs to what it does next. Pure.

    heartbeats, liveliness -------> Membership --.
    deployments of all nodes -----> Deployments --> View --> choose --> goals --.
    own facts --------------------> Controller --'                              |
                                                                                v
    workers, hosts, routes as they really are -----------------------> Reconciler --> Decision

The agent (`cordee.agent`) and the simulator (`sim/`) are shells around it: they hand in what happened with
the time, call `step` whenever something may have changed and once a heartbeat in any case, and carry out what
it decides. Each step looks at everything anew, so a missed event costs a moment and a wrong state is mended
by the next step; carrying out a decision twice does no harm.

`now` is a clock that never jumps, in seconds since any moment; `clock` is seconds since 1970 as the machine
believes, which may be wrong. Nothing here lasts: after a restart all but the deployments is heard again.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import msgspec

from cordee.cluster.choose import Chosen, Planning, choose_apart, without
from cordee.cluster.clones import Clones
from cordee.cluster.deployments import Deployment, Deployments
from cordee.cluster.doubts import DOUBT_SECONDS, Doubts
from cordee.cluster.facts import NODES_MAX, Facts, Gauges, ModelShape, Offer, Placement, stream_key
from cordee.cluster.goals import Goals, HostGoal, SliceGoal, StageSpec, goals
from cordee.cluster.membership import LISTEN_SECONDS, Farewell, Heartbeat, Liveness, Membership, View
from cordee.cluster.patience import Patience
from cordee.cluster.reconcile import Actions, Reconciler, WorkerStatus
from cordee.cluster.soundness import fault
from cordee.cluster.trust import Trust

# Goals are computed anew when the view changed, and this often in any case: what is kept may be damaged.
RETHINK_SECONDS = 10.0


@dataclass(frozen=True)
class Running:
    """What really runs on a node.

    `workers` by id. By stream key: `wirings`, each the one that a scheduler host of ours works on ("" for
    none), and `routes`, the node to which the streams of our clients go.
    """

    workers: Mapping[str, WorkerStatus]
    wirings: Mapping[str, str]
    routes: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """What a node is to do, in this order. `hosts` and `routes` say all that should be, not a difference.

    `hosts` are the schedulers to run and `routes` the nodes to which streams go, both by stream key: no other
    scheduler is to run, no other route to be used. With `is_news` the others should hear our facts at once.
    """

    actions: Actions
    hosts: Mapping[str, HostGoal]
    routes: Mapping[str, str]
    is_news: bool


class Controller:
    """See the module's theory of operation.

    `session` is random and new with each start of the agent; `trust` signs what this node deploys.
    `deployments` and the nodes that were `remembered` are those of the last run, from disk.
    """

    def __init__(
        self,
        me: str,
        session: str,
        planning: Planning,
        trust: Trust,
        deployments: Iterable[Deployment] = (),
        remembered: Iterable[str] = (),
    ) -> None:
        self.me = me
        self._session = session
        self._planning = planning
        self._trust = trust
        self._membership = Membership(me)
        self._clones = Clones(me, session)
        self._deployments = Deployments(trust, deployments)
        self._unsound: dict[str, tuple[int, str]] = {}
        self._facts: Facts | None = None
        self._offset = 0.0  # the machine's clock less `now`
        self._revocations: dict[str, bytes] = {}
        self._view: View | None = None
        self._planned = -math.inf
        self._observed = -math.inf
        self._listens_until = 0.0
        # The nodes to hear from before listening ends early; empty: listen for LISTEN_SECONDS.
        self._awaited = set(remembered) - {me}
        self._heard = {me}  # since the start, while any node is awaited
        self._chosen: dict[str, tuple[Chosen, ...]] = {}
        self._aside: dict[ModelShape, str] = {}
        self._unfound: dict[ModelShape, str] = {}
        self._goals = Goals()
        self._reconciler = Reconciler()
        self._doubts = Doubts()
        self._patience = Patience(me, planning)
        self._said: Facts | None = None  # in the last heartbeat

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """What the cluster is to serve, or with `replicas` 0 no longer; the shell keeps it on disk."""
        return self._deployments.all

    @property
    def revoked(self) -> Collection[str]:
        """The nodes that were removed from the cluster, by id."""
        return self._revocations.keys()

    @property
    def failures(self) -> Collection[StageSpec]:
        """The stages of this node that count as failed."""
        return self._reconciler.failures

    @property
    def goals(self) -> Goals:
        """What this node should do, as the last `step` found."""
        return self._goals

    @property
    def chosen(self) -> Mapping[str, tuple[Chosen, ...]]:
        """What the last `plan` found should run, by model."""
        return self._chosen

    @property
    def aside(self) -> Mapping[ModelShape, str]:
        """The deployed models that nothing runs of because planning them failed, each with the reason."""
        return self._aside

    @property
    def unfound(self) -> Mapping[ModelShape, str]:
        """The deployed models that nothing runs of as no placement was found in bounded time, and why."""
        return self._unfound

    @property
    def unsound(self) -> Mapping[str, tuple[int, str]]:
        """By node: how often it said what was dropped as unsound, and what was wrong the last time."""
        return self._unsound

    def step(
        self,
        facts: Facts,
        running: Running,
        now: float,
        clock: float,
        revocations: Mapping[str, bytes] | None = None,
    ) -> Decision:
        """Look at everything, and decide. `facts` are ours now, without `stages` and `doubts`.

        The other arguments are those of `observe`.
        """
        reports = () if self._facts is None else self._facts.stages
        actions = Actions()
        self._doubts.settle(now)
        facts = msgspec.structs.replace(facts, doubts=self._doubts.said(now))
        for _ in range(2):  # the second time with what the first makes us say
            self.observe(msgspec.structs.replace(facts, stages=reports), now, clock, revocations)
            self.plan(now)
            actions = self._reconciler.step(self._goals, running.workers, facts.slices, now)
            if actions.reports == reports:
                break
            reports = actions.reports
        self._facts = msgspec.structs.replace(facts, stages=reports)
        self._wait(now)
        hosts = self._hosts(running, actions)
        return Decision(actions, hosts, self._routes(running.routes), self._facts != self._said)

    def failed(self, spec: StageSpec, detail: str, now: float) -> None:
        """A worker could not load what it should hold."""
        self._reconciler.failed(spec, detail, now)

    def doubt(self, node: str, reason: str, now: float, seconds: float = DOUBT_SECONDS) -> None:
        """A node disappointed, in a way that the controller cannot see: it is left out for `seconds`, and
        for longer the next time."""
        self._doubts.note(node, reason, now, seconds)

    def unreachable(self, reasons: Mapping[str, str]) -> None:
        """The nodes that this one cannot connect to now, and why; all of them, each time."""
        self._doubts.unreachable(reasons)

    def fetch_failed(self, goal: SliceGoal, detail: str, now: float) -> None:
        """A slice could not be had: the stages that need it fail."""
        for stage in self._goals.stages:
            if stage.spec.slice == goal:
                self.failed(stage.spec, detail, now)

    def observe(
        self, facts: Facts, now: float, clock: float, revocations: Mapping[str, bytes] | None = None
    ) -> None:
        """Our own facts, the machine's clock, and the valid revocations by node; all of them, each time.

        To be called at least once a heartbeat. After its start and after a longer pause the node listens
        before it plans anything; after its start until it heard all nodes that it remembers or sees, and all
        that those name.
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
        self._clones.settle(now)
        self._deployments.settle(self._clock(now), self._revocations)

    def hear(self, heartbeat: Heartbeat, now: float) -> bool:
        """A heartbeat came; False if it changes nothing. The shell checks its revocations first.

        One that is unsound (soundness.py) is dropped and counted in `unsound`.
        """
        if self._refuses(heartbeat.facts.node):
            return False
        known = self._membership.said(heartbeat.facts.node)
        if known == heartbeat.facts:  # as with most: then there is one object, which was looked at before
            heartbeat = msgspec.structs.replace(heartbeat, facts=known)
        if found := fault(msgspec.structs.replace(heartbeat, deployments=()), known):
            self.count_unsound(heartbeat.facts.node, found)
            return False
        self._clones.hear(heartbeat, now)
        if heartbeat.facts.node == self.me:
            return False
        if self._awaited:
            self._listen(heartbeat.facts, now)
        before = self._deployments.all
        if heartbeat.deployments != before:
            wrong = self._deployments.merge(heartbeat.deployments, self._clock(now), self._revocations)
            if wrong:
                self.count_unsound(heartbeat.facts.node, wrong)
        return self._membership.hear(heartbeat, now) or self._deployments.all is not before

    def count_unsound(self, node: str, what: str) -> None:
        """A node said what no sound node says; it changed nothing."""
        if node in self._unsound or len(self._unsound) < NODES_MAX:
            self._unsound[node] = (self._unsound.get(node, (0, ""))[0] + 1, what)

    def _listen(self, facts: Facts, now: float) -> None:
        """A node that was heard may name others: those it measured, or runs a placement with."""
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
        only: Iterable[str] = (),
    ) -> None:
        """Have the cluster serve a model from now on, or with `replicas` 0 no longer.

        `only` are the nodes that may run or copy it, by id; none: all.
        """
        nodes = tuple(sorted(set(only)))
        deployment = Deployment(model, shape, context, sequences, replicas, source=source, only=nodes)
        self._deployments.write(deployment, self._clock(now))

    def adopt(self, node: str, now: float) -> None:
        """Before a node is removed: what it deployed is ours from now on (see deployments.py)."""
        self._deployments.adopt(node, self._clock(now))

    def is_listening(self, now: float) -> bool:
        """Whether this node has just started and has not heard all others yet."""
        return now < self._listens_until

    def nodes(self, now: float) -> dict[str, tuple[Liveness, Facts]]:
        """All known nodes, us included, by id."""
        known = {node: seen for node, seen in self._membership.facts(now).items() if not self._refuses(node)}
        if self._facts is not None:
            known[self.me] = ("alive", self._facts)
        return dict(sorted(known.items()))

    def offers(self, now: float) -> dict[str, Offer]:
        """The models that nodes have whole, by name; of several with one name that of the smallest digest."""
        found: dict[str, Offer] = {}
        for _, facts in self.nodes(now).values():
            for offer in facts.offers:
                other = found.get(offer.name)
                if other is None or offer.shape.digest < other.shape.digest:
                    found[offer.name] = offer
        return found

    def models(self, now: float) -> dict[str, tuple[ModelShape, int, tuple[str, ...]]]:
        """Shape, context and `only` of all that clients may ask for, offered or deployed, by name."""
        models = {
            name: (offer.shape, offer.context, tuple[str, ...]()) for name, offer in self.offers(now).items()
        }
        for each in self.deployments:
            if each.shape is not None and each.replicas:
                models[each.model] = (each.shape, each.context, each.only)
        return models

    def clones(self, now: float) -> frozenset[str]:
        """The nodes, perhaps us included, that two machines run as."""
        return self._clones.nodes(now)

    def is_newer_clone(self, now: float) -> bool:
        """Whether another machine has been running as this node for longer than we do."""
        return self._clones.is_newer(now)

    def gauges(self, now: float) -> dict[str, Gauges]:
        """What the other nodes that are alive measured last, by id."""
        return self._membership.gauges(now)

    def clocks(self, now: float) -> dict[str, float]:
        """By how many seconds the clocks of the other alive nodes are ahead of ours, by id."""
        return self._membership.clocks(now + self._offset, now)

    def heartbeat(self, now: float, gauges: Gauges = Gauges(), farewell: Farewell = "") -> Heartbeat:  # noqa: B008
        """What to say now. `step` comes first."""
        assert self._facts is not None
        self._said = self._facts
        return Heartbeat(
            self._session,
            now,
            now + self._offset,
            self._facts,
            self._deployments.all,
            tuple(self._revocations[node] for node in sorted(self._revocations)),
            gauges,
            farewell,
            age_seconds=self._clones.age_seconds(now),
            certificate=self._trust.member_certificate,
        )

    def rethink(self) -> None:
        """Have the next step plan anew, whether the view changed or not: an answer of the planner came."""
        self._planned = -math.inf

    def plan(self, now: float) -> Goals:
        """What this node should do. `observe` comes first."""
        view = self._look(now)
        if view != self._view or not 0 <= now - self._planned < RETHINK_SECONDS:
            self._chosen, self._aside, self._unfound = choose_apart(view, self._planning)
            self._goals = goals(without(view, self._aside), self.me, self._chosen, self._planning)
            self._view, self._planned = view, now
        return self._goals

    def _wait(self, now: float) -> None:
        """Doubt the nodes for whose stages we have waited long enough; others hear it with the next step."""
        if self._view is not None and not self._view.listening:
            late = self._patience.late(self._chosen, self._view.facts, self._membership.gauges(now), now)
            for node, reason in late:
                self._doubts.note(node, reason, now)

    def _hosts(self, running: Running, actions: Actions) -> dict[str, HostGoal]:
        """The schedulers to run, each without its wiring until our worker with the first stage has it.

        A file may be deployed under two names, with a placement for each: the one that is hosted stays, else
        one that is wired is better than one that is not.
        """
        changing = {*actions.stop, *actions.rename, *(action.worker for action in actions.wire)}
        wired = {
            worker.wiring
            for name, worker in running.workers.items()
            if worker.state == "wired" and worker.spec.first == 0 and name not in changing
        }
        found: dict[str, HostGoal] = {}
        ranks: dict[str, tuple[bool, bool]] = {}
        for goal in self._goals.hosts:
            key, is_wired = _key(goal.placement), goal.wiring in wired
            rank = (is_wired and goal.wiring == running.wirings.get(key), is_wired)
            if key not in found or rank > ranks[key]:
                found[key] = goal if is_wired else replace(goal, wiring="", upstream="")
                ranks[key] = rank
        return found

    def _routes(self, current: Mapping[str, str]) -> dict[str, str]:
        """Where streams go: they stay with their node as long as it serves the model, under any name.

        Else they go to a placement with just the context that is deployed, or the next larger one.
        """
        serving = [route for routes in self._goals.routes.values() for route in routes if route.wiring]
        serving.sort(key=lambda route: route.placement.context)
        found: dict[str, str] = {}
        for each in self.deployments:
            if each.shape is None or not each.replicas:
                continue
            key = stream_key(each.shape.digest, each.context, each.only)
            hosts = [
                route.host
                for route in serving
                if (route.placement.model, route.placement.only) == (each.shape.digest, each.only)
                and route.placement.context >= each.context
            ]
            if hosts:
                found[key] = current[key] if current.get(key) in hosts else hosts[0]
        return found

    def _refuses(self, node: str) -> bool:
        return node in self._revocations

    def _look(self, now: float) -> View:
        known = self.nodes(now)
        return View(
            {node: facts for node, (state, facts) in known.items() if state != "gone"},
            frozenset(node for node, (state, _) in known.items() if state == "suspect"),
            tuple(deployment for deployment in self._deployments.all if deployment.replicas > 0),
            self.is_listening(now),
        )

    def _clock(self, now: float) -> float:
        return self._membership.clock(now + self._offset, now)


def _key(placement: Placement) -> str:
    return stream_key(placement.model, placement.context, placement.only)
