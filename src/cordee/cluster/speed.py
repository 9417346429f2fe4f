"""What a token costs: predicted decode time of a placement, from measured speeds and round trips.

A token of one stream passes all stages in turn, so its time is a sum: each stage reads its layers (of a
mixture, the experts chosen) once and has a fixed overhead, each hop takes half a round trip and the time of a
hidden row on the wire, and the token goes back to the host. The KV cache's reading is left out: it depends on
how long the text is.

All is integer arithmetic on coarse values, so that every node of a cluster computes the same to the last bit
and the noise of a measurement does not show. Times are femtoseconds: fine enough for a byte, and exact.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise

import msgspec

from cordee.cluster.facts import Device, Facts, ModelShape, Placement, StagePlace, StageReport
from cordee.cluster.memory import BATCH_ROWS

SECOND = 10**15  # in femtoseconds
MICROSECOND = SECOND // 10**6
# What a stage adds whatever its size: messages, Python, the graph's start (measured: the service with one
# stage adds 0.6 ms to a token of libllama, each further stage of the same machine 1 ms, links included).
STAGE_TIME = 600 * MICROSECOND
LOCAL_HOP_TIME = 250 * MICROSECOND
# A round trip and a link that were not measured yet: a wired local network of 1 Gbit/s.
ROUND_TRIP_SECONDS = 0.0005
LINK_BYTES_PER_SECOND = 125_000_000
ROW_NUMBER_BYTES = 4  # rows travel as f32
# A long prompt is read at least so many times as fast as an answer is written, since many rows share a
# reading of the weights. CPU: measured on two cores (docs/performance.md, prefill and decode with one stage);
# more cores read prompts faster still, while memory bounds how fast they write. GPU: pp512 over tg128 of
# llama-bench, published for a card of 2017 without matrix units (Radeon RX 580, Llama 3.2 3B Q4_K_M): 9.6;
# for a GeForce RTX 3060 24.
PROMPT_RATIOS = {"cpu": 2, "gpu": 8}
# Speeds are kept to 4 binary digits (steps of 6 to 12 %), times of links, which are noisier, to 3.
SPEED_DIGITS = 4
LINK_DIGITS = 3
NUMBER_MAX = 1 << 62  # whatever a damaged message claims, sums stay small numbers


def coarse(value: float, digits: int) -> int:
    """The nearest whole number with `digits` leading binary digits; 0 for what is no positive number."""
    if not value > 0:
        return 0
    whole = int(min(value, NUMBER_MAX))
    shift = max(0, whole.bit_length() - digits)
    return (whole + (1 << shift >> 1)) >> shift << shift


def settled(shape: ModelShape, facts: Facts, nodes: Collection[str]) -> Facts:
    """What of a node's facts the planning of a model among `nodes` depends on, without the noise."""
    return msgspec.structs.replace(
        facts,
        devices=tuple(
            msgspec.structs.replace(
                device, read_bytes_per_second=coarse(device.read_bytes_per_second, SPEED_DIGITS)
            )
            for device in facts.devices
        ),
        disk_free_bytes=min(facts.disk_free_bytes, sum(shape.layer_bytes)),
        rtts={
            node: measured / SECOND
            for node, rtt in facts.rtts.items()
            if node in nodes and (measured := coarse(rtt * SECOND, LINK_DIGITS))
        },
        bytes_per_second={
            node: coarse(speed, LINK_DIGITS)
            for node, speed in facts.bytes_per_second.items()
            if node in nodes
        },
        slices=tuple(
            sorted(
                (held for held in facts.slices if held.model == shape.digest),
                key=lambda held: (held.first, held.last),
            )
        ),
        stages=_loaded(shape, facts),
        name="",
        build="",
        api="",
        inbox="",
        offers=(),
        admin=False,
        version="",
        renewals="",
        certificate_ends=0.0,
    )


def loaded_stages_of(digest: str, facts: Facts) -> Iterator[tuple[Placement, StagePlace]]:
    """What of a model a node has in memory, with the placement that it was loaded for."""
    for report in facts.stages:
        placement, index = report.placement, report.index
        is_loaded = report.state in ("loaded", "wired") and 0 <= index < len(placement.stages)
        if is_loaded and placement.model == digest:
            yield placement, placement.stages[index]


