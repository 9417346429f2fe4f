"""What a node has to tell about the identities of its cluster before it becomes a problem: sentences."""

import time
from collections.abc import Mapping, Sequence

from cordee.agent.agent import Agent
from cordee.cluster.facts import Facts
from cordee.cluster.membership import Liveness
from cordee.cluster.soundness import plain
from cordee.net import identity


def warnings(
    agent: Agent, known: Mapping[str, tuple[Liveness, Facts]], now: float, clock: float
) -> list[str]:
    """What `nodes` and `status` show; `now` never jumps, `clock` is in seconds since 1970."""
    return [
        *_clones(agent, known, now),
        *agent.gossip.strangers(now),
        *_unsound(agent, known),
        *_certificates(agent, known, clock),
        *_authority(agent, clock),
    ]


def _clones(agent: Agent, known: Mapping[str, tuple[Liveness, Facts]], now: float) -> list[str]:
    return [
        f"Two machines run, or ran a moment ago, as {known[node][1].name if node in known else node} "
        f"({node}): the disk of one is probably a copy of the other's. On the copy, type "
        "`cordee leave --yes`, then `cordee join` a new code."
        for node in sorted(agent.controller.clones(now))
    ]


def _unsound(agent: Agent, known: Mapping[str, tuple[Liveness, Facts]]) -> list[str]:
    return [
        f"{count} messages of {known[node][1].name if node in known else plain(node)} were dropped, because "
        f"no sound node says such things ({what}): if that goes on, remove the node."
        for node, (count, what) in sorted(agent.controller.unsound.items())
    ]


def _certificates(agent: Agent, known: Mapping[str, tuple[Liveness, Facts]], clock: float) -> list[str]:
    """Certificates that nobody renewed for long, though that is due after a third of their life."""
    found: list[str] = []
    for node, (state, facts) in known.items():
        ends = agent.identity.validity()[1] if node == agent.node else facts.certificate_ends
        if state != "gone" and ends and clock >= ends - identity.WARN_SECONDS:
            found.append(
                f"The certificate of {facts.name} {_until(ends, clock)}, and no admin has renewed it: "
                f"{_remedy(agent, facts)}"
            )
    return found


def _authority(agent: Agent, clock: float) -> list[str]:
    """The authority's life, which in clusters made by 0.2 or older has an end."""
    ends = identity.validity_of(agent.identity.authority)[1]
    if clock < ends - identity.WARN_SECONDS:
        return []
    return [
        f"The certificate of the cluster itself {_until(ends, clock)}: create the cluster anew, with `cordee "
        "leave` on every node and then `cordee up` on one."
    ]


def _until(ends: float, clock: float) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(ends))
    return f"runs out on {day}" if clock < ends else f"ran out on {day}"


def _remedy(agent: Agent, facts: Facts) -> str:
    if facts.admin:
        return "it is an admin itself, so look at the messages of its `cordee up`."
    names = [each.name for each in agent.members.admins]
    if agent.identity.is_admin:
        names.insert(0, agent.options.name)
    where = f"on {listing(names, 'or')}" if names else "on an admin"
    return f"keep `cordee up` running {where} for an hour, at the same time as there."


def listing(names: Sequence[str], word: str = "and") -> str:
    """Names in a sentence: "a, b and c"."""
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
