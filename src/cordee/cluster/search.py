"""The search for the fastest pipeline: branch and bound over devices, their order and the cuts.

The time of a token is a sum over stages and hops (cluster/speed.py), so the fewest and fastest devices that
hold the model are best, and a machine that would slow the others down is never in. To that time come small
costs that decide between near-equals: bytes of slices that would have to be fetched, or only loaded, and
stages on CPUs.

Every candidate's cost depends on nothing but its own machines, and the search is exact: what it finds is the
same whatever other machines there are, and more machines never make it worse. The order in which candidates
are tried is fixed too, and the first of the best is taken. Only if VISITS_MAX is used up, which takes many
machines that all differ, the best so far has to do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from cordee.cluster.facts import Device, Facts, ModelShape
from cordee.cluster.memory import Demand, needs
from cordee.cluster.speed import (
    MICROSECOND,
    STAGE_TIME,
    byte_time,
    hop_time,
    loaded_stages_of,
    read_bytes,
    return_time,
)

# Partial pipelines that are looked at: a second or two of Python. Tens of machines mostly take a few hundred.
VISITS_MAX = 1_500
BEAM_WIDTH = 8  # partial pipelines that the first guess keeps
# Fetching costs time once: at 1 Gbit/s a byte takes 8 ns, shared by the million tokens that a placement is
# expected to make. So a placement of slices that are there wins over one that is faster by 1 % or so.
FETCH_TIME = 8  # femtoseconds for each byte
# Loading is the same at a disk's pace: the survivors of a loss keep the stages that they have.
LOAD_TIME = 1  # femtoseconds for each byte
# On equal speed a GPU is better: it also reads prompts faster.
CPU_STAGE_TIME = MICROSECOND


@dataclass(frozen=True)
class Unit:
    """A device of a node as the search sees it: `available_bytes` is what is not promised to others."""

    facts: Facts
    device: Device
    available_bytes: int

    @cached_property
    def byte_time(self) -> int:
        """Femtoseconds to read a byte; 0 if the device does not say its speed."""
        return byte_time(self.device)

    @property
    def fixed_time(self) -> int:
        """What a stage on it costs whatever its size."""
        return STAGE_TIME + (CPU_STAGE_TIME if self.device.kind == "cpu" else 0)


class Step(NamedTuple):
    """A stage of a pipeline on a unit: its layers are `first` to `last` (exclusive)."""

    unit: Unit
    first: int
    last: int


Stage = tuple[int, int, int]  # a unit's number, first and last layer
Path = list[Stage]


class _Ability:
    """What one unit can do with one model: where its stages may end, and what they cost."""

    def __init__(self, shape: ModelShape, demand: Demand, unit: Unit) -> None:
        self.unit = unit
        self._needs = needs(shape, demand)
        held = held_layers(shape, unit.facts)
        missing = (0 if i in held else nbytes for i, nbytes in enumerate(shape.layer_bytes))
        self.missing = [0, *accumulate(missing)]  # bytes of layers that lie elsewhere, up to each layer
        self.reads = [read_bytes(shape, first, shape.layers) for first in range(shape.layers)] + [0]
        self.ends = [self._ends_from(first) for first in range(shape.layers)]
        spans = [(first, ends[0]) for first, ends in enumerate(self.ends) if ends]
        self.layers_max = max((last - first for first, last in spans), default=0)
        self.reads_max = max((self.reads[first] - self.reads[last] for first, last in spans), default=0)
        self.held = tuple(sorted(held))
        self.loaded = loaded_stages(shape, demand, unit)
        self._layer_bytes = [0, *accumulate(shape.layer_bytes)]

    def _ends_from(self, first: int) -> list[int]:
        """Where a stage that starts there may end, the longest first."""
        room, disk = self.unit.available_bytes, self.unit.facts.disk_free_bytes + self.missing[first]
        needed, missing = self._needs[first], self.missing
        return [
            last
            for last in range(len(needed) - 1, first, -1)
            if 0 < needed[last] <= room and missing[last] <= disk
        ]

    def time(self, first: int, last: int) -> int:
        """Femtoseconds that a stage adds to a token, the costs of fetching and loading included."""
        read = (self.reads[first] - self.reads[last]) * self.unit.byte_time
        fetched = (self.missing[last] - self.missing[first]) * FETCH_TIME
        loads = (first, last) not in self.loaded
        loaded = (self._layer_bytes[last] - self._layer_bytes[first]) * LOAD_TIME if loads else 0
        return self.unit.fixed_time + read + fetched + loaded

    def fullness(self, first: int, last: int) -> int:
        """How much of its memory a stage would take, in millionths."""
        return self._needs[first][last] * 1_000_000 // self.unit.available_bytes


def held_layers(shape: ModelShape, facts: Facts) -> frozenset[int]:
    """Layers that lie on a node's disk."""
    return frozenset(
        layer
        for held in facts.slices
        if held.model == shape.digest
        for layer in range(max(0, held.first), min(held.last, shape.layers))
    )


