"""A planner as simple as can be, for the simulator: fastest devices first, as many layers as fit on each."""

from collections.abc import Mapping, Sequence

from cordee.cluster.facts import Facts, ModelShape, Placement, StagePlace

HOP_SECONDS = 0.001


class SimplePlanning:
    """See cordee.cluster.choose.Planning."""

    def plan(
        self, shape: ModelShape, context: int, sequences: int, nodes: Sequence[Facts]
    ) -> Placement | None:
        able = [own for own in nodes if own.disk_free_bytes > 0]
        devices = [(-d.read_bytes_per_second, own.node, d) for own in able for d in own.devices]
        first, stages = 0, []
        cell_bytes = context * sequences
        for _, node, device in sorted(devices, key=lambda item: item[:2]):
            last, free = first, device.memory_bytes
            while last < shape.layers:
                free -= shape.layer_bytes[last] + shape.cell_bytes[last] * cell_bytes
                if free < 0:
                    break
                last += 1
            if last > first and shape.allows(first, last):
                stages.append(StagePlace(node, device.name, first, last))
                first = last
            if first == shape.layers:
                return Placement(shape.digest, context, sequences, tuple(stages))
        return None

    def speed(self, shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> float:
        seconds = 0.0
        for place in placement.stages:
            device = next(d for d in nodes[place.node].devices if d.name == place.device)
            if not device.read_bytes_per_second > 0:
                return 0.0
            layers_bytes = sum(shape.active_bytes[place.first : place.last])
            seconds += HOP_SECONDS + layers_bytes / device.read_bytes_per_second
        return 1 / seconds

    def stage_bytes(self, shape: ModelShape, placement: Placement, index: int) -> int:
        place = placement.stages[index]
        cells = placement.context * placement.sequences
        layers = slice(place.first, place.last)
        return sum(shape.layer_bytes[layers]) + cells * sum(shape.cell_bytes[layers])
