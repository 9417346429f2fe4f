"""The search for the fastest pipeline: branch and bound over devices, their order and the cuts.

The time of a token is a sum over stages and hops (cluster/speed.py), so the fewest and fastest devices that
hold the model are best, and a machine that would slow the others down is never in. To that time come small
costs that decide between near-equals: bytes of slices that would have to be fetched, or only loaded, and
stages on CPUs.

Every candidate's cost depends on nothing but its own machines, and the search is exact: what it finds is the
same whatever other machines there are, and more machines never make it worse. The order in which candidates
are tried is fixed too, and the first of the best is taken.

Whatever nodes say of themselves and of models, a search takes a bounded time: UNITS_MAX devices are looked
at, the fastest and the roomiest; a model is cut into PIECES_MAX pieces at most; and each search has a budget
of steps. They are counted, not timed, so that all nodes find the same. If they are used up, which takes
dozens of machines that all differ, the best so far has to do.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from cordee.cluster.facts import Device, Facts, ModelShape
from cordee.cluster.memory import PROCESS_BYTES, Demand, edges_of, needs
from cordee.cluster.speed import (
    MICROSECOND,
    STAGE_TIME,
    byte_time,
    hop_time,
    loaded_stages_of,
    read_bytes,
    return_time,
)

# What a search may take, in steps of about a microsecond of Python. A few machines take a hundredth of that.
STEPS_MAX = 1_000_000
# Devices that are looked at, in all and of one node: one with dozens must not hide the others.
UNITS_MAX = 64
NODE_UNITS_MAX = 16
BEAM_WIDTH = 8  # partial pipelines that the first guess keeps
# What is counted as how many steps, as measured.
CHILD_STEPS = 3  # a stage that may come next
BOUND_STEPS = 0.4  # of bounds on the rest, for each unit and piece
# Of what is prepared: for each unit and two edges, and for each unit and two others.
PREPARING_STEPS = 0.05
# Of the table of memory for each two edges, which takes twice as long for a model of TABLE_LAYERS.
TABLE_STEPS, TABLE_LAYERS = 4, 512
EVENED_MAX = 200_000  # stages that are looked at to even a pipeline out; beyond, it stays as it was found
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


Stage = tuple[int, int, int]  # a unit's number, and the numbers of the edges where it begins and ends
Path = list[Stage]


def considered(shape: ModelShape, units: Iterable[Unit]) -> list[Unit]:
    """Of the units that may hold a stage the fastest and the roomiest, in turn: UNITS_MAX at most.

    The same whatever the order of `units`; of two devices of one name on a node only one.
    """
    least = PROCESS_BYTES + min(shape.layer_bytes)
    able = sorted((unit for unit in units if unit.byte_time and unit.available_bytes >= least), key=_order)
    roomiest = sorted(able, key=lambda unit: -unit.available_bytes)
    kept: dict[tuple[str, str], Unit] = {}
    counts: Counter[str] = Counter()
    for unit in chain.from_iterable(zip(able, roomiest, strict=True)):
        node = unit.facts.node
        if len(kept) < UNITS_MAX and (node, unit.device.name) not in kept and counts[node] < NODE_UNITS_MAX:
            kept[node, unit.device.name] = unit
            counts[node] += 1
    return sorted(kept.values(), key=_order)


def able_units(shape: ModelShape, demand: Demand, units: Iterable[Unit]) -> list[Unit]:
    """The units that hold a stage."""
    model = _Model(shape, demand)
    return [unit for unit in units if _Ability(model, unit).pieces_max]


def _order(unit: Unit) -> tuple[int, int, str, str]:
    """The order in which candidates are tried, so it decides between those of equal cost."""
    return unit.byte_time, -unit.available_bytes, unit.facts.node, unit.device.name


class _Model:
    """A model as the search cuts it; what is said by edge goes from the first to the last of `edges`."""

    def __init__(self, shape: ModelShape, demand: Demand) -> None:
        self.shape, self.demand = shape, demand
        self.edges = edges_of(shape)
        self.pieces = len(self.edges) - 1
        self.needs = needs(shape, demand)
        self.reads = [read_bytes(shape, edge, shape.layers) for edge in self.edges[:-1]] + [0]  # behind each
        self.layer_bytes = self.sums(shape.layer_bytes)

    def sums(self, items: Iterable[int]) -> list[int]:
        """By edge, the sum of what lies before it; of `items` there is one for each layer."""
        sums = [0, *accumulate(items)]
        return [sums[edge] for edge in self.edges]


class _Ability:
    """What one unit can do with one model: where its stages may end, and what they cost."""

    def __init__(self, model: _Model, unit: Unit) -> None:
        self.unit, self._model = unit, model
        held = held_layers(model.shape, unit.facts)
        missing = (0 if i in held else nbytes for i, nbytes in enumerate(model.shape.layer_bytes))
        self.missing = model.sums(missing)  # bytes of layers that lie elsewhere, up to each edge
        self.reads = model.reads
        self.ends = [self._ends_from(first) for first in range(model.pieces)]
        spans = [(first, ends[0]) for first, ends in enumerate(self.ends) if ends]
        self.pieces_max = max((last - first for first, last in spans), default=0)
        self.reads_max = max((self.reads[first] - self.reads[last] for first, last in spans), default=0)
        self.held = tuple(sorted(held))
        self.loaded = loaded_stages(model.shape, model.demand, unit)

    def _ends_from(self, first: int) -> list[int]:
        """Where a stage that starts there may end, the longest first."""
        room, disk = self.unit.available_bytes, self.unit.facts.disk_free_bytes + self.missing[first]
        needed, missing = self._model.needs[first], self.missing
        return [
            last
            for last in range(len(needed) - 1, first, -1)
            if 0 < needed[last] <= room and missing[last] <= disk
        ]

    def time(self, first: int, last: int) -> int:
        """Femtoseconds that a stage adds to a token, the costs of fetching and loading included."""
        read = (self.reads[first] - self.reads[last]) * self.unit.byte_time
        fetched = (self.missing[last] - self.missing[first]) * FETCH_TIME
        edges, layer_bytes = self._model.edges, self._model.layer_bytes
        loads = (edges[first], edges[last]) not in self.loaded
        loaded = (layer_bytes[last] - layer_bytes[first]) * LOAD_TIME if loads else 0
        return self.unit.fixed_time + read + fetched + loaded

    def fullness(self, first: int, last: int) -> int:
        """How much of its memory a stage would take, in millionths."""
        return self._model.needs[first][last] * 1_000_000 // self.unit.available_bytes


def held_layers(shape: ModelShape, facts: Facts) -> frozenset[int]:
    """Layers that lie on a node's disk."""
    found: set[int] = set()
    behind = 0  # the layers before it were looked at: slices may overlap, and be many
    for first, last in sorted((held.first, held.last) for held in facts.slices if held.model == shape.digest):
        found.update(range(max(behind, first), min(last, shape.layers)))
        behind = max(behind, last)
    return frozenset(found)


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
        nodes = {one.node: one for one in facts}
        hops, returns = (
            {a.node: {b.node: time(a, b) for b in nodes.values()} for a in nodes.values()}
            for time in (partial(hop_time, shape), return_time)
        )
        self.hops = [[hops[a.node][b.node] for b in facts] for a in facts]
        self.returns = [[returns[a.node][b.node] for b in facts] for a in facts]
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
        self._by_pieces = sorted(self._numbers, key=lambda i: -able[i].pieces_max)
        others = [[j for j in self._numbers if j != i] for i in self._numbers]
        arrivals = [min((links.hops[j][i] for j in others[i]), default=0) for i in self._numbers]
        self._fixed = [able[i].unit.fixed_time + arrivals[i] for i in self._numbers]
        self._by_fixed = sorted(self._numbers, key=lambda i: self._fixed[i])
        self._back = min((links.returns[i][j] for i in self._numbers for j in others[i]), default=0)
        pieces = len(able[0].reads) - 1
        fetches = [min(a.missing[i + 1] - a.missing[i] for a in able) for i in range(pieces)]
        self._fetch = [sum(fetches[first:]) * FETCH_TIME for first in range(pieces + 1)]
        self._known: dict[int, list[int | None]] = {}
        self._each_steps = math.ceil(BOUND_STEPS * (len(able) + pieces))
        self.steps = 0  # that were taken for what is known

    def after(self, used: int) -> list[int | None]:
        """By edge, the least that the layers behind it cost without these units; None: no room."""
        if used not in self._known:
            self._known[used] = self._computed(used)
            self.steps += self._each_steps
        return self._known[used]

    def _computed(self, used: int) -> list[int | None]:
        able, pieces = self._able, len(self._fetch) - 1
        largest = (able[i].pieces_max for i in self._by_pieces if not used >> i & 1)
        cheapest = (self._fixed[i] for i in self._by_fixed if not used >> i & 1)
        fastest = ((able[i].reads_max, able[i].unit.byte_time) for i in self._numbers if not used >> i & 1)
        bounds: list[int | None] = [None] * pieces + [0]
        covered = fixed = full = full_time = 0
        room, per_byte = next(fastest, (0, 0))
        for first in range(pieces - 1, -1, -1):
            while covered < pieces - first:
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
    """One search: for one model on these units, within a number of steps."""

    def __init__(
        self, shape: ModelShape, demand: Demand, units: Sequence[Unit], steps: int = STEPS_MAX
    ) -> None:
        self._steps_max, self._steps = steps, 0
        self._best_time: int | None = None
        self._best: Path = []
        self._seen: dict[tuple[int, int, int, int], int] = {}
        units = considered(shape, units)
        edges, count = len(edges_of(shape)), len(units)
        self._steps += math.ceil(PREPARING_STEPS * count * (edges**2 + count**2))
        self._steps += math.ceil(TABLE_STEPS * edges**2 * (1 + shape.layers / TABLE_LAYERS))
        self._able: list[_Ability] = []
        self._bounds: _Bounds | None = None
        if self.is_spent:
            return
        self._model = _Model(shape, demand)
        able = (_Ability(self._model, unit) for unit in units)
        self._able = [ability for ability in able if ability.pieces_max]

    @property
    def steps(self) -> int:
        """How many were taken."""
        return self._steps + (self._bounds.steps if self._bounds else 0)

    @property
    def is_spent(self) -> bool:
        """Whether the steps were used up, so that there may be a better pipeline than was found, or any."""
        return self.steps >= self._steps_max

    def best(self) -> list[Step]:
        """The best pipeline; empty if none fits, or none was found in the steps that it has."""
        if self._able:
            self._begin()
            for width in (1, BEAM_WIDTH):  # so that what `fits` finds is found here
                self._guess(width)
            self._extend([], 0, 0)
        return self._evened()

    def fits(self) -> bool:
        """Whether `best` would find a pipeline; quicker, as the first one will do."""
        if self._able:
            self._begin()
            for width in (1, BEAM_WIDTH):
                if not self._best:
                    self._guess(width)
            if not self._best:
                self._extend([], 0, 0)
        return bool(self._best)

    def _begin(self) -> None:
        self._links = _Links(self._model.shape, self._able)
        self._bounds = _Bounds(self._able, self._links)

    def _rest(self, used: int) -> list[int | None]:
        assert self._bounds is not None, "the search has begun"
        return self._bounds.after(used)

    def _guess(self, width: int) -> None:
        """Find a good pipeline quickly, so that the search need not look at bad ones.

        Of the `width` most promising partial pipelines each is extended by as many layers as a unit holds.
        """
        beam: list[tuple[int, int, Path]] = [(0, 0, [])]  # (used, spent, path)
        while beam:
            wider: list[tuple[int, int, int, Path]] = []
            for used, spent, path in beam:
                for now_used, total, step in self._children(path, used, spent, longest=True):
                    if step[2] == self._model.pieces:
                        self._consider([*path, step], total, grace=1)
                    else:
                        rest = self._rest(now_used)[step[2]]
                        assert rest is not None, "_children yields no others"
                        wider.append((total + rest, now_used, total, [*path, step]))
            beam = [partial[1:] for partial in sorted(wider)[:width]]

    def _extend(self, path: Path, used: int, spent: int) -> None:
        """Try all that may follow a partial pipeline, whose units are `used`."""
        for now_used, total, step in self._children(path, used, spent):
            if step[2] == self._model.pieces:
                self._consider([*path, step], total)
                continue
            rest = self._rest(now_used)[step[2]]
            assert rest is not None, "_children yields no others"
            if self._promising(total + rest) and self._is_news(path, step, now_used, total):
                self._extend([*path, step], now_used, total)

    def _children(
        self, path: Path, used: int, spent: int, longest: bool = False
    ) -> Iterator[tuple[int, int, Stage]]:
        """(units used, time spent, stage) of all that may come next, where the rest may still fit.

        It ends early where the steps are used up.
        """
        first = path[-1][2] if path else 0
        for number, ability in enumerate(self._able):
            self._steps += 1
            if self.is_spent:
                return
            if used >> number & 1 or not ability.ends[first] or self._has_free_twin(number, used):
                continue
            arrived = spent + (self._links.hops[path[-1][0]][number] if path else 0)
            now_used = used | 1 << number
            rest = self._rest(now_used)
            for last in ability.ends[first][: 1 if longest else None]:
                if rest[last] is None:
                    break
                self._steps += CHILD_STEPS
                if self.is_spent:
                    return
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
        """Whether no pipeline to this edge, of the same units and with the same links, cost as little."""
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
        abilities = [self._able[number] for number, _, _ in self._best]
        if sum(len(ends) for ability in abilities for ends in ability.ends) > EVENED_MAX:
            cuts = [cut for _, *cut in self._best]
        else:
            cuts = list(pairwise(self._even_edges(abilities)))
        edges = self._model.edges if abilities else ()
        return [Step(a.unit, edges[i], edges[j]) for a, (i, j) in zip(abilities, cuts, strict=True)]

    def _even_edges(self, abilities: Sequence[_Ability]) -> tuple[int, ...]:
        """The numbers of the edges to cut at."""
        if not abilities:
            return ()
        pieces = self._model.pieces
        # By edge: (cost, fullness of the fullest, edges) of the best way there.
        ways: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
        for index, ability in enumerate(abilities):
            final = index == len(abilities) - 1
            options: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
            for first, (time, fullest, cut) in ways.items():
                for last in ability.ends[first] if first < pieces else ():
                    if (last == pieces) == final:
                        full = max(fullest, ability.fullness(first, last))
                        way = (time + ability.time(first, last), full, (*cut, last))
                        options.setdefault(last, []).append(way)
            ways = {last: min(found) for last, found in options.items()}
        return ways[pieces][2]
