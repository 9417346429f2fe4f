"""Makes the folder that installs Cordée without a network, for a USB stick: `make bundle`.

It has our wheels, those of every library for Python 3.11 to 3.14, the installer, the documents in English
and French, and SHA256SUMS. The libraries are in the very versions that the tests of this tree run with. The
digests are signed with the key of whoever makes the folder (--key); `cordee update` takes only what the maker
of the installed version has signed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cordee import __version__
from cordee.install import bundle

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
KEY = Path("~/.config/cordee/signing.key").expanduser()
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# What runs with the glibc of our own wheels (PEP 600), and the older name of one of these.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(34, 16, -1)), "manylinux2014")
OURS = ("cordee-", "cordee_libllama-", "cordee_starter-", "llama_cpp_python-")
DOCUMENTS = ("README.md", "README.fr.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")


def main() -> None:
    """Make dist/cordee-bundle, and print its path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--key", type=Path, default=KEY, help="private key that signs; made if it is not there"
    )
    chosen = parser.parse_args()
    target = DIST / f"cordee-bundle-{__version__}-linux-x86_64"
    partial = DIST / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "docs").mkdir(parents=True)
    wheels(partial / "wheels")
    for path in [*map(ROOT.joinpath, DOCUMENTS), *(ROOT / "docs").glob("*.md")]:
        shutil.copy(path, partial / ("docs" if path.parent.name == "docs" else ".") / path.name)
    shutil.copytree(ROOT / "docs" / "images", partial / "docs" / "images")
    shutil.copy(ROOT / "packaging" / "install.sh", partial)
    bundle.write(partial, __version__, signing_key(chosen.key))
    for old in DIST.glob("cordee-bundle-*"):
        shutil.rmtree(old)
    partial.rename(target)
    print(target)


def wheels(folder: Path) -> None:
    """Our wheels, pip, and every library that they ask for, for each Python."""
    folder.mkdir()
    for start in OURS:
        found = list(DIST.glob(f"{start}*.whl"))
        if len(found) != 1:
            sys.exit(f"{DIST} has {len(found)} wheels {start}*.whl, and one is needed: make wheels")
        shutil.copy(found[0], folder)
    constraints = DIST / ".constraints.txt"
    frozen = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    )
    pinned = re.findall(r"^(?!llama|cordee)[\w.-]+==\S+$", frozen.stdout, re.MULTILINE)
    constraints.write_text("\n".join(pinned) + "\n", encoding="utf-8")
    for python in PYTHONS:
        abis = [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
        platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        download += [
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={python}",
            *abis,
            *platforms,
        ]
        download += [
            f"--constraint={constraints}",
            f"--find-links={folder}",
            f"--dest={folder}",
            "cordee",
            "pip",
        ]
        subprocess.run(download, check=True)
    constraints.unlink()


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The key of whoever makes bundles here."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = Ed25519PrivateKey.generate()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        print(
            f"New signing key: {path}. Keep it: machines take updates only from the maker of what they have."
        )
    if not isinstance(key, Ed25519PrivateKey):
        sys.exit(f"{path} is not an Ed25519 key.")
    return key


if __name__ == "__main__":
    main()
