"""What a running node finds wrong with itself and its cluster; `cordee doctor` shows it.

A check is a coroutine that takes the agent and gives findings; to add one, add it to CHECKS. All of them run
at once, each for some seconds at most. Those of AT_START are told by `cordee up`, too: they wait for no other
node.
"""

import asyncio
import contextlib
import ipaddress
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from cordee.agent.agent import Agent
from cordee.agent.reach import Tried
from cordee.cluster.facts import Facts
from cordee.errors import BadRequest
from cordee.findings import Finding
from cordee.net import address
from cordee.net.bus import PORT
from cordee.net.identity import BACKDATED_SECONDS
from cordee.net.peers import Peers

AgentCheck = Callable[[Agent], Awaitable[Sequence[Finding]]]

CLOCK_OFF_SECONDS = 60.0  # less disturbs nobody; a clock that is set from the network is off by far less
# From here on a certificate that was just made may seem to be not yet valid, or to have run out early.
CLOCK_WRONG_SECONDS = BACKDATED_SECONDS / 2
NAMED_MAX = 8  # nodes in one sentence
PORTS_TEXT = f"{PORT}:{address.PORTS[-1]}"
OPEN_FIREWALL = (
    "netsh advfirewall firewall add rule name=Cordee dir=in action=allow protocol=TCP remoteip={} "
    f"localport={PORT}-{address.PORTS[-1]}    (in a terminal of an administrator)"
    if sys.platform == "win32"
    else f"sudo ufw allow proto tcp from {{}} to any port {PORTS_TEXT}"
)


async def findings(agent: Agent) -> list[Finding]:
    """What all checks find, in their order."""
    return await _found(agent, CHECKS)


async def findings_at_start(agent: Agent) -> list[Finding]:
    """What a node that has just started can find."""
    return await _found(agent, AT_START)


async def _found(agent: Agent, checks: Sequence[AgentCheck]) -> list[Finding]:
    found = await asyncio.gather(*(check(agent) for check in checks))
    return [finding for each in found for finding in each]


async def port(agent: Agent) -> Sequence[Finding]:
    """Does the bus listen where other nodes look for it?"""
    _, got = address.parse(agent.bus.addresses[0], 0)
    wanted = agent.options.bus.listening()
    if wanted.is_chosen or got == wanted.port:
        return []
    what = f"Port {wanted.port} is taken by {address.holder(wanted.port)}: this node listens on {got}."
    remedy = "End that program and start this node again. Nodes that look for it with --peer need the port, "
    remedy += f"too: HOST:{got}."
    return [Finding(what, remedy, False)]


async def listens_for_itself(agent: Agent) -> Sequence[Finding]:
    """Does any other machine reach this node?"""
    addresses = agent.bus.addresses
    if not all(map(address.is_loopback, addresses)):
        return []
    if agent.options.bus.listening().host:
        what = f"This node listens on {addresses[0]}: no other machine can reach it."
        return [Finding(what, "cordee up --listen 0.0.0.0    (all interfaces; it is remembered)", False)]
    what = "This machine has no network address at the moment: no other machine can reach it."
    return [Finding(what, "Connect it; this node notices by itself.", False)]


async def peers(agent: Agent) -> Sequence[Finding]:
    """Is there a host behind each --peer?"""
    found: list[Finding] = []
    for wanted in agent.options.bus.peers:
        try:
            await asyncio.to_thread(address.resolve, address.peer(wanted, PORT)[0])
        except BadRequest as error:
            remedy = "Write its address instead, or wait: this node tries again and again."
            found.append(Finding(f"--peer {wanted}: {error.message}", remedy, False))
    return found


async def silent_peers(agent: Agent) -> Sequence[Finding]:
    """Does a node of this cluster listen behind each --peer?"""

    async def is_silent(host: str, port: int) -> bool:
        with contextlib.suppress(BadRequest):  # `peers` tells that
            await asyncio.to_thread(address.resolve, host)
            return not await agent.reach.answers(host, port)
        return False

    wanted = [address.peer(each, PORT) for each in agent.options.bus.peers]
    silent = await asyncio.gather(*(is_silent(*each) for each in wanted))
    remedy = f"Is that machine on, does `cordee up` run there, and is its firewall open for TCP {PORTS_TEXT}?"
    return [
        Finding(f"No node of this cluster answers at --peer {address.text(*each)}.", remedy, False)
        for each, nobody in zip(wanted, silent, strict=True)
        if nobody
    ]


async def missing(agent: Agent) -> Sequence[Finding]:
    """Are all nodes there that were once?"""
    nodes = agent.controller.nodes(time.monotonic())
    alive = {node for node, (state, _) in nodes.items() if state == "alive"}
    known = Peers(agent.identity).known
    absent = [
        f"{nodes[node][1].name if node in nodes else node} ({where})"
        for node, where in known.items()
        if node not in alive | agent.identity.revoked
    ]
    if not absent:
        return []
    more = f", and {len(absent) - NAMED_MAX} more" if len(absent) > NAMED_MAX else ""
    what = f"Not heard from: {', '.join(absent[:NAMED_MAX])}{more}."
    remedy = (
        f"Is each of them on and on this network, does `cordee up` run there, and are firewalls open for TCP "
        f"{PORTS_TEXT}? One that is gone for good: cordee remove NODE, on an admin."
    )
    return [Finding(what, remedy, False)]


