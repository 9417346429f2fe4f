"""Cordée as a service of systemd: the unit, and what installs and removes it.

For root it is a service of the machine, under an account of its own that can read and write little else. For
any other account it is one of that account, which starts at boot, too (`loginctl enable-linger`).
https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html describes each line.
"""

import getpass
import grp
import os
import pwd
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.errors import BadRequest, NotRunning, SetupNeeded
from cordee.files import atomic_file, write_all
from cordee.install import layout

UNIT = "cordee.service"
ACCOUNT = "cordee"  # of the machine's service
STATE = Path("/var/lib/cordee")  # its home folder
RUNNING = Path("/run/systemd/system")  # is there if systemd runs: sd_booted(3)
# Beside the models: the agent, vocabularies, a worker's own needs. Short of that the kernel ends workers.
BESIDE_MODELS_BYTES = 1_500_000_000
NOT_ADMITTED = 12  # exit code of a node that was removed or runs twice: starting it again changes nothing
COMMAND_SECONDS = 120.0  # stopping waits for what is being answered

UNIT_TEXT = """\
# Made by `cordee service install`; `cordee service remove` removes it.
[Unit]
Description=Cordée: open language models on the machines of this network
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=5
RestartPreventExitStatus={not_admitted}
KillMode=mixed
TimeoutStopSec=90
LimitNOFILE=65536
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
{more}
[Install]
WantedBy={target}
"""
MACHINE_LINES = f"""\
User={ACCOUNT}
Group={ACCOUNT}
Environment=HOME={STATE} XDG_RUNTIME_DIR=/run/cordee
StateDirectory=cordee
StateDirectoryMode=0700
RuntimeDirectory=cordee
RuntimeDirectoryMode=0700
WorkingDirectory={STATE}
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""


@dataclass(frozen=True)
class Service:
    """The service of the machine, or of this account."""

    for_machine: bool

    @property
    def place(self) -> Path:
        """The unit's file."""
        folder = Path("/etc/systemd/system") if self.for_machine else Path.home() / ".config/systemd/user"
        return folder / UNIT

    def text(self, options: Sequence[str], lent_bytes: int | None) -> str:
        """The unit that runs `cordee up` with these options; `lent_bytes` of memory are for models."""
        lines = [MACHINE_LINES, _groups()] if self.for_machine else []
        if lent_bytes is not None:
            lines.append(f"MemoryMax={lent_bytes + BESIDE_MODELS_BYTES}\n")
        return UNIT_TEXT.format(
            command=" ".join(map(_quoted, (str(layout.program()), "up", *options))),
            not_admitted=NOT_ADMITTED,
            more="".join(lines),
            target="multi-user.target" if self.for_machine else "default.target",
        )

    def install(self, text: str) -> None:
        """Write the unit, and start it now and at each boot.

        Raises:
            BadRequest: the service could not read the program.
            SetupNeeded: systemd does not run here, or refuses.
        """
        _require_systemd()
        if self.for_machine:
            _require_readable(layout.program())
            _make_account()
        self.place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.place) as file:
            write_all(file, text.encode())
        self.place.chmod(0o644)
        self.systemctl("daemon-reload")
        self.systemctl("enable", UNIT)
        if not self.for_machine:
            _run("loginctl", "enable-linger", getpass.getuser())
        self.systemctl("restart", UNIT)

    def remove(self) -> None:
        """End it, and remove the unit. The state (models, identity) stays.

        Raises:
            NotRunning: there is none.
        """
        self.require()
        if RUNNING.is_dir():
            self.systemctl("disable", "--now", UNIT)
        self.place.unlink()
        if RUNNING.is_dir():
            self.systemctl("daemon-reload")

    def require(self) -> None:
        """Raises NotRunning if it is not installed."""
        if not self.place.is_file():
            whose = "of this machine" if self.for_machine else "of this account"
            other = Service(not self.for_machine).place
            hint = ""
            if other.is_file():
                hint = f" ({other} is another: " + ("without sudo" if self.for_machine else "with sudo") + ")"
            raise NotRunning(f"Cordée is no service {whose}{hint}: cordee service install")

    @property
    def is_active(self) -> bool:
        """Whether it runs now."""
        return self.shown("ActiveState") == "active"

    def shown(self, name: str) -> str:
        """What systemd says of a property of the unit."""
        return self.systemctl("show", "--value", f"--property={name}", UNIT).strip()

    def systemctl(self, *arguments: str) -> str:
        """What systemctl prints.

        Raises:
            SetupNeeded: it fails.
        """
        return _run("systemctl", *([] if self.for_machine else ["--user"]), *arguments)

    def journal(self, *, follow: bool, lines: int) -> int:
        """Show what it said, with times; gives journalctl's exit code."""
        whose = "--unit" if self.for_machine else "--user-unit"
        more = ["--follow"] if follow else ["--no-pager"]
        command = ["journalctl", f"{whose}={UNIT}", "--output=short-iso", f"--lines={lines}", *more]
        try:
            return subprocess.run(command, check=False).returncode
        except FileNotFoundError as error:
            raise SetupNeeded("This system has no journalctl: systemd does not run here.") from error


def own() -> Service:
    """The service that this account would install: for root, the machine's."""
    return Service(os.geteuid() == 0)


def _require_systemd() -> None:
    if not RUNNING.is_dir():
        raise SetupNeeded(
            "systemd does not run here, as in a container: have what starts programs on this system start "
            f"`{shlex.quote(str(layout.program()))} up`."
        )


def _require_readable(program: Path) -> None:
    """Raises BadRequest if the service's account could not reach the program."""
    for folder in program.resolve().parents:
        if not folder.stat().st_mode & 0o001 or str(folder) in ("/home", "/root"):
            raise BadRequest(
                f"The machine's service cannot read {program}: install Cordée for the whole machine (sudo sh "
                "install.sh, or the Debian package), or make it a service of your account: without sudo."
            )


def _make_account() -> None:
    try:
        pwd.getpwnam(ACCOUNT)
    except KeyError:
        more = ("--home-dir", str(STATE), "--no-create-home", "--shell", "/usr/sbin/nologin")
        _run("useradd", "--system", "--user-group", *more, ACCOUNT)


def _groups() -> str:
    """The groups that may use graphics cards, where there are such."""
    there = {group.gr_name for group in grp.getgrall()} & {"render", "video"}
    return f"SupplementaryGroups={' '.join(sorted(there))}\n" if there else ""


def _quoted(word: str) -> str:
    """A word of ExecStart: no `%` or `$` of it means anything to systemd."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except FileNotFoundError as error:
        raise SetupNeeded(f"This system has no {command[0]}.") from error
    except subprocess.TimeoutExpired as error:
        raise SetupNeeded(f"{shlex.join(command)} takes too long: try it yourself.") from error
    if done.returncode:
        raise SetupNeeded(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
