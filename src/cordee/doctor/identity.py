"""Whether other nodes will accept this machine: its certificate, and the clock that it is judged by."""

import time
from collections.abc import Sequence
from typing import Any

from cordee.errors import CordeeError
from cordee.findings import Finding
from cordee.net import enrolment, identity
from cordee.net.identity import DAY_SECONDS, WARN_SECONDS


def certificate(facts: dict[str, Any]) -> Sequence[Finding]:
    """Is the certificate whole, valid, and not about to run out?"""
    now = time.time()
    if facts["disk"]["fault"] or not identity.exists():
        return []
    try:
        member = identity.load()
    except CordeeError as error:
        remedy = "cordee identity restore FILE    (from a back-up: docs/office.md, step 12)"
        return [Finding(error.message, remedy, True)]
    start, end = member.validity()
    if now < start:
        what = (
            f"This machine's clock says {_day(now)}, but its certificate is valid from {_day(start)} on: the "
            "clock is behind, or it was ahead when the certificate was made."
        )
        return [Finding(what, "Set the clock: sudo timedatectl set-ntp true", True)]
    if member.is_admin and member.node not in member.revoked:
        return []  # it renews its own when it starts
    try:
        enrolment.check(member, now)
    except CordeeError as error:
        return [Finding(error.message, "date    (is this machine's clock right?)", True)]
    if end - now < WARN_SECONDS:
        days = (end - now) / DAY_SECONDS
        what = f"This machine's certificate runs out in {days:.0f} days, on {_day(end)}."
        remedy = "Start an admin, and let this node run beside it: it is renewed within the hour."
        return [Finding(what, remedy, False)]
    return []


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(when))
