"""Numbers for the metrics: what the schedulers and stages of this machine are doing at a moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cordee.machine.energy import Meter
from cordee.serving.scheduler_host import SchedulerHost


@dataclass(frozen=True)
class Sample:
    """A number as it is now. `name` is without `cordee_`, and without `_total`, which counters get."""

    kind: Literal["gauge", "counter"]
    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


def host_samples(model: str, host: SchedulerHost) -> Iterable[Sample]:
    """How full the KV cache of a model is whose scheduler runs here, and how well its tokens are guessed."""
    labels = {"model": model}
    text = "Tokens that the KV cache holds, for streams and for those that may follow."
    yield Sample("gauge", "kv_cache_tokens", text, host.held_tokens, labels)
    text = "Tokens that the KV cache has room for."
    yield Sample("gauge", "kv_cache_tokens_max", text, host.held_tokens_max, labels)
    offered, accepted = host.guesses
    text = "Guesses of tokens to come that the stages computed."
    yield Sample("counter", "guessed_tokens", text, offered, labels)
    text = "Guesses that were right: tokens that came sooner."
    yield Sample("counter", "accepted_tokens", text, accepted, labels)


def machine_samples(restarts: int, meter: Meter) -> Iterable[Sample]:
    """What the worker processes of this machine are doing. Energy is left out where nothing measures it."""
    yield Sample("counter", "stage_restarts", "Worker processes that ended and were replaced.", restarts)
    if meter.joules is not None:
        text = "Energy that this machine's processors took since the start."
        yield Sample("counter", "energy_joules", text, meter.joules)
