"""The folder that installs Cordée without a network (`make bundle`): its digests, and who vouches for them.

    VERSION          version and the beginning of the digest of SHA256SUMS: `0.2.0-1f0c2ab9`
    SHA256SUMS       the version in a comment, so that it is signed, too, and the SHA-256 of every file but
                     VERSION and those of this list, as sha256sum(1) writes it
    SHA256SUMS.sig   an Ed25519 signature of SHA256SUMS (RFC 8032)
    maker.pem        the public key of who made the folder
    install.sh       the installer; wheels/ and docs/ are what it installs

Who brings the first folder to a machine vouches for it. From then on `cordee update` takes only folders that
the same maker has signed.
"""

import hashlib
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from cordee.errors import BadRequest

SUMS, SIGNATURE, MAKER, VERSION = "SHA256SUMS", "SHA256SUMS.sig", "maker.pem", "VERSION"
SMALL_BYTES_MAX = 1 << 20  # of each of these four; a folder has some hundred files
LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._+/-]{1,200})")  # no name leads out of the folder: see `sums`
VERSION_TEXT = re.compile(r"([0-9][0-9A-Za-z.+]{0,40})-([0-9a-f]{8})")


class InstallBundle:
    """A folder that installs Cordée.

    Raises:
        BadRequest: it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = self.small(VERSION).decode("utf-8", "replace").strip()
        if not VERSION_TEXT.fullmatch(text):
            raise BadRequest(f"{folder / VERSION} does not name a version: the folder is damaged.")
        self.version = text
        sums = self.small(SUMS)
        signed = sums.startswith(_title(text.partition("-")[0]).encode())
        if not signed or not text.endswith(hashlib.sha256(sums).hexdigest()[:8]):
            raise BadRequest(f"{folder / SUMS} does not belong to {text}: the folder is damaged.")

    def small(self, name: str) -> bytes:
        """The content of one of its small files."""
        try:
            with (self.folder / name).open("rb") as file:
                content = file.read(SMALL_BYTES_MAX + 1)
        except OSError as error:
            raise BadRequest(f"{self.folder} is no folder that installs Cordée: it has no {name}.") from error
        if len(content) > SMALL_BYTES_MAX:
            raise BadRequest(f"{self.folder / name} is larger than {SMALL_BYTES_MAX} bytes: it is damaged.")
        return content

    def sums(self) -> dict[str, str]:
        """The SHA-256 of each file, by its path in the folder."""
        found: dict[str, str] = {}
        for line in self.small(SUMS).decode("utf-8", "replace").splitlines():
            if line.startswith("#"):
                continue
            match = LINE.fullmatch(line)
            if match is None or ".." in match[2].split("/") or match[2].startswith("/"):
                raise BadRequest(f"{self.folder / SUMS} has a line that is none of ours: {line[:80]!r}")
            found[match[2]] = match[1]
        return found

    def check_signature(self, maker: bytes) -> None:
        """Did the owner of this public key (PEM) sign the digests?

        Raises:
            BadRequest: no.
        """
        try:
            key = load_pem_public_key(maker)
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError("not an Ed25519 key")
            key.verify(self.small(SIGNATURE), self.small(SUMS))
        except InvalidSignature as error:
            raise BadRequest(
                f"{self.folder} was not signed by the maker of the Cordée that is installed: do not use it, "
                "unless you know where it comes from. Then install it by hand: sh install.sh"
            ) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BadRequest(
                f"The installed {MAKER} is damaged: install Cordée by hand: sh install.sh"
            ) from error

    def check_files(self) -> None:
        """Has every file the digest that SHA256SUMS gives?

        Raises:
            BadRequest: one has not, or is missing.
        """
        for name, digest in self.sums().items():
            try:
                with (self.folder / name).open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise BadRequest(f"{self.folder / name} cannot be read: copy the folder anew.") from error
            if found != digest:
                raise BadRequest(f"{self.folder / name} is damaged: copy the folder anew.")


def write(folder: Path, version: str, key: Ed25519PrivateKey) -> InstallBundle:
    """Make a bundle of a folder whose other files are all there: digests, signature, version."""
    listed = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = {SUMS, SIGNATURE, MAKER, VERSION}
    lines = [f"{_digest(folder / name)}  {name}\n" for name in listed if name not in own]
    sums = "".join([_title(version), *lines]).encode()
    (folder / SUMS).write_bytes(sums)
    (folder / SIGNATURE).write_bytes(key.sign(sums))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / MAKER).write_bytes(public)
    (folder / VERSION).write_text(f"{version}-{hashlib.sha256(sums).hexdigest()[:8]}\n", encoding="ascii")
    return InstallBundle(folder)


def _title(version: str) -> str:
    """The first line of SHA256SUMS, a comment for sha256sum(1)."""
    return f"# Cordée {version}\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
