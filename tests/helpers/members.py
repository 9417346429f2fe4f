"""Members of clusters for tests, each with a state folder of its own."""

import os
import time
from pathlib import Path

from cryptography import x509

from cordee.net import identity
from cordee.net.identity import Identity

DAY_SECONDS = 86_400


def at_home(folder: Path) -> None:
    """From here on, act as the machine whose state lies in `folder`."""
    os.environ["CORDEE_HOME"] = str(folder)


def founder(folder: Path, now: float | None = None) -> Identity:
    """The first node of a new cluster."""
    at_home(folder)
    return identity.found(time.time() if now is None else now)


def newcomer(folder: Path, admin: Identity, now: float | None = None) -> Identity:
    """A further node, as if it had joined; in a slot of its own."""
    taken = {identity.slot_of(admin.node), *map(identity.slot_of, admin.revoked)}
    for other in folder.parent.glob("*/cluster/node.pem"):
        certificate = x509.load_pem_x509_certificate(other.read_bytes())
        taken.add(certificate.subject.rdns[0].rfc4514_string().removeprefix("CN="))
    key = identity.new_key()
    while identity.slot_of(identity.node_id(key.public_key())) in taken:
        key = identity.new_key()
    at_home(folder)
    signed = admin.sign(identity.certificate_request(key), time.time() if now is None else now)
    return identity.install(key, x509.load_pem_x509_certificate(signed), admin.authority)


def cluster(folder: Path, count: int) -> list[Identity]:
    """A cluster of `count` nodes, each with a folder of its own; the first is its admin."""
    first = founder(folder / "0")
    return [first, *(newcomer(folder / str(number), first) for number in range(1, count))]