def loaded_stages(shape: ModelShape, demand: Demand, unit: Unit) -> frozenset[tuple[int, int]]:
    """The layers of each stage that a worker of this device holds in memory."""
    return frozenset(
        (place.first, place.last)
        for placement, place in loaded_stages_of(shape.digest, unit.facts)
        if (placement.context, placement.sequences) == (demand.context, demand.sequences)
        and (place.node, place.device) == (unit.facts.node, unit.device.name)
    )


class _Links:
    """Hops between units, as numbers of the list of abilities; and which units are interchangeable."""

    def __init__(self, shape: ModelShape, able: Sequence[_Ability]) -> None:
        facts = [ability.unit.facts for ability in able]
        self.hops = [[hop_time(shape, a, b) for b in facts] for a in facts]
        self.returns = [[return_time(a, b) for b in facts] for a in facts]
        members: dict[str, list[int]] = {}
        for number, ability in enumerate(able):
            members.setdefault(ability.unit.facts.node, []).append(number)
        self.mates = [tuple(members[ability.unit.facts.node]) for ability in able]
        self.classes = self._classes(list(members.values()))
        self.twins = self._earlier_twins(able, list(members.values()))

    def _classes(self, nodes: list[list[int]]) -> list[int]:
        """For each unit the first unit whose node has the same links to all others."""
        classes = list(range(len(self.hops)))
        leaders: list[int] = []
        for members in nodes:
            leader = next((one for one in leaders if self._alike(one, members[0])), members[0])
            if leader == members[0]:
                leaders.append(leader)
            for number in members:
                classes[number] = leader
        return classes

    def _alike(self, one: int, other: int) -> bool:
        apart = {*self.mates[one], *self.mates[other]}
        return all(
            table[one][k] == table[other][k] and table[k][one] == table[k][other]
            for table in (self.hops, self.returns)
            for k in range(len(self.hops))
            if k not in apart
        )

    def _earlier_twins(self, able: Sequence[_Ability], nodes: list[list[int]]) -> list[tuple[int, ...]]:
        """For each unit the masks of the units of earlier nodes that are like its own in every respect."""
        twins: list[tuple[int, ...]] = [()] * len(able)
        known: dict[tuple[object, ...], tuple[int, ...]] = {}
        for members in nodes:
            kinds = tuple(
                (able[i].unit.device.kind, able[i].unit.byte_time, able[i].unit.available_bytes)
                for i in members
            )
            disk = able[members[0]].unit.facts.disk_free_bytes
            loaded = tuple(able[i].loaded for i in members)
            key = (self.classes[members[0]], kinds, able[members[0]].held, loaded, disk)
            for number in members:
                twins[number] = known.get(key, ())
            known[key] = (*known.get(key, ()), _mask(members))
        return twins


def _mask(numbers: Sequence[int]) -> int:
    return sum(1 << number for number in numbers)


