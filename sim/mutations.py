"""Planted bugs: that each is found shows that the simulator bites.

`python -m sim.mutations` plays seeds under each until one breaks, and prints which. Most bugs have to be
planted in private members of what is tested, so these are used here on purpose.
"""

# pyright: reportPrivateUsage=false

import dataclasses
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from cordee.cluster import (
    choose,
    controller,
    deployments,
    doubts,
    facts,
    goals,
    membership,
    patience,
    reconcile,
)
from cordee.generation import (
    batches,
    gateway,
    guessing,
    host,
    prefixes,
    results,
    scheduler,
    slots,
    streams,
)
from cordee.worker import acceptance, messages
from sim import stages
from sim.run import Broken, play
from sim.stall import play_stall

SEEDS_MAX = 1000  # each must be found within that many; most are by the tenth, the rarest by the 450th


def _set(*changes: tuple[object, str, object]) -> Callable[[ExitStack], None]:
    def plant(stack: ExitStack) -> None:
        for target, name, value in changes:
            stack.enter_context(patch.object(target, name, value))

    return plant


def _nothing(*_: object, **__: object) -> None:
    return None


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


def _no_seconds(*_: object) -> float:
    return 0.0


def _all(_: object, nodes: Iterable[str], last_resort: bool = False) -> list[frozenset[str]]:
    return [frozenset(nodes)]


def _none(*_: object) -> list[object]:
    return []


def _wiring_of_placement(placement: facts.Placement, workers: Sequence[str]) -> str:
    return facts.placement_id(placement)


def _unsorted_reports(self: choose.Reports, known: Mapping[str, facts.Facts]) -> None:
    self.by_stage, self.placements, self.failed = {}, {}, set()
    for node, own in known.items():
        for report in own.stages:
            self._add(node, report)


def _unsorted_nodes(
    self: controller.Controller, now: float
) -> dict[str, tuple[membership.Liveness, facts.Facts]]:
    known = self._membership.facts(now)
    return known if self._facts is None else {self.me: ("alive", self._facts), **known}


def _same_rank(self: choose.Candidate) -> int:
    return 0


def _old_for_ever(heartbeat: membership.Heartbeat, seen: membership.Sighting, now: float) -> bool:
    return heartbeat.session == seen.heartbeat.session and heartbeat.sent <= seen.heartbeat.sent


def _take_any_index(self: gateway.Gateway, stream: gateway._Stream, piece: streams.Piece) -> None:
    stream.generated += [choice.token for choice in piece.choices]
    self._news.append(gateway.News(stream.request.id, piece.choices, 0, piece.finish_reason))
    if piece.finish_reason is not None:
        self.cancel(stream.request.id)


def _only_hear(self: gateway.Gateway, peer: gateway._Peer, said: streams.Said) -> None:
    peer.heard = self._clock.seconds


def _lost_without_replay(self: scheduler.Scheduler) -> None:
    self._in_flight.clear()


def _believe(deployment: deployments.Deployment, clock: float) -> deployments.Deployment:
    return deployment


def _deployments_by_arrival(self: deployments.Deployments, deployment: deployments.Deployment) -> None:
    if deployment != self._deployments.get(deployment.model):
        self._put(deployment)


def _serving_once_loaded(self: choose.Reports, placement: facts.Placement) -> str:
    return self.wiring(placement)


_guesses_behind = acceptance._guesses_behind


def _guesses_late(run: messages.Run) -> Iterator[int | None]:
    """A guess is compared with the token after the one that it was made of."""
    *before, last = _guesses_behind(run)
    yield from (None, *before) if last is None and before else (last,)


def _believe_guess(self: guessing.Guessing, stream: slots.SlottedStream, token: int) -> bool:
    if stream.guesser is not None:
        stream.guesser.append(token)
    if not stream.guesses:
        return False
    del stream.guesses[0]
    return True


def _forget_guessed(history: int, token: int, guessed: bool) -> int:
    return history if guessed else stages.step(history, token)


_lost = scheduler.Scheduler.lost


def _lost_with_guesses(self: scheduler.Scheduler) -> None:
    kept = {name: list(stream.guesses) for name, stream in self._active.items()}
    _lost(self)
    for name, stream in self._active.items():
        stream.guesses[:] = kept[name]


Workers = Mapping[str, reconcile.WorkerStatus]
Slices = Sequence[facts.SliceHeld]
_step = reconcile.Reconciler.step
_take_copies = prefixes.Prefixes.take_copies


def _take_shorter_copies(self: prefixes.Prefixes) -> tuple[batches.SequenceCopy, ...]:
    return tuple(replace(copy, length=copy.length - 1) for copy in _take_copies(self))


_copy_best = prefixes.Prefixes.copy_best
_once: WeakKeyDictionary[slots.Slot, list[int]] = WeakKeyDictionary()  # the most that a slot ever held


def _copy_what_once_was_there(self: prefixes.Prefixes, slot: slots.Slot, tokens: Sequence[int]) -> None:
    now = {each: each.tokens for each in self._slots}
    for each, held in now.items():
        _once[each] = max(_once.get(each, []), [*held], key=len)
        if each is not slot:
            each.tokens = _once[each]
    _copy_best(self, slot, tokens)
    for each, held in now.items():
        if each is not slot:
            each.tokens = held


def _never_rename(
    self: reconcile.Reconciler, wanted: goals.Goals, workers: Workers, slices: Slices, now: float
) -> reconcile.Actions:
    return dataclasses.replace(_step(self, wanted, workers, slices, now), rename=())


