"""This machine's place among the members: whether its disk is a copy, and whether an admin can be reached."""

import time
from collections.abc import Sequence
from typing import Any

from cordee.agent import control
from cordee.agent.agent import CLONE_FILE
from cordee.errors import CordeeError
from cordee.findings import Finding
from cordee.net import identity, renewal
from cordee.net.members import Members


def clone(facts: dict[str, Any]) -> Sequence[Finding]:
    """Does another machine run with this one's identity, or did it when this one was started last?"""
    if facts["disk"]["fault"] or not identity.exists():
        return []
    for node in _nodes():
        if node["cloned"]:
            what = f"Two machines run as {node['name']} ({node['id']}): one disk is a copy of the other."
            return [
                Finding(what, "On the copy: cordee leave --yes, then cordee join CODE", bool(node["self"]))
            ]
    try:
        text = (identity.place() / CLONE_FILE).read_text(encoding="ascii")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(text[:20])))
    except (OSError, ValueError, OverflowError):
        return []
    what = f"The identity of this machine is cloned: on {when} another machine ran with it."
    return [Finding(what, "If this disk is the copy: cordee leave --yes, then cordee join CODE", True)]


def admins(facts: dict[str, Any]) -> Sequence[Finding]:
    """Can an admin be reached, to renew this machine's certificate? Takes some seconds where none answers."""
    if facts["disk"]["fault"] or not identity.exists():
        return []
    try:
        member = identity.load()
    except CordeeError:
        return []  # `certificate` tells
    if member.is_admin or any(node["admin"] and node["state"] == "alive" for node in _nodes()):
        return []
    if renewal.reachable(member) is not None:
        return []
    valid = member.is_valid(time.time())
    names = " or ".join(admin.name for admin in Members(member).admins)
    day = time.strftime("%Y-%m-%d", time.localtime(member.validity()[1]))
    state = f"is valid until {day}" if valid else "is not valid now"
    what = f"No admin of the cluster can be reached, and the certificate of this machine {state}."
    remedy = f"Start cordee up on {names}" if names else "Start cordee up on an admin"
    return [Finding(what, f"{remedy}. If there is no admin any more, create the cluster anew.", not valid)]


def _nodes() -> list[dict[str, Any]]:
    """The members, as the node that runs here sees them; none if none runs."""
    try:
        return control.ask("GET", "/nodes", kind=dict[str, Any])["nodes"]
    except CordeeError:
        return []
