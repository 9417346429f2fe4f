"""Who this machine is: the cluster's authority, the node's key and certificate, and the removed nodes.

    cluster/ca.pem     the cluster's authority: trusted for this cluster and nothing else
    cluster/ca.key     its key; only admins have it (the first node, and nodes invited as admins)
    cluster/node.key   made here; never leaves this machine
    cluster/node.pem   the authority's signature under that key, short-lived
    cluster/revoked    nodes that were removed, each signed by the authority

The folder appears whole or not at all, so anything missing or damaged in it is a fault that is reported: the
cluster would not know a new identity in its place. Times are seconds since 1970, as `time.time()`.

**Clocks.** Only a node's certificate depends on them. It is renewed long before it runs out; one that ran out
while its machine was off, or was made while a clock was wrong, is renewed all the same (renewal.py), unless
the node was removed. The authority is trusted because it is this cluster's, whatever the time: its
certificate has no end that anybody will see, and no beginning that a wrong clock could put into the future.

A node's id is the first 16 hex digits of the SHA-256 of its public key, the cluster's id those of the SHA-256
of its authority's certificate. Keys are EC P-256: the smallest that rustls, OpenSSL and old clients all know.

**Common names are slots.** A certificate's common name is `slot_of(node)`, one of SLOTS names, by the first
digits of the node's id. `cordee.net.zenoh_bus` gives access to these names: its list changes when a node is
removed, not when one joins. No public authority signs a name without a dot. Two members never share a slot: a
machine that would join with a taken one makes another key.
"""

import contextlib
import datetime
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cordee import files
from cordee.errors import IdentityDamaged

DAY_SECONDS = 86_400
CERTIFICATE_SECONDS = 30 * DAY_SECONDS  # without an admin that renews it, a machine stops being a member
RENEW_SECONDS = CERTIFICATE_SECONDS // 3  # then some admin has to be up within the other two thirds
WARN_SECONDS = 10 * DAY_SECONDS  # before the end: no admin was there for the ten days before
BACKDATED_SECONDS = 2 * DAY_SECONDS  # so that a node whose clock is a day slow takes a fresh certificate
AUTHORITY_START = 946_684_800  # 2000-01-01, whatever the clock of the first machine says
AUTHORITY_SECONDS = 253_402_300_799 - AUTHORITY_START  # until 9999-12-31 23:59:59: no end (RFC 5280, 4.1.2.5)
SLOT_DIGITS = 2
SLOTS = 16**SLOT_DIGITS  # members and nodes ever removed; each costs a zenoh session 25 kB and 140 µs
FILE_BYTES_MAX = 1 << 20  # a list of SLOTS removed nodes takes 50 kB
PARTIAL = ".cluster."  # begins the name of a folder that is being made
ID_DIGITS = 16
ID_BYTES = ID_DIGITS // 2

T = TypeVar("T")