class _Bounds:
    """What the rest of a pipeline costs at least, for the units that are left."""

    def __init__(self, able: Sequence[_Ability], links: _Links) -> None:
        self._able, self._numbers = able, range(len(able))
        self._by_layers = sorted(self._numbers, key=lambda i: -able[i].layers_max)
        others = [[j for j in self._numbers if j != i] for i in self._numbers]
        arrivals = [min((links.hops[j][i] for j in others[i]), default=0) for i in self._numbers]
        self._fixed = [able[i].unit.fixed_time + arrivals[i] for i in self._numbers]
        self._by_fixed = sorted(self._numbers, key=lambda i: self._fixed[i])
        self._back = min((links.returns[i][j] for i in self._numbers for j in others[i]), default=0)
        layers = len(able[0].reads) - 1
        fetches = [min(a.missing[i + 1] - a.missing[i] for a in able) for i in range(layers)]
        self._fetch = [sum(fetches[first:]) * FETCH_TIME for first in range(layers + 1)]
        self._known: dict[int, list[int | None]] = {}

    def after(self, used: int) -> list[int | None]:
        """By boundary, the least that the layers behind it cost without these units; None: no room."""
        if used not in self._known:
            self._known[used] = self._computed(used)
        return self._known[used]

    def _computed(self, used: int) -> list[int | None]:
        able, layers = self._able, len(self._fetch) - 1
        largest = (able[i].layers_max for i in self._by_layers if not used >> i & 1)
        cheapest = (self._fixed[i] for i in self._by_fixed if not used >> i & 1)
        fastest = ((able[i].reads_max, able[i].unit.byte_time) for i in self._numbers if not used >> i & 1)
        bounds: list[int | None] = [None] * layers + [0]
        covered = fixed = full = full_time = 0
        room, per_byte = next(fastest, (0, 0))
        for first in range(layers - 1, -1, -1):
            while covered < layers - first:
                if not (more := next(largest, 0)):
                    return bounds
                covered += more
                fixed += next(cheapest)
            while able[0].reads[first] > full + room:
                if not per_byte:
                    return bounds
                full, full_time = full + room, full_time + room * per_byte
                room, per_byte = next(fastest, (0, 0))
            read = full_time + (able[0].reads[first] - full) * per_byte
            bounds[first] = fixed + read + self._back + self._fetch[first]
        return bounds


