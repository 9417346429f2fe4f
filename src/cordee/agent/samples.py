"""Numbers for the metrics: what this node knows of its cluster, and of what runs on it."""

import time
from collections import Counter
from collections.abc import Iterable

from cordee.agent.agent import Agent
from cordee.serving.samples import Sample, host_samples, machine_samples


def cluster_samples(agent: Agent) -> Iterable[Sample]:
    """The numbers now; energy is counted as often as the node measures its power, once a second or so."""
    states = Counter(state for state, _ in agent.controller.nodes(time.monotonic()).values())
    text = "Nodes of the cluster by what this one knows of them."
    for state in sorted({"alive", *states}):
        yield Sample("gauge", "nodes", text, states[state], {"state": state})
    text = "Changes of where models run, as this node saw them."
    yield Sample("counter", "replans", text, agent.history.count)
    names = {service.key: name for name, service in agent.services.items()}
    for key, host in agent.scheduler_hosts.items():
        if key in names:
            yield from host_samples(names[key], host)
    yield from machine_samples(agent.stages.losses, agent.meter)
