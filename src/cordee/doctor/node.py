"""What the node that runs here finds wrong: it is asked, since it alone sees the others (agent/checks.py)."""

from collections.abc import Sequence
from typing import Any

from cordee.agent import control
from cordee.errors import CordeeError, NotRunning, StorageFailed
from cordee.findings import Finding


def node_facts() -> dict[str, Any]:
    """Whether a node runs here."""
    try:
        known = control.ask("GET", "/nodes", kind=dict[str, Any])
    except (NotRunning, StorageFailed):  # or there is no state folder, which `disk` tells
        return {"node": None}
    except CordeeError as error:
        return {"node": {"name": "unknown", "fault": error.message}}
    own = next((each["name"] for each in known["nodes"] if each["self"]), "starting")
    alive = sum(each["state"] == "alive" for each in known["nodes"])
    return {"node": {"name": own, "fault": "", "alive": alive, "known": len(known["nodes"])}}


def node(facts: dict[str, Any]) -> Sequence[Finding]:
    """What does the node that runs here find?"""
    own = facts["node"]
    if own is None:
        return []
    if own["fault"]:
        return [Finding(own["fault"], "Stop `cordee up`, then start it again.", True)]
    try:
        return control.ask("GET", "/findings", kind=list[Finding])
    except NotRunning:  # it has just ended
        return []
    except CordeeError as error:
        return [Finding(error.message, "Stop `cordee up`, then start it again.", True)]
