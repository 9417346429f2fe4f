"""All checks of this machine, in the order in which their findings are shown.

A check is a function that takes the facts of `facts()` and gives findings; to add one, add it to CHECKS. What
only a running node can see (other nodes, above all) is found by agent/checks.py, and asked for by `node`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cordee.doctor.computing import computing_facts, gpus, library, memory
from cordee.doctor.identity import certificate
from cordee.doctor.members import admins, clone
from cordee.doctor.node import node, node_facts
from cordee.doctor.places import disk, places_facts, ports
from cordee.findings import Finding

Check = Callable[[dict[str, Any]], Sequence[Finding]]

CHECKS: tuple[Check, ...] = (library, memory, disk, gpus, ports, certificate, clone, admins, node)


def facts() -> dict[str, Any]:
    """What this machine has, fit for JSON; the checks look at it."""
    return computing_facts() | places_facts() | node_facts()


def findings(known: dict[str, Any]) -> list[Finding]:
    """What follows from the facts of this machine; what is mentioned twice counts once."""
    found = (finding for check in CHECKS for finding in check(known))
    return list(dict.fromkeys(found))