def _loaded(shape: ModelShape, facts: Facts) -> tuple[StageReport, ...]:
    """The same as reports, one for all workers that hold the same."""
    found = {
        StageReport(msgspec.structs.replace(placement, stages=(place,)), 0, "loaded")
        for placement, place in loaded_stages_of(shape.digest, facts)
    }
    return tuple(sorted(found, key=msgspec.msgpack.encode))


def byte_time(device: Device) -> int:
    """Femtoseconds in which a device reads a byte of weights; 0 if it does not say a speed."""
    speed = coarse(device.read_bytes_per_second, SPEED_DIGITS)
    return max(1, SECOND // speed) if speed else 0


def read_bytes(shape: ModelShape, first: int, last: int) -> int:
    """What a stage reads for one token."""
    head = shape.active_head_bytes if last == shape.layers else 0
    return sum(shape.active_bytes[first:last]) + head


def hop_time(shape: ModelShape, sender: Facts, receiver: Facts) -> int:
    """Femtoseconds from the end of a stage to the start of the next."""
    if sender.node == receiver.node:
        return LOCAL_HOP_TIME
    return return_time(sender, receiver) + _row_time(shape, sender, receiver)


def _row_time(shape: ModelShape, sender: Facts, receiver: Facts) -> int:
    """Femtoseconds of a hidden row on the wire between two nodes."""
    known = [
        speed
        for one, other in ((sender, receiver), (receiver, sender))
        if (speed := coarse(one.bytes_per_second.get(other.node, 0), LINK_DIGITS))
    ]
    return shape.n_embd * ROW_NUMBER_BYTES * SECOND // min(known, default=LINK_BYTES_PER_SECOND)


def return_time(sender: Facts, receiver: Facts) -> int:
    """Femtoseconds that a token takes from the last stage back to the host: half a round trip."""
    if sender.node == receiver.node:
        return LOCAL_HOP_TIME
    known = [
        measured
        for one, other in ((sender, receiver), (receiver, sender))
        if (measured := coarse(one.rtts.get(other.node, 0) * SECOND, LINK_DIGITS))
    ]
    return max(known, default=int(ROUND_TRIP_SECONDS * SECOND)) // 2


def device_of(nodes: Mapping[str, Facts], node: str, device: str) -> Device | None:
    """A device by its name."""
    devices = nodes[node].devices if node in nodes else ()
    return next((known for known in devices if known.name == device), None)


def token_time(shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> int | None:
    """Predicted femtoseconds of a token of one stream; None if a device is not there or has no speed."""
    total = 0
    for place in placement.stages:
        device = device_of(nodes, place.node, place.device)
        per_byte = byte_time(device) if device else 0
        if not per_byte:
            return None
        total += STAGE_TIME + read_bytes(shape, place.first, place.last) * per_byte
    path = [nodes[place.node] for place in placement.stages]
    if len(path) > 1:
        total += sum(hop_time(shape, path[i], path[i + 1]) for i in range(len(path) - 1))
        total += return_time(path[-1], path[0])
    return total


def prompt_time(shape: ModelShape, placement: Placement, nodes: Mapping[str, Facts]) -> int | None:
    """Femtoseconds that each token of a long prompt takes at most; None if a device is not there.

    The rows of a micro-batch share a reading of the weights, of a mixture those of all experts. Its stages
    work one after another.
    """
    total = 0
    for place in placement.stages:
        device = device_of(nodes, place.node, place.device)
        per_byte = byte_time(device) if device else 0
        if device is None or not per_byte:
            return None
        layers = slice(place.first, place.last)
        active = sum(shape.active_bytes[layers])  # of the head only the last row is computed
        all_of_them = sum(shape.layer_bytes[layers])
        total += per_byte * (active // PROMPT_RATIOS[device.kind] + (all_of_them - active) // BATCH_ROWS)
    path = [nodes[place.node] for place in placement.stages]
    return total + sum(_row_time(shape, *ends) for ends in pairwise(path) if ends[0].node != ends[1].node)
