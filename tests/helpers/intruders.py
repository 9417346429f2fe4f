"""Intruders on the bus: certificates that do not make a member, and a session without access control."""

import json
import time
from pathlib import Path

import zenoh
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from cordee.net import identity
from cordee.net.identity import Identity
from members import DAY_SECONDS, founder, newcomer


def intruder_certificate(kind: str, folder: Path, admin: Identity, removed: Identity) -> Path:
    """A folder with ca.pem, node.pem and node.key of an intruder; `kind` is how its certificate is wrong."""
    key = identity.new_key()
    name = identity.slot_of(admin.node) if kind in ("foreign", "self-made") else "www.example.com"
    past = time.time() - 40 * DAY_SECONDS
    if kind == "removed":
        return removed.folder
    if kind == "foreign":
        return founder(folder / "foreign").folder
    if kind == "expired":
        return newcomer(folder / "expired", admin, past).folder
    issuer = identity._name(name) if kind == "self-made" else admin.authority.subject
    builder = identity.certificate_builder(key.public_key(), name, issuer, time.time(), DAY_SECONDS)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.DNSName("www.example.com")]), critical=False
    )
    authority_key = key if kind == "self-made" else admin.authority_key
    assert authority_key is not None
    signed = builder.sign(authority_key, hashes.SHA256())
    made = folder / kind
    made.mkdir()
    (made / "ca.pem").write_bytes((admin.folder / "ca.pem").read_bytes())
    (made / "node.pem").write_bytes(identity.pem(signed))
    private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (made / "node.key").write_bytes(key.private_bytes(*private))
    return made


def intruder(
    folder: Path, authority: Path, where: list[str], port: int | None = 0, mode: str = "peer"
) -> zenoh.Session:
    """A session without access control, with the certificate in `folder`.

    `authority` is the certificate that signed those of the members; it connects to members at `where`. With
    `port` None it listens nowhere, and has no links but those.
    """
    tls = {
        f"{side}_{what}": str(folder / file)
        for side in ("listen", "connect")
        for what, file in (("certificate", "node.pem"), ("private_key", "node.key"))
    }
    tls |= {
        "root_ca_certificate": str(authority),
        "enable_mtls": True,
        "verify_name_on_connect": False,
    }
    config = {
        "mode": mode,
        "listen": {"endpoints": [] if port is None else [f"tls/127.0.0.1:{port}"]},
        "connect": {"endpoints": [f"tls/{each}" for each in where]},
        "scouting": {"multicast": {"enabled": False}, "gossip": {"enabled": port is not None}},
        "transport": {"link": {"tls": tls}},
    }
    return zenoh.open(zenoh.Config.from_json5(json.dumps(config)))