def _never_stop(
    self: reconcile.Reconciler, wanted: goals.Goals, workers: Workers, slices: Slices, now: float
) -> reconcile.Actions:
    return dataclasses.replace(_step(self, wanted, workers, slices, now), stop=())


_hosts = controller.Controller._hosts


def _hosts_in_turn(
    self: controller.Controller, running: controller.Running, actions: reconcile.Actions
) -> dict[str, goals.HostGoal]:
    self._goals = dataclasses.replace(self._goals, hosts=self._goals.hosts[::-1])
    return _hosts(self, dataclasses.replace(running, wirings={}), actions)


_routes = controller.Controller._routes


def _routes_in_turn(self: controller.Controller, current: Mapping[str, str]) -> dict[str, str]:
    found = _routes(self, current)
    serving = [route for routes in self.goals.routes.values() for route in routes if route.wiring]
    for key in found:
        hosts = [each.host for each in serving if key == facts.stream_key(each.placement.model, 64)]
        found[key] = next((host for host in hosts if host != current.get(key)), found[key])
    return found


MUTATIONS: dict[str, Callable[[ExitStack], None]] = {
    "a suspect is dead at once": _set((membership, "SUSPICION_SECONDS", 0.0)),
    "no node is ever gone": _set((membership, "SUSPICION_SECONDS", math.inf)),
    "times from the future are believed": _set((membership.Membership, "settle", _nothing)),
    "heartbeats sent earlier are old for ever": _set((membership, "_is_old", _old_for_ever)),
    "a node plans before it has listened": _set((controller, "LISTEN_SECONDS", 0.0)),
    "revoked nodes are allowed": _set((controller.Controller, "_refuses", _never)),
    "any stamp is believed": _set((deployments, "_credible", _believe), (deployments, "is_sound", _always)),
    "deployments are not checked": _set((deployments.Deployments, "_check_signature", _always)),
    "the last deployment to arrive wins": _set(
        (deployments.Deployments, "_keep_greatest", _deployments_by_arrival)
    ),
    "the wiring ignores the workers": _set((choose, "wiring_id", _wiring_of_placement)),
    "choosing by order of arrival": _set(
        (choose.Candidate, "rank", property(_same_rank)),
        (choose.Reports, "__init__", _unsorted_reports),
        (controller.Controller, "nodes", _unsorted_nodes),
    ),
    "no hysteresis: always the fastest": _set((choose.Selection, "_candidates", _none)),
    "any gain is worth a move": _set((choose, "UPGRADE_RATIO", 1.01)),
    "memory is given out twice": _set((choose.Selection, "_fits", _always)),
    "serving before the links are made": _set((choose.Reports, "serving", _serving_once_loaded)),
    "draining nodes keep their stages": _set((choose.Selection, "_succeed", _nothing)),
    "slices lie on one node only": _set((goals, "_copies", _none)),
    "two deployments of one file take it from each other": _set(
        (controller.Controller, "_hosts", _hosts_in_turn),
        (controller.Controller, "_routes", _routes_in_turn),
    ),
    "failures are never forgiven": _set((reconcile.Reconciler, "_forget", _nothing)),
    "a wiring left is entered again": _set((reconcile.Reconciler, "step", _never_rename)),
    "workers are never stopped": _set((reconcile.Reconciler, "step", _never_stop)),
    "no replay after a loss": _set((scheduler.Scheduler, "lost", _lost_without_replay)),
    "copies of a prefix are too short": _set((prefixes.Prefixes, "take_copies", _take_shorter_copies)),
    "a prefix is copied from a slot that another stream got": _set(
        (prefixes.Prefixes, "copy_best", _copy_what_once_was_there)
    ),
    "the host does not hear of a loss": _set((host.Host, "lost", _nothing)),
    "a token is accepted one place too late": _set((acceptance, "_guesses_behind", _guesses_late)),
    "a stale row is computed": _set((acceptance.Drawn, "is_stale", _never)),
    "a guess is believed": _set((guessing.Guessing, "append", _believe_guess)),
    "a penalty forgets what was guessed": _set((stages.Process, "remember", staticmethod(_forget_guessed))),
    "guesses outlive a loss": _set((scheduler.Scheduler, "lost", _lost_with_guesses)),
    "any index is taken": _set((gateway.Gateway, "_advance", _take_any_index)),
    "what was lost is not asked again": _set((gateway.Gateway, "_answered", _only_hear)),
}
# Those that show only where a fault lasts (stall.py).
STALL_MUTATIONS: dict[str, Callable[[ExitStack], None]] = {
    "no stage is ever late": _set((patience.Patience, "late", _none)),
    "no result is ever late": _set((results.Results, "late_seconds", _no_seconds)),
    "doubts are not heard": _set((doubts.Exclusions, "concern", _never), (doubts.Exclusions, "groups", _all)),
}


@contextmanager
def planted(name: str) -> Generator[None]:
    """The code with one bug."""
    with ExitStack() as stack:
        (MUTATIONS | STALL_MUTATIONS)[name](stack)
        yield


def found(name: str) -> tuple[int, str] | None:
    """The first seed that shows a bug, and how it shows; None if none of SEEDS_MAX does."""
    player: Callable[[int], object] = play_stall if name in STALL_MUTATIONS else play
    with planted(name):
        for seed in range(SEEDS_MAX):
            try:
                player(seed)
            except Broken as error:
                return seed, str(error).splitlines()[0]
    return None


def main() -> int:
    """Exit status 1 if a bug is not found."""
    missed = 0
    for name in MUTATIONS | STALL_MUTATIONS:
        result = found(name)
        missed += result is None
        print(f"{name}: {'NOT FOUND' if result is None else result[1]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