async def clocks(agent: Agent) -> Sequence[Finding]:
    """Do the clocks of the nodes agree?"""
    now = time.monotonic()
    nodes = agent.controller.nodes(now)
    ahead = agent.controller.clocks(now)
    return clock_findings({nodes[node][1].name: seconds for node, seconds in ahead.items() if node in nodes})


def clock_findings(ahead: Mapping[str, float]) -> list[Finding]:
    """What follows from the clocks of the other nodes: by how many seconds they are ahead, by name.

    The cluster's clock is the median of all. Of two that differ nobody knows which is right.
    """
    if not ahead:
        return []
    median = statistics.median_low([0.0, *ahead.values()])
    found: list[Finding] = []
    if len(ahead) == 1:
        [(name, seconds)] = ahead.items()
        if abs(seconds) > CLOCK_OFF_SECONDS:
            what = f"This machine's clock is {_off(-seconds)} that of {name}: one of the two is wrong."
            found.append(_clock_finding(what, seconds))
        return found
    if abs(median) > CLOCK_OFF_SECONDS:
        what = f"This machine's clock is {_off(-median)} those of the other nodes."
        found.append(_clock_finding(what, median))
    for name, seconds in sorted(ahead.items()):
        if abs(seconds - median) > CLOCK_OFF_SECONDS:
            what = f"The clock of {name} is {_off(seconds - median)} those of the other nodes."
            found.append(_clock_finding(what, seconds - median))
    return found


def _clock_finding(what: str, seconds: float) -> Finding:
    remedy = "On the machine that is wrong: sudo timedatectl set-ntp true    (or set it: sudo date -s …)"
    return Finding(what, remedy, abs(seconds) >= CLOCK_WRONG_SECONDS)


def _off(seconds: float) -> str:
    """How far a clock is off, in words."""
    size, side = abs(seconds), "ahead of" if seconds > 0 else "behind"
    for unit, unit_seconds in (("days", 86_400), ("hours", 3600)):
        if size >= 2 * unit_seconds:
            return f"{size / unit_seconds:.0f} {unit} {side}"
    return f"{size / 60:.0f} minutes {side}" if size >= 120 else f"{size:.0f} seconds {side}"


async def firewall(agent: Agent) -> Sequence[Finding]:
    """Can other nodes connect to this one, and this one to them?"""
    there, here = await asyncio.gather(agent.reach.seen_by_others(), agent.reach.seen_from_here())
    names = {node: facts.name for node, facts in _nodes(agent).items()}
    found: list[Finding] = []
    closed = {names.get(node, node): tried for node, tried in there.items() if tried.closed}
    if closed:
        what = f"{_list(closed)} cannot connect to this machine{_at(closed)}: a firewall here is closed."
        lines = [OPEN_FIREWALL.format(network) for network in _networks(agent, there)]
        remedy = "\n  ".join([*lines, "(nftables: see docs/office.md, step 4)"])
        found.append(Finding(what, remedy, True))
    for node, tried in here.items():
        if tried.closed:
            name = names.get(node, node)
            what = f"This machine cannot connect to {name}{_at({name: tried})}: a firewall there is closed."
            found.append(Finding(what, f"Run `cordee doctor` on {name}: it says what to open.", True))
    return found


def _networks(agent: Agent, nodes: Iterable[str]) -> list[str]:
    """The networks of this machine that other nodes are on; all of its networks where that is not known."""
    known = Peers(agent.identity).known
    announced = [each for node in nodes for each in known.get(node, "").split(",") if each]
    theirs = [address.number(address.parse(each, 0)[0]) for each in announced]
    own = list(dict.fromkeys(map(address.network_of, agent.bus.addresses)))
    return [each for each in own if any(it in ipaddress.ip_network(each) for it in theirs if it)] or own


def _nodes(agent: Agent) -> dict[str, Facts]:
    return {node: facts for node, (_, facts) in agent.controller.nodes(time.monotonic()).items()}


def _list(names: Mapping[str, object]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last


def _at(tries: Mapping[str, Tried]) -> str:
    ports = sorted({port for tried in tries.values() for port in tried.closed})
    return f" on TCP port{'s' * (len(ports) > 1)} {', '.join(map(str, ports))}"


async def cpu_variants(agent: Agent) -> Sequence[Finding]:
    """Do the nodes compute with the same CPU variant?"""
    nodes = agent.controller.nodes(time.monotonic())
    return variant_findings([facts for state, facts in nodes.values() if state == "alive"])


def variant_findings(nodes: Sequence[Facts]) -> list[Finding]:
    """What follows from the CPU variants of the nodes that are alive."""
    by_variant: dict[str, list[str]] = {}
    for facts in sorted(nodes, key=lambda facts: facts.name):
        by_variant.setdefault(facts.cpu_variant, []).append(facts.name)
    if len(by_variant) < 2:
        return []
    listed = "; ".join(
        f"{variant} on {', '.join(names[:NAMED_MAX])}" for variant, names in sorted(by_variant.items())
    )
    what = (
        f"The nodes compute with different CPU variants: {listed}. An answer that moves between them "
        "goes on, but is not the same token for token."
    )
    remedy = "cordee up --cpu-variant common    (on each; needs the prebuilt libllama, a bit slower)"
    return [Finding(what, remedy, False)]


AT_START: tuple[AgentCheck, ...] = (port, listens_for_itself, peers)
CHECKS: tuple[AgentCheck, ...] = (*AT_START, silent_peers, missing, clocks, cpu_variants, firewall)
