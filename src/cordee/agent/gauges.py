"""What changes all the time at a node, for people to see: how busy its models are, and its fetches."""

from collections.abc import Mapping

from cordee.access.ledger import Ledger
from cordee.cluster.facts import Fetching, Gauges, Hosted
from cordee.distribution.local_models import LocalModels
from cordee.machine.energy import Meter
from cordee.serving.scheduler_host import SchedulerHost


def measured(
    hosts: Mapping[str, SchedulerHost], local_models: LocalModels, meter: Meter, ledger: Ledger
) -> Gauges:
    """The gauges now; `hosts` are the schedulers that run here, by stream key."""
    hosted = [
        Hosted(
            key,
            host.active,
            host.waiting,
            host.rate.per_second(),
            host.inherited_tokens,
            host.batch_invariant,
            host.spot_checks,
            host.speculates,
            *host.guesses,
        )
        for key, host in hosts.items()
    ]
    fetching = [
        Fetching(goal.model, goal.first, goal.last, *progress)
        for goal, progress in local_models.progress.items()
    ]
    return Gauges(tuple(hosted), tuple(fetching), meter.watts(), local_models.reading, ledger.uses())
