"""Certificates for the API's listener to other machines: the names and addresses by which they call it.

In a cluster its authority signs them, for the node's own key: so such a certificate makes nobody a member who
is none, and ends with the node. Its common name is no slot, and the bus lets nobody in with it. Where there
is no cluster, a small authority is made for this machine alone.

Colleagues tell their programs to trust the authority. So that a member that somebody has taken over cannot
pass for sites of the world, an admin signs for others only addresses and names that no public site has.
"""

import contextlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from cordee import files
from cordee.errors import IdentityDamaged
from cordee.net import address, identity

NAMES_MAX = 32  # of one certificate
NAME_CHARS_MAX = 253  # of a host (RFC 1035)
COMMON_NAME = "cordee API"
# Endings of names that no public registry hands out (RFC 6762 and its appendix G, RFC 8375, RFC 6761, and
# `internal`, which ICANN has set aside).
HOUSE_ENDINGS = (
    "local",
    "lan",
    "internal",
    "home.arpa",
    "home",
    "corp",
    "private",
    "intranet",
    "localhost",
    "test",
)


def is_of_house(name: str) -> bool:
    """Whether a name or an address can be nobody's but this house's."""
    found = address.number(name)
    if found is not None:
        return found.is_private or found.is_link_local or any(found in each for each in address.PRIVATE)
    return "." not in name or name.endswith(tuple(f".{ending}" for ending in HOUSE_ENDINGS))


def issue(
    key: ec.EllipticCurvePublicKey,
    names: Iterable[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: float,
) -> bytes:
    """A certificate (PEM) for a server with these names and addresses.

    Raises:
        ValueError: one is neither, or there are too many.
    """
    kept = list(dict.fromkeys(names))
    if not 0 < len(kept) <= NAMES_MAX or any(len(name) > NAME_CHARS_MAX for name in kept):
        raise ValueError(f"a server has 1 to {NAMES_MAX} names")
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = identity.certificate_builder(
        key, COMMON_NAME, authority.subject, now, identity.CERTIFICATE_SECONDS
    )
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(identity.key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(map(_general_name, kept))), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return identity.pem(certificate)


def names_of(certificate: x509.Certificate) -> set[str]:
    """The names and addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = map(str, found.get_values_for_type(x509.IPAddress))
    return {*found.get_values_for_type(x509.DNSName), *addresses}


def fingerprint(authority: x509.Certificate) -> str:
    """What people compare: the SHA-256 of a certificate, as openssl and browsers show it."""
    return authority.fingerprint(hashes.SHA256()).hex(":").upper()


class OwnAuthority:
    """The authority of a machine that is in no cluster, in a folder of its own; made where there is none.

        ca.pem, ca.key      the authority
        api.key             the server's key

    Raises:
        IdentityDamaged: a file of it cannot be read.
        StorageFailed: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.exists():
            self._make()
        with contextlib.suppress(OSError):
            folder.chmod(0o700)
        try:
            self.authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            self._authority_key = identity.private_key((folder / "ca.key").read_bytes())
            self._key = identity.private_key((folder / "api.key").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise IdentityDamaged(
                f"{folder} is damaged ({error}): delete it, and the next start makes another authority, "
                "which clients have to trust anew."
            ) from error

    def sign(self, names: Iterable[str], now: float) -> bytes:
        """A certificate (PEM) for api.key."""
        return issue(self._key.public_key(), names, self.authority, self._authority_key, now)

    def _make(self) -> None:
        authority_key = identity.new_key()
        with files.atomic_folder(self.folder) as partial:
            for name, data in (
                ("ca.pem", identity.pem(identity.issue_authority(authority_key))),
                ("ca.key", identity.private_pem(authority_key)),
                ("api.key", identity.private_pem(identity.new_key())),
            ):
                with files.atomic_file(partial / name) as file:
                    files.write_all(file, data)


def _general_name(name: str) -> x509.GeneralName:
    found = address.number(name)
    return x509.DNSName(name) if found is None else x509.IPAddress(ipaddress.ip_address(str(found)))
