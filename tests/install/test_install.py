"""How the program is installed, updated and made a service."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cordee.errors import BadRequest
from cordee.install import bundle, update
from cordee.install.bundle import InstallBundle
from cordee.install.service import Service

ROOT = Path(__file__).resolve().parents[2]
INSTALLER = ROOT / "packaging" / "install.sh"
MAKER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
# What install.sh leaves, without the minutes that 60 packages take.
SMALL_INSTALLER = """\
here=$(dirname "$0")
while [ $# -gt 0 ]; do [ "$1" = --prefix ] && prefix=$2; shift; done
mkdir -p "$prefix/$(cat "$here/VERSION")/bin"
touch "$prefix/$(cat "$here/VERSION")/whole"
"""


def made(
    folder: Path, version: str, key: Ed25519PrivateKey = MAKER, installer: str = SMALL_INSTALLER
) -> InstallBundle:
    """A small folder that installs."""
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "cordee.whl").write_bytes(version.encode())
    (folder / "install.sh").write_text(installer)
    return bundle.write(folder, version, key)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What install.sh makes of version 0.2.0."""
    top = tmp_path / "top"
    old = made(top / "bundle", "0.2.0")
    (top / old.version).mkdir()
    (top / old.version / "whole").touch()
    update.switch(top, old.version)
    return top


def test_a_folder_is_what_its_maker_signed(tmp_path: Path) -> None:
    new = made(tmp_path / "new", "0.3.0")
    new.check_signature(new.small(bundle.MAKER))
    new.check_files()
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", bundle.SUMS], cwd=new.folder, capture_output=True
    )
    assert checked.returncode == 0, checked.stderr


def test_nobody_else_calls_an_old_version_new(tmp_path: Path) -> None:
    old = made(tmp_path / "old", "0.1.0")
    named = old.version.replace("0.1.0", "9.0.0")
    (old.folder / bundle.VERSION).write_text(named)
    with pytest.raises(BadRequest, match=f"does not belong to {named}"):
        InstallBundle(old.folder)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    new = made(tmp_path / "new", "0.3.0")
    (new.folder / "wheels" / "cordee.whl").write_bytes(b"something else")
    with pytest.raises(BadRequest, match=r"cordee\.whl is damaged"):
        new.check_files()


def test_changed_digests_are_noticed(tmp_path: Path) -> None:
    new = made(tmp_path / "new", "0.3.0")
    sums = new.folder / bundle.SUMS
    sums.write_text(sums.read_text().replace("a", "b"))
    with pytest.raises(BadRequest, match="damaged"):
        InstallBundle(new.folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    new = made(tmp_path / "new", "0.3.0")
    sums = f"{'0' * 64}  {name}\n"
    (new.folder / bundle.SUMS).write_text(sums)
    with pytest.raises(BadRequest, match="none of ours"):
        new.sums()


def test_an_update_takes_the_place_and_keeps_the_version_before(tmp_path: Path, installed: Path) -> None:
    before = (installed / "current").readlink()
    for version in ("0.3.0", "0.4.0"):
        new = made(tmp_path / version, version)
        update.check(new, installed)
        update.apply(new, installed, print)
        assert str((installed / "current").readlink()) == new.version
    assert not (installed / before).exists()  # two versions ago
    assert InstallBundle(installed / "bundle").version == new.version
    assert sum((folder / "whole").is_file() for folder in installed.iterdir() if not folder.is_symlink()) == 2


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of an HTTP server for the test's folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_folder_that_the_house_serves(tmp_path: Path, served: str) -> None:
    new = made(tmp_path / "new", "0.3.0")
    for name, maker in (("ours", MAKER), ("foreign", STRANGER)):
        copy = tmp_path / name
        copy.mkdir()
        public = maker.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if maker is MAKER:
            fetched = update.fetched(f"{served}/new", copy, public, print)
            fetched.check_files()
            assert fetched.version == new.version
        else:
            with pytest.raises(BadRequest, match="not signed by the maker"):
                update.fetched(f"{served}/new", copy, public, print)
            assert not (copy / "wheels").exists()  # not even fetched
    with pytest.raises(BadRequest, match="cannot be fetched"):
        update.fetched(f"{served}/elsewhere", tmp_path / "ours", b"", print)


def test_an_update_of_another_maker_or_an_older_one_is_refused(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(BadRequest, match="not signed by the maker"):
        update.check(made(tmp_path / "foreign", "0.3.0", STRANGER), installed)
    with pytest.raises(BadRequest, match="is older than"):
        update.check(made(tmp_path / "old", "0.1.9"), installed)
    with pytest.raises(BadRequest, match="installed already"):
        update.check(InstallBundle(installed / "bundle"), installed)


def test_an_update_that_cannot_be_installed_changes_nothing(tmp_path: Path, installed: Path) -> None:
    before = (installed / "current").readlink()
    new = made(tmp_path / "new", "0.3.0", installer="echo no room >&2; exit 1\n")
    with pytest.raises(Exception, match="no room"):
        update.apply(new, installed, print)
    assert (installed / "current").readlink() == before


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    """A folder with the real install.sh, on a machine with the programs in the folder `bin` beside it."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "id", "uname", "getconf", "df", "awk", "dirname", "sha256sum", "cat", "mkdir", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / "bin" / name).symlink_to(found)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    return made(tmp_path / "stick", "0.2.0", installer=INSTALLER.read_text()).folder


def refused(stick: Path) -> str:
    """What install.sh says when it refuses, having written nothing."""
    place = stick.parent / "place"
    command = ["sh", str(stick / "install.sh"), "--prefix", str(place), "--bin", str(place)]
    environment = {"PATH": str(stick.parent / "bin"), "HOME": str(stick.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert not place.exists()
    return done.stderr


def fake(stick: Path, name: str, text: str) -> None:
    program = stick.parent / "bin" / name
    program.unlink()
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_the_installer_says_what_is_missing_before_it_begins(stick: Path) -> None:
    fake(stick, "df", "echo Filesystem; echo /dev/sda 1000000 900000 100000 90% /")
    assert "100 MB free, and 900 MB are needed" in refused(stick)
    fake(stick, "python3", 'case "$1" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    assert "this machine has Python 3.9.2" in refused(stick)
    (stick.parent / "bin" / "python3").unlink()
    assert "this machine has none" in refused(stick)
    fake(stick, "uname", "echo armv7l")
    assert "armv7l" in refused(stick)


def test_the_installer_notices_a_damaged_file(stick: Path) -> None:
    (stick / "wheels" / "cordee.whl").write_bytes(b"half")
    assert "damaged or incomplete" in refused(stick)


@pytest.mark.parametrize("for_machine", [True, False])
def test_systemd_understands_the_unit(tmp_path: Path, for_machine: bool) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    text = Service(for_machine).text(["--name", 'pc "1" 100%', "--memory", "4GB"], 4_000_000_000)
    # The account and the program need not be on the machine that runs this test.
    lines = [line for line in text.splitlines() if not line.startswith(("User=", "Group=", "ExecStart="))]
    start = 'ExecStart="/bin/true" ' + next(
        line.partition('" ')[2] for line in text.splitlines() if line.startswith("ExecStart=")
    )
    lines.insert(lines.index("[Service]") + 1, start)
    unit = tmp_path / "cordee.service"
    unit.write_text("\n".join(lines) + "\n")
    environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, env=environment
    )
    assert "cordee.service" not in done.stderr
    assert '"pc \\"1\\" 100%%"' in text and "MemoryMax=5500000000" in text
