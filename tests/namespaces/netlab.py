"""Hosts on one machine: network namespaces on a bridge, each with an address, a memory limit, a CPU quota.

    with Lab([Machine()] * 4) as lab:
        lab.hosts[0].start("up")             a process of `cordee` on that host
        lab.hosts[0].unplug()                its cable is out
        lab.hosts[0].crash()                 its processes are gone, as after a power cut

A host's processes are started with `nsenter` and not with `ip netns exec`: the latter hides the control
groups in which a node looks for its memory limit. All names begin with the lab's own prefix, which has the
process id of its maker. A process of its own, the reaper, removes the lab when its maker ends, however that
is; should both be killed, what they left is swept before the next lab is built.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLONE_NEWNET = 0x40000000
CGROUPS = Path("/sys/fs/cgroup")
NETNS = Path("/run/netns")
PREFIX = "cordee-lab"
NETWORK = "10.77.0"  # of the bridge, /24
CPU_PERIOD_US = 100_000
PATIENCE_SECONDS = 60.0  # for anything that a host should do; far more than it takes
MEGABYTE = 1_000_000


class Unable(Exception):
    """This machine has no labs; the message says why."""


@dataclass
class Machine:
    """What a host is like. `disk_bytes`: its state folder is a disk of that size.

    Its share of the processors is given anew every `cpu_period_us`: with long periods, who waits for another
    host waits for the next period, too.
    """

    memory_bytes: int = 1000 * MEGABYTE
    cpus: float = 2.0
    cpu_period_us: int = CPU_PERIOD_US
    disk_bytes: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Host:
    """One machine of a lab, named a, b, c, ...; `home` is its CORDEE_HOME."""

    def __init__(self, lab: "Lab", number: int, machine: Machine) -> None:
        self.lab = lab
        self.name = "abcdefgh"[number]
        self.port = f"port{number}"  # its socket of the switch
        self.address = lab.new_address()
        self.namespace = f"{lab.prefix}-{self.name}"
        self.home = lab.folder / self.name
        self.machine = machine
        self.log = lab.folder / f"{self.name}.log"
        self._children: list[subprocess.Popen] = []
        self._groups = _groups(self.namespace)

    def build(self) -> None:
        """Make the namespace, the cable, the control groups and the disk."""
        ip("netns", "add", self.namespace)
        inside = ("-n", self.lab.switch)
        veth = ("type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip(*inside, "link", "add", self.port, *veth)
        ip(*inside, "link", "set", self.port, "master", "bridge", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        for group in self._groups:
            group.mkdir()
        _limit(self._groups, self.machine)
        self.home.mkdir(parents=True)
        if self.machine.disk_bytes is not None:
            size = f"size={self.machine.disk_bytes}"
            run("mount", "-t", "tmpfs", "-o", size, self.lab.prefix, str(self.home))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start a program of this Python (`-m cordee.cli.main up`); its output goes to the host's log."""
        with self.log.open("ab") as log:
            return self.popen(arguments, environment, stdout=log, stderr=log)

    def popen(
        self, arguments: Sequence[str], environment: dict[str, str] | None = None, **streams: object
    ) -> "subprocess.Popen[bytes]":
        """Start a program of this Python."""
        entries = [str(group / "cgroup.procs") for group in self._groups]
        # The shell enters the control groups before the program begins.
        script = 'for entry in $ENTRIES; do echo $$ > "$entry"; done; unset ENTRIES; exec "$@"'
        command = ["nsenter", f"--net={NETNS / self.namespace}", "sh", "-c", script, "sh"]
        own = {"CORDEE_HOME": str(self.home), "ENTRIES": " ".join(entries)}
        child = subprocess.Popen(
            [*command, sys.executable, *arguments],
            env={**os.environ, **self.machine.environment, **(environment or {}), **own},
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **streams},
        )
        self._children.append(child)
        return child

    def run(self, *arguments: str, seconds: float = PATIENCE_SECONDS, **environment: str) -> str:
        """Run a program of this Python to its end; what it printed.

        Raises:
            AssertionError: it failed, or took too long.
        """
        status, printed, complained = self._ran(arguments, environment, seconds)
        assert status == 0, f"{self.name}: {arguments} said {complained}"
        return printed

    def refused(self, *arguments: str) -> str:
        """Run a program of this Python that must fail; what it complained of."""
        status, printed, complained = self._ran(arguments, {}, PATIENCE_SECONDS)
        assert status != 0, f"{self.name}: {arguments} was done and said {printed}"
        return complained

    def _ran(
        self, arguments: Sequence[str], environment: dict[str, str], seconds: float
    ) -> tuple[int, str, str]:
        """Run a program to its end: its status, what it printed, what it complained of."""
        child = self.popen(arguments, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            printed, complained = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            printed, complained = child.communicate()
        return child.returncode, printed.decode(), complained.decode()

    @property
    def pids(self) -> list[int]:
        """The host's processes."""
        return [int(line) for line in (self._groups[0] / "cgroup.procs").read_text().split()]

    def memory(self) -> str:
        """Its memory as its control group says: used, the most ever used, processes killed for want of it."""
        group = self._groups[0]
        names = ("memory.current", "memory.peak", "memory.events")
        if (group / "memory.usage_in_bytes").exists():
            names = ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
        files = [group / name for name in names if (group / name).exists()]
        return ", ".join(f"{file.name} {' '.join(file.read_text().split())}" for file in files)

    def crash(self) -> None:
        """SIGKILL for all of its processes at once, and nothing on the wire that says so; `plug` it again."""
        self.unplug()
        self.kill()

    def kill(self) -> None:
        """SIGKILL for all of its processes; the system closes their sockets."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while pids := self.pids:
            assert time.monotonic() < deadline, f"processes {pids} of host {self.name} do not end"
            self.signal(signal.SIGKILL)
            for child in self._children:
                child.poll()
            time.sleep(0.005)
        self._children.clear()

    def signal(self, number: signal.Signals) -> None:
        """A signal for all of its processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def unplug(self) -> None:
        """Pull its cable out."""
        ip("-n", self.lab.switch, "link", "set", self.port, "down")

    def plug(self) -> None:
        """Put its cable in again."""
        ip("-n", self.lab.switch, "link", "set", self.port, "up")

    def move(self) -> None:
        """Get another address, as from another DHCP lease."""
        ip("-n", self.namespace, "address", "flush", "dev", "eth0", "scope", "global")
        self.address = self.lab.new_address()
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")

    def shape(self, rate: str, latency: str = "50ms") -> None:
        """Bound what it sends and what it is sent: `rate` as tc writes it."""
        for namespace, device in ((self.namespace, "eth0"), (self.lab.switch, self.port)):
            bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", latency)
            run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *bucket)

    def connect(self, port: int) -> socket.socket:
        """A TCP connection to a port of the host's loopback interface, as a program on it would open."""
        with inside(self.namespace):
            return socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)

    def tear_down(self) -> None:
        """Leave nothing of it."""
        _end(self._groups)
        for child in self._children:
            child.wait()