class Search:
    """One search: for one model on these units."""

    def __init__(self, shape: ModelShape, demand: Demand, units: Sequence[Unit]) -> None:
        self._shape, self._layers = shape, shape.layers
        able = [
            _Ability(shape, demand, unit) for unit in units if unit.byte_time and unit.available_bytes > 0
        ]
        # The order in which candidates are tried, so it decides between those of equal cost.
        self._able = sorted(
            (ability for ability in able if ability.layers_max),
            key=lambda a: (
                a.unit.byte_time,
                -a.unit.available_bytes,
                a.unit.facts.node,
                a.unit.device.name,
            ),
        )
        self._best_time: int | None = None
        self._best: Path = []  # (unit's number, first, last)
        self._seen: dict[tuple[int, int, int, int], int] = {}
        self._visits = 0

    @property
    def able(self) -> bool:
        """Whether any of the units holds a stage."""
        return bool(self._able)

    def best(self) -> list[Step]:
        """The best pipeline; empty if none fits, or none was found among VISITS_MAX."""
        if self._able:
            self._begin()
            self._extend([], 0, 0)
        return self._evened()

    def fits(self) -> bool:
        """Whether `best` would find a pipeline; quicker, as the first one will do."""
        if self._able:
            self._begin()
            if not self._best:
                self._extend([], 0, 0)
        return bool(self._best)

    def _begin(self) -> None:
        self._links = _Links(self._shape, self._able)
        self._bounds = _Bounds(self._able, self._links)
        self._guess()

    def _guess(self) -> None:
        """Find a good pipeline quickly, so that the search need not look at bad ones.

        Of the most promising few partial pipelines each is extended by as many layers as a unit holds.
        """
        beam: list[tuple[int, int, Path]] = [(0, 0, [])]  # (used, spent, path)
        while beam:
            wider: list[tuple[int, int, int, Path]] = []
            for used, spent, path in beam:
                for now_used, total, step in self._children(path, used, spent, longest=True):
                    if step[2] == self._layers:
                        self._consider([*path, step], total, grace=1)
                    else:
                        rest = self._bounds.after(now_used)[step[2]]
                        assert rest is not None, "_children yields no others"
                        wider.append((total + rest, now_used, total, [*path, step]))
            beam = [partial[1:] for partial in sorted(wider)[:BEAM_WIDTH]]

    def _extend(self, path: Path, used: int, spent: int) -> None:
        """Try all that may follow a partial pipeline, whose units are `used`."""
        self._visits += 1
        for now_used, total, step in self._children(path, used, spent):
            if self._visits >= VISITS_MAX:
                return
            if step[2] == self._layers:
                self._consider([*path, step], total)
                continue
            rest = self._bounds.after(now_used)[step[2]]
            assert rest is not None, "_children yields no others"
            if self._promising(total + rest) and self._is_news(path, step, now_used, total):
                self._extend([*path, step], now_used, total)

    def _children(
        self, path: Path, used: int, spent: int, longest: bool = False
    ) -> Iterator[tuple[int, int, Stage]]:
        """(units used, time spent, stage) of all that may come next, where the rest may still fit."""
        first = path[-1][2] if path else 0
        for number, ability in enumerate(self._able):
            if used >> number & 1 or not ability.ends[first] or self._has_free_twin(number, used):
                continue
            arrived = spent + (self._links.hops[path[-1][0]][number] if path else 0)
            now_used = used | 1 << number
            bounds = self._bounds.after(now_used)
            for last in ability.ends[first][: 1 if longest else None]:
                if bounds[last] is None:
                    break
                yield now_used, arrived + ability.time(first, last), (number, first, last)

    def _consider(self, path: Path, total: int, grace: int = 0) -> None:
        """Keep a complete pipeline if it is the best; with `grace` another that costs as much replaces it."""
        if len(path) > 1:
            total += self._links.returns[path[-1][0]][path[0][0]]
        if self._promising(total + grace):
            self._best_time, self._best = total + grace, path

    def _has_free_twin(self, number: int, used: int) -> bool:
        """Whether the unit's whole node is free, and so is one just like it that is tried before."""
        if used & _mask(self._links.mates[number]):
            return False
        return any(not used & twin for twin in self._links.twins[number])

    def _promising(self, time: int) -> bool:
        return self._best_time is None or time < self._best_time

    def _is_news(self, path: Path, step: Stage, used: int, total: int) -> bool:
        """Whether no pipeline to this boundary, of the same units and with the same links, cost as little."""
        first = path[0][0] if path else step[0]
        key = (step[2], used, self._end_class(first), self._end_class(step[0]))
        if self._seen.get(key, total + 1) <= total:
            return False
        self._seen[key] = total
        return True

    def _end_class(self, number: int) -> int:
        """Stands for the unit's links. Those of a node with several units are its own."""
        return self._links.classes[number] if len(self._links.mates[number]) == 1 else -1 - number

    def _evened(self) -> list[Step]:
        """The best pipeline, cut so that it costs the same and its fullest device is least full.

        That leaves every machine the most room, and slices that are fetched at once arrive soonest.
        """
        # By boundary: (cost, fullness of the fullest, boundaries) of the best way there.
        ways: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
        abilities = [self._able[number] for number, _, _ in self._best]
        for index, ability in enumerate(abilities):
            final = index == len(abilities) - 1
            options: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
            for first, (time, fullest, bounds) in ways.items():
                for last in ability.ends[first] if first < self._layers else ():
                    if (last == self._layers) == final:
                        full = max(fullest, ability.fullness(first, last))
                        way = (time + ability.time(first, last), full, (*bounds, last))
                        options.setdefault(last, []).append(way)
            ways = {last: min(found) for last, found in options.items()}
        if not abilities:
            return []
        bounds = ways[self._layers][2]
        return [Step(a.unit, *cut) for a, cut in zip(abilities, pairwise(bounds), strict=True)]
