"""What `cordee doctor` looks at in this machine's place in a cluster: its identity, a copied disk, admins."""

import time
from typing import Any

from cordee.errors import CordeeError, IdentityDamaged

Found = tuple[str, str, bool]  # what it is, what to do, and whether it is a problem: see doctor.Finding


def findings(now: float) -> list[Found]:
    """What is wrong there; `now` in seconds since 1970. Takes some seconds where no admin answers."""
    from cordee.net import identity

    if not identity.exists():
        return []
    try:
        member = identity.load()
    except IdentityDamaged as error:
        return [(error.message, "cordee identity restore FILE", True)]
    nodes = _nodes()
    found = _clone(member.node, nodes)
    if not member.is_admin:
        found += _admins(nodes, valid=member.is_valid(now))
    return found


def _nodes() -> list[dict[str, Any]]:
    """The members, as the node that runs here sees them; none if none runs."""
    from cordee.agent import control

    try:
        return control.ask("GET", "/nodes", kind=dict[str, Any])["nodes"]
    except CordeeError:
        return []


def _clone(own: str, nodes: list[dict[str, Any]]) -> list[Found]:
    """Does another machine run with this one's identity, or did it when this one was started last?"""
    from cordee.agent.agent import CLONE_FILE
    from cordee.net import identity

    for node in nodes:
        if node["cloned"]:
            what = f"Two machines run as {node['name']} ({node['id']}): one disk is a copy of the other."
            return [(what, "On the copy: cordee leave --yes, then cordee join CODE", True)]
    try:
        text = (identity.place() / CLONE_FILE).read_text(encoding="ascii")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(text[:20])))
    except (OSError, ValueError, OverflowError):
        return []
    what = f"The identity of this machine ({own}) is cloned: on {when} another machine ran with it."
    return [(what, "If this disk is the copy: cordee leave --yes, then cordee join CODE", True)]


def _admins(nodes: list[dict[str, Any]], *, valid: bool) -> list[Found]:
    """Can an admin be reached, to renew this machine's certificate?"""
    from cordee.net import identity, renewal
    from cordee.net.members import Members

    if any(node["admin"] and node["state"] == "alive" for node in nodes):
        return []
    member = identity.load()
    if renewal.reachable(member) is not None:
        return []
    names = " or ".join(admin.name for admin in Members(member).admins)
    day = time.strftime("%Y-%m-%d", time.localtime(member.validity()[1]))
    state = f"is valid until {day}" if valid else "is not valid now"
    what = f"No admin of the cluster can be reached, and the certificate of this machine {state}."
    remedy = f"Start cordee up on {names}" if names else "Start cordee up on an admin"
    return [(what, f"{remedy}. If there is no admin any more, create the cluster anew.", not valid)]
