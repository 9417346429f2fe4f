"""A whole emulated PC of 1997 for tests: a Pentium II with 128 MB that boots Linux and runs what it is given.

`scripts/pentium2_machine.sh` fetches the kernel and busybox. Programs and small files travel in the
initramfs, which is memory of the machine; large ones on an IDE disk with an ext4 file system. Its clock
counts instructions (2 ns each), so what it says of time is the same on every host, and not the speed of a
real Pentium; waiting for the disk takes the host's time.
"""

import io
import os
import re
import shutil
import stat
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ROOT / "build" / "pentium2_machine"
# In the order in which they want to be loaded.
MODULES = (
    *("scsi_common", "scsi_mod", "libata", "ata_piix", "crct10dif_common", "crc-t10dif", "crc64"),
    *("crc64-rocksoft", "t10-pi", "sd_mod", "crc16", "crc32c_generic", "mbcache", "jbd2", "ext4"),
)
MARK = "@@@"
# Without them the kernel spends half of its boot on self-tests, and another address each time on itself.
KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off cryptomgr.notests nokaslr"
DEFAULT_TIMEOUT_SECONDS = 300

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs devices /dev
/bin/busybox stty -F /dev/ttyS0 -onlcr
export PATH=/bin
{disk}
{steps}
/bin/busybox poweroff -f
"""
STEP = """/bin/busybox echo '{mark} {name}'
{command}
/bin/busybox printf '\\n{mark} %d\\n' $?
"""


def sse_program() -> bytes:
    """A program of one SSE instruction (xorps) that ends well where there is SSE: ELF for i386 Linux."""
    code = bytes.fromhex("0f57c0 31db 8d4301 cd80")  # xorps xmm0, xmm0; exit(0)
    base, headers = 0x08048000, 52 + 32
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, base + headers, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    size = headers + len(code)
    return ident + header + struct.pack("<8I", 1, 0, base, base, size, size, 5, 4096) + code


@dataclass(frozen=True)
class Finding:
    """How a command on the machine ended, and all that it said; bytes that are no text as surrogates."""

    status: int
    text: str


def need_machine() -> None:
    """Skip the test where the machine cannot be had, with the line that changes this."""
    if shutil.which("qemu-system-i386") is None:
        pytest.skip("no emulator: apt-get install -y qemu-system-x86")
    if not (MACHINE / "vmlinuz").is_file():
        pytest.skip("no kernel for it: sh scripts/pentium2_machine.sh")


def need_debootstrap() -> None:
    """Skip the test where no Debian for i386 can be had, with what changes this."""
    if shutil.which("debootstrap") is None:
        pytest.skip("nothing to get a Debian with: apt-get install -y debootstrap")
    if os.geteuid():
        pytest.skip("debootstrap wants to be root")


def old_program(system: str = "pentium2") -> Path:
    """cordee-tiny for i686 Linux, or for "windows", built if something changed; skips where it cannot be."""
    target = ROOT / "build" / system / ("cordee-tiny.exe" if system == "windows" else "cordee-tiny")
    command = ["make", "-C", str(ROOT / "native"), str(Path("..") / target.relative_to(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True)
    lacks = re.search(r"needs: (apt install .*)", done.stderr)
    if done.returncode and lacks:
        pytest.skip(f"no compiler for i686: {lacks[1]}")
    assert done.returncode == 0, done.stderr
    return target


def make_disk(content: Path, image: Path) -> Path:
    """A disk image with the content of a folder, for `boot`."""
    if shutil.which("mke2fs") is None:
        pytest.skip("nothing to make a disk with: apt-get install -y e2fsprogs")
    megabytes = sum(path.lstat().st_size for path in content.rglob("*")) * 13 // 10_000_000 + 8
    options = ("-q", "-t", "ext4", "-O", "^has_journal", "-m", "0")
    command = ["mke2fs", *options, "-d", content, image, f"{megabytes}M"]
    subprocess.run(command, check=True, capture_output=True)
    return image


def boot(
    folder: Path,
    files: dict[str, Path | bytes],
    commands: dict[str, str],
    *,
    disk: Path | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> dict[str, Finding]:
    """Boot, run shell commands, switch off, and tell by their names how they went.

    `files` are put at these paths, all executable; a `disk` image is mounted at /disk. Scratch goes to
    `folder`.
    """
    steps = "".join(STEP.format(mark=MARK, name=name, command=line) for name, line in commands.items())
    content = {
        "init": INIT.format(disk=_mounting(disk), steps=steps).encode(),
        "bin/busybox": MACHINE / "busybox",
    }
    if disk:
        content |= {f"modules/{path.name}": path for path in (MACHINE / "modules").iterdir()}
    initramfs = folder / "initramfs"
    initramfs.write_bytes(_archive(content | files))
    machine = ["qemu-system-i386", "-M", "pc", "-cpu", "pentium2", "-m", "128", "-nic", "none", "-no-reboot"]
    # Without sleep the clock leaps ahead while nothing runs: a disk would seem too slow to answer at all.
    clock = ["-icount", f"shift=1,sleep={'on' if disk else 'off'}", "-nographic"]
    system = ["-kernel", MACHINE / "vmlinuz", "-initrd", initramfs, "-append", KERNEL_OPTIONS]
    drive = ["-drive", f"file={disk},format=raw,if=ide,snapshot=on"] if disk else []
    try:
        done = subprocess.run(
            [*machine, *clock, *system, *drive],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_seconds,
            check=True,
        )
    except subprocess.TimeoutExpired as slow:
        said = (slow.stdout or b"")[-3000:].decode(errors="replace")
        pytest.fail(f"the machine still ran after {timeout_seconds:.0f} s, having said:\n{said}")
    return _findings(done.stdout.decode(errors="surrogateescape"), commands)


def _mounting(disk: Path | None) -> str:
    if disk is None:
        return ""
    lines = [f"/bin/busybox insmod /modules/{name}.ko" for name in MODULES]
    wait = "while ! [ -b /dev/sda ]; do /bin/busybox sleep 0.1; done"
    return "\n".join([*lines, wait, "/bin/busybox mount -t ext4 /dev/sda /disk"])


def _findings(said: str, commands: dict[str, str]) -> dict[str, Finding]:
    findings = {}
    for name in commands:
        _, begun, rest = said.partition(f"{MARK} {name}\n")
        text, ended, after = rest.partition(f"\n{MARK} ")
        assert begun and ended, f"the machine stopped before or in {name!r}:\n{said[-3000:]}"
        findings[name] = Finding(int(after.split("\n", 1)[0]), text)
    return findings


def _archive(files: dict[str, Path | bytes]) -> bytes:
    """An initramfs: cpio's "newc" format, as Linux's early-userspace/buffer-format describes it."""
    folders = sorted(
        {str(parent) for name in files for parent in Path(name).parents} | {"proc", "dev", "disk"}
    )
    archive = io.BytesIO()
    entries = [(name, stat.S_IFDIR, b"") for name in folders if name != "."]
    entries += [
        (name, stat.S_IFREG, content if isinstance(content, bytes) else content.read_bytes())
        for name, content in files.items()
    ]
    for number, (name, kind, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, kind | 0o755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        for part in (head, content):
            archive.write(part + bytes(-len(part) % 4))
    return archive.getvalue()