class Lab:
    """See the module's docstring. `machines` are the hosts; no host has a default route.

    A second lab of one process needs a `name`. The first host's address is `network`.`first`.
    """

    def __init__(
        self, machines: Sequence[Machine], name: str = "", network: str = NETWORK, first: int = 1
    ) -> None:
        self.prefix = f"{PREFIX}{os.getpid()}{name and f'-{name}'}"
        # Not in pytest's own folder: the names of sockets are bounded.
        self.folder = _temporary() / f"{self.prefix}-{secrets.token_hex(4)}"
        self._addresses = (f"{network}.{last}" for last in range(first, 255))
        self.switch = f"{self.prefix}-sw"
        self.hosts = [Host(self, number, machine) for number, machine in enumerate(machines)]
        self._reaper: subprocess.Popen | None = None

    def new_address(self) -> str:
        """One that no host had before."""
        return next(self._addresses)

    def __enter__(self) -> "Lab":
        check_able()
        sweep()
        self._reaper = subprocess.Popen(
            [sys.executable, __file__, self.prefix], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.folder.mkdir(mode=0o700)
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.hosts:
                host.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.tear_down()
        if self._reaper is not None:
            self._reaper.communicate()  # it sees the end of its input


def check_able() -> None:
    """Raises Unable where there can be no lab."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unable("needs root on Linux, for network namespaces and control groups")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if not shutil.which(program):
            raise Unable(f"needs `{program}` (Debian: {package})")
    name = f"{PREFIX}{os.getpid()}-try"
    groups = _groups(name)
    try:
        ip("netns", "add", name)
        for group in groups:
            group.mkdir()
        _limit(groups, Machine())
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise Unable(f"network namespaces and control groups cannot be made: {said.strip()}") from error
    finally:
        _end(groups)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def sweep() -> None:
    """Remove what labs of processes that are gone left behind."""
    names = [path.name for path in NETNS.glob(f"{PREFIX}*")]
    names += [path.name for top in (*_tops(), _temporary()) for path in top.glob(f"{PREFIX}*")]
    makers = {int(match[1]) for name in names if (match := re.match(rf"{PREFIX}(\d+)-", name))}
    for maker in makers - {os.getpid()}:
        if not Path(f"/proc/{maker}").exists():
            _remove(f"{PREFIX}{maker}")


def _remove(prefix: str) -> None:
    for top in _tops():
        for group in top.glob(f"{prefix}-*"):
            _end([group])
    for line in Path("/proc/mounts").read_text().splitlines():
        source, folder, *_ = line.split(" ")
        if source == prefix:
            subprocess.run(["umount", "--lazy", folder], check=True)
    for path in NETNS.glob(f"{prefix}-*"):
        subprocess.run(["ip", "netns", "del", path.name], check=True)
    for folder in _temporary().glob(f"{prefix}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _tops() -> list[Path]:
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [CGROUPS / "memory", CGROUPS / "cpu"]


def _groups(name: str) -> list[Path]:
    return [top / name for top in _tops()]


def _limit(groups: Sequence[Path], machine: Machine) -> None:
    period = machine.cpu_period_us
    quota = round(machine.cpus * period)
    if len(groups) == 1:
        (CGROUPS / "cgroup.subtree_control").write_text("+memory +cpu")
        (groups[0] / "memory.max").write_text(str(machine.memory_bytes))
        (groups[0] / "cpu.max").write_text(f"{quota} {period}")
    else:
        memory, cpu = groups
        (memory / "memory.limit_in_bytes").write_text(str(machine.memory_bytes))
        (cpu / "cpu.cfs_period_us").write_text(str(period))
        (cpu / "cpu.cfs_quota_us").write_text(str(quota))


def _end(groups: Sequence[Path]) -> None:
    """Kill whatever runs in control groups, and remove them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for group in groups:
        while group.exists() and time.monotonic() < deadline:
            for line in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)
            with contextlib.suppress(OSError):  # busy until the last process is gone
                group.rmdir()
                break
            time.sleep(0.01)


def run(*command: str) -> str:
    """Run a program of the system; what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ip(*arguments: str) -> str:
    """`ip`."""
    return run("ip", *arguments)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread opens meanwhile belong to a namespace, and stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, (NETNS / namespace).open() as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"the namespace {namespace} cannot be entered")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "the way back from a namespace is lost")


if __name__ == "__main__":  # the reaper
    sys.stdin.read()
    _remove(sys.argv[1])