@dataclass
class Identity:
    """A member's identity, as it lies in `folder`; methods that change it change the disk first."""

    folder: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate
    authority_key: ec.EllipticCurvePrivateKey | None  # admins have it
    _revoked: dict[str, bytes] = field(default_factory=dict[str, bytes])  # the authority's signature, by node

    @property
    def node(self) -> str:
        """This node's id."""
        return node_id(self.key.public_key())

    @property
    def cluster(self) -> str:
        """The cluster's id."""
        return cluster_id(self.authority)

    @property
    def is_admin(self) -> bool:
        """Whether this node can invite, renew and remove."""
        return self.authority_key is not None

    @property
    def revoked(self) -> frozenset[str]:
        """The ids of all nodes known to be removed; it only ever grows."""
        return frozenset(self._revoked)

    @property
    def revocations(self) -> tuple[bytes, ...]:
        """What `admit` of the other members takes; to be sent to all of them, again and again."""
        return tuple(bytes.fromhex(node) + signature for node, signature in sorted(self._revoked.items()))

    def validity(self) -> tuple[float, float]:
        """From when until when the certificate is valid."""
        return validity_of(self.certificate)

    def is_valid(self, now: float) -> bool:
        """Whether the other members accept the certificate now."""
        start, end = self.validity()
        return start <= now < end

    def renewal_due(self, now: float) -> bool:
        """Whether a third of the certificate's life is over, or it begins later: a clock was wrong."""
        start, end = self.validity()
        return now < start or now >= end - CERTIFICATE_SECONDS + RENEW_SECONDS

    def request(self) -> bytes:
        """A request (PKCS #10, DER) to sign this node's key; there is nothing secret in it."""
        return certificate_request(self.key)

    def sign(self, request: bytes, now: float) -> bytes:
        """A certificate (PEM) for the key of a request; only an admin can.

        Raises:
            ValueError: it is not a request, or does not prove possession of a P-256 key.
        """
        assert self.authority_key is not None, "only an admin signs"
        return pem(_issue(requested_key(request), self.authority, self.authority_key, now))

    def sign_again(self, request: bytes, certificate: bytes, now: float) -> bytes:
        """`sign` for a member, which shows its present certificate (PEM); that one may have expired.

        Raises:
            ValueError: the certificate is not this cluster's for the request's key, or the node was removed.
        """
        return self.sign_for(x509.load_pem_x509_certificate(certificate), requested_key(request), now)

    def sign_for(self, certificate: x509.Certificate, key: CertificatePublicKeyTypes, now: float) -> bytes:
        """A certificate (PEM) for a member that shows its present one and has proved to hold `key`.

        Raises:
            ValueError: the certificate is not this cluster's for the key, or the node was removed.
        """
        assert self.authority_key is not None, "only an admin signs"
        return pem(_issue(self.check_member(certificate, key), self.authority, self.authority_key, now))

    def check_member(
        self, certificate: x509.Certificate, key: CertificatePublicKeyTypes
    ) -> ec.EllipticCurvePublicKey:
        """The key, if a certificate of this cluster is for it, and its node was not removed.

        Raises:
            ValueError: that is not so.
        """
        if not isinstance(key, ec.EllipticCurvePublicKey) or not _belongs(certificate, key, self.authority):
            raise ValueError("the certificate is not this cluster's for that key")
        if node_id(key) in self._revoked:
            raise ValueError("the node was removed")
        return key

    @property
    def member_certificate(self) -> bytes:
        """The certificate in DER, as it goes with what this node signs."""
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def sign_statement(self, statement: bytes) -> bytes:
        """This node's signature under what it says; whoever takes it begins a statement with its purpose."""
        return self.key.sign(statement, ec.ECDSA(hashes.SHA256()))

    def is_signed(self, node: str, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether a member signed a statement; its certificate (DER) may have expired since."""
        key = _member_key(certificate, self.authority)
        return key is not None and node_id(key) == node and _is_signed(key, statement, signature)

    def is_member(self, node: str, certificate: bytes) -> bool:
        """Whether a certificate (DER) of this cluster is that node's, whatever its dates."""
        key = _member_key(certificate, self.authority)
        return key is not None and node_id(key) == node

    def prove_admin(self, nonce: bytes) -> bytes:
        """A signature that proves to whoever chose `nonce` that this node holds the authority's key."""
        assert self.authority_key is not None, "only an admin can prove it"
        return self.authority_key.sign(_admin_proof(self.node, nonce), ec.ECDSA(hashes.SHA256()))

    def is_admin_proof(self, node: str, nonce: bytes, proof: bytes) -> bool:
        """Whether `proof` is what `prove_admin` gives at that node of this cluster."""
        return _is_signed(self.authority.public_key(), _admin_proof(node, nonce), proof)

    def sign_as_authority(self, statement: bytes) -> bytes:
        """The authority's signature under what an admin says for the whole cluster."""
        assert self.authority_key is not None, "only an admin signs"
        return self.authority_key.sign(statement, ec.ECDSA(hashes.SHA256()))

    def is_of_authority(self, statement: bytes, signature: bytes) -> bool:
        """Whether the authority signed a statement."""
        return _is_signed(self.authority.public_key(), statement, signature)

    def renew(self, certificate: bytes, now: float | None = None) -> None:
        """Take a new certificate (PEM) for this node's key; with `now`, only one that is valid then.

        Raises:
            ValueError: it is for another key, or not of this cluster's authority, or not valid.
        """
        renewed = x509.load_pem_x509_certificate(certificate)
        if not _belongs(renewed, self.key.public_key(), self.authority):
            raise ValueError("the certificate is not this cluster's for this node's key")
        start, end = validity_of(renewed)
        if now is not None and not start <= now < end:
            raise ValueError("the certificate is not valid now")
        _write(self.folder / "node.pem", pem(renewed))
        self.certificate = renewed

    def renew_self(self, now: float) -> None:
        """Renew the certificate of an admin, which signs its own."""
        self.renew(self.sign(self.request(), now))

    def become_admin(self, authority_key: bytes) -> None:
        """Take the authority's key (PEM), as another admin sent it.

        Raises:
            ValueError: it is not the key of this cluster's authority.
        """
        key = private_key(authority_key)
        if _spki(key.public_key()) != _spki(self.authority.public_key()):
            raise ValueError("the key is not that of this cluster's authority")
        _write(self.folder / "ca.key", private_pem(key))
        self.authority_key = key

    def authority_key_pem(self) -> bytes:
        """The authority's key (PEM), for a node that is invited as an admin."""
        assert self.authority_key is not None, "only an admin has it"
        return private_pem(self.authority_key)

    def is_revocation(self, entry: bytes) -> bool:
        """Whether the authority signed a removal."""
        return _is_revoked(self.authority, revoked_node(entry), entry[ID_BYTES:])

    def revoke(self, node: str) -> None:
        """Remove a node for good; only an admin can. The others learn it from `revocations`.

        Raises:
            ValueError: that is not a node id.
        """
        assert self.authority_key is not None, "only an admin removes"
        if node in self._revoked:
            return
        signature = self.authority_key.sign(_revocation(self.cluster, node), ec.ECDSA(hashes.SHA256()))
        self.admit([bytes.fromhex(node) + signature])

    def admit(self, revocations: Iterable[bytes]) -> frozenset[str]:
        """Add the `revocations` of another member; returns the nodes that are new among them.

        An entry that the authority did not sign is ignored: it can only be damaged or forged.
        """
        new: dict[str, bytes] = {}
        for entry in revocations:
            node = revoked_node(entry)
            if node not in self._revoked and self.is_revocation(entry):
                new[node] = entry[ID_BYTES:]
        if new:
            grown = self._revoked | new
            lines = "".join(f"{node} {signature.hex()}\n" for node, signature in sorted(grown.items()))
            _write(self.folder / "revoked", lines.encode())
            self._revoked = grown
        return frozenset(new)


def place() -> Path:
    """The folder of this machine's identity, whether or not it has one."""
    return files.home() / "cluster"


def exists() -> bool:
    """Whether this machine belongs to a cluster; its identity may still be damaged."""
    return place().exists()


def found(now: float) -> Identity:
    """Make a cluster with this machine as its first node and admin.

    Raises:
        StorageFailed: the folder cannot be written.
    """
    authority_key = new_key()
    authority = issue_authority(authority_key)
    key = new_key()
    certificate = _issue(key.public_key(), authority, authority_key, now)
    return install(key, certificate, authority, authority_key)


def install(
    key: ec.EllipticCurvePrivateKey,
    certificate: x509.Certificate,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey | None = None,
) -> Identity:
    """Write a new identity, whole or not at all.

    Raises:
        IdentityDamaged: there is one already.
        StorageFailed: the folder cannot be written.
    """
    folder = place()
    for left in folder.parent.glob(f"{PARTIAL}*"):  # of a process that was killed; there is a key in it
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
    try:
        _write(partial / "ca.pem", pem(authority))
        _write(partial / "node.key", private_pem(key))
        _write(partial / "node.pem", pem(certificate))
        _write(partial / "revoked", b"")
        if authority_key is not None:
            _write(partial / "ca.key", private_pem(authority_key))
        partial.rename(folder)
    except OSError as error:
        raise IdentityDamaged(
            f"{folder} cannot be made ({error.strerror}): this machine belongs to a cluster already; "
            "`cordee leave` ends that."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Identity(folder, key, certificate, authority, authority_key)


def load(folder: Path | None = None) -> Identity:
    """This machine's identity, or the one in another folder, every file of it checked.

    Raises:
        IdentityDamaged: a file is missing, unreadable or not what it should be; the message names it.
    """
    folder = folder or place()
    with contextlib.suppress(OSError):  # another user's folder shows below, when its files cannot be read
        folder.chmod(0o700)
    authority = _read(folder / "ca.pem", x509.load_pem_x509_certificate)
    key = _read(folder / "node.key", private_key)
    certificate = _read(folder / "node.pem", x509.load_pem_x509_certificate)
    if not _belongs(certificate, key.public_key(), authority):
        raise _damaged(folder / "node.pem", "it does not belong to node.key and ca.pem")
    authority_key = None
    if (folder / "ca.key").exists():
        authority_key = _read(folder / "ca.key", private_key)
        if _spki(authority_key.public_key()) != _spki(authority.public_key()):
            raise _damaged(folder / "ca.key", "it is not the key of ca.pem")
    revoked = _read(folder / "revoked", lambda data: _revoked_of(data, authority))
    return Identity(folder, key, certificate, authority, authority_key, revoked)


def forget() -> None:
    """Leave the cluster: delete this machine's identity. Nothing can bring it back."""
    shutil.rmtree(place(), ignore_errors=True)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def node_id(key: ec.EllipticCurvePublicKey) -> str:
    """The id of the node that holds the private key."""
    return hashlib.sha256(_spki(key)).hexdigest()[:ID_DIGITS]


def certified_node(certificate: x509.Certificate) -> str:
    """The id of the node that a certificate is for.

    Raises:
        ValueError: its key is none of a node.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the key is not an EC key")
    return node_id(key)


def cluster_id(authority: x509.Certificate) -> str:
    """The id of the cluster of this authority."""
    return authority.fingerprint(hashes.SHA256()).hex()[:ID_DIGITS]


def slot_of(node: str) -> str:
    """The common name of a node's certificate."""
    return f"cordee-{node[:SLOT_DIGITS]}"


def revoked_node(revocation: bytes) -> str:
    """The id of the node that a revocation is about."""
    return revocation[:ID_BYTES].hex()


def slots() -> list[str]:
    """All SLOTS common names that there can be."""
    return [f"cordee-{number:0{SLOT_DIGITS}x}" for number in range(SLOTS)]


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request (PKCS #10, DER) to sign this key, signed with it, which proves possession of the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(slot_of(node_id(key.public_key()))))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key of which a request proves possession.

    Raises:
        ValueError: it is not a request, its signature is wrong, or the key is not EC P-256.
    """
    parsed = x509.load_der_x509_csr(request)
    key = parsed.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not EC P-256")
    if not parsed.is_signature_valid:
        raise ValueError("the request is not signed by its key")
    return key


def validity_of(certificate: x509.Certificate) -> tuple[float, float]:
    """From when until when a certificate is valid."""
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate in PEM, as files and messages hold it."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _issue(
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: float,
) -> x509.Certificate:
    node = node_id(key)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = certificate_builder(key, slot_of(node), authority.subject, now, CERTIFICATE_SECONDS)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{node}.cordee")]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def issue_authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The certificate of a new authority, signed by itself."""
    name = _name("cordee authority")
    return (
        certificate_builder(key.public_key(), "cordee authority", name, AUTHORITY_START, AUTHORITY_SECONDS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def certificate_builder(
    key: ec.EllipticCurvePublicKey, common_name: str, issuer: x509.Name, now: float, life_seconds: int
) -> x509.CertificateBuilder:
    """What all certificates have, to be completed and signed."""
    # By adding, because Windows converts no time after the year 3000.
    epoch = datetime.datetime.fromtimestamp(0, datetime.UTC)
    start = epoch + datetime.timedelta(seconds=now - BACKDATED_SECONDS)
    end = epoch + datetime.timedelta(seconds=now + life_seconds)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """What a key is for: to sign certificates, or handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _belongs(
    certificate: x509.Certificate, key: ec.EllipticCurvePublicKey, authority: x509.Certificate
) -> bool:
    """Whether a certificate is the authority's, for this key; its dates are another question."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return _spki(certificate.public_key()) == _spki(key)


@lru_cache(maxsize=4 * SLOTS)  # of each member, and what forgers send
def _member_key(certificate: bytes, authority: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    """The key that a certificate (DER) of this authority is for; None if it is none."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not _belongs(parsed, key, authority):
        return None
    return key


def _revocation(cluster: str, node: str) -> bytes:
    return f"cordee revocation {cluster} {node}".encode()


def _admin_proof(node: str, nonce: bytes) -> bytes:
    return f"cordee admin {node} ".encode() + nonce


def _is_revoked(authority: x509.Certificate, node: str, signature: bytes) -> bool:
    return _is_signed(authority.public_key(), _revocation(cluster_id(authority), node), signature)


def _is_signed(key: CertificatePublicKeyTypes, statement: bytes, signature: bytes) -> bool:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _revoked_of(data: bytes, authority: x509.Certificate) -> dict[str, bytes]:
    revoked: dict[str, bytes] = {}
    for line in data.decode().splitlines():
        node, _, signature = line.partition(" ")
        if not _is_revoked(authority, node, bytes.fromhex(signature)):
            raise ValueError("an entry is not signed by the cluster's authority")
        revoked[node] = bytes.fromhex(signature)
    return revoked


def _read(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be read") from error
    if len(data) > FILE_BYTES_MAX:
        raise _damaged(path, "it is too long")
    try:
        return parse(data)
    except (ValueError, TypeError) as error:
        raise _damaged(path, str(error).partition("\n")[0] or "it is not what it should be") from error


def _damaged(path: Path, reason: str) -> IdentityDamaged:
    return IdentityDamaged(
        f"{path} is damaged ({reason}): put it back from a backup, or delete the folder "
        f"{path.parent} and join again with a code that `cordee invite` prints on another node."
    )


def _write(path: Path, data: bytes) -> None:
    with files.atomic_file(path) as file:  # mode 0600, as all of mkstemp
        file.write(data)


def private_key(data: bytes) -> ec.EllipticCurvePrivateKey:
    """The key in a PEM.

    Raises:
        ValueError: there is none, or none that is EC.
    """
    key = serialization.load_pem_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an EC key")
    return key


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A key in PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _spki(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
