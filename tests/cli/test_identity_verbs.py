"""Holidays, a second admin, copied disks, versions, missing machines: real nodes on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cordee
from cluster_processes import PROGRAM, SECONDS, Cluster, Node, until
from cordee.doctor import examine
from cordee.doctor import members as doctor_members
from cordee.findings import Finding
from cordee.net import identity
from cordee.net.members import Members
from members import DAY_SECONDS, at_home

SCOUTING = ("--scouting", "off", "--memory", "1MB")
# The program of a later version, with another wire.
LATER = """
import importlib.util, pathlib, sys
import cordee
spec = importlib.util.find_spec("cordee.cluster.membership")
source = pathlib.Path(spec.origin).read_text()
assert "WIRE = 3\\n" in source
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
exec(compile(source.replace("WIRE = 3\\n", "WIRE = 99\\n"), spec.origin, "exec"), module.__dict__)
cordee.__version__ = "9.9.9"
from cordee.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Admin a, and members b and c, which know each other by address alone."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), None, *SCOUTING)
    try:
        made.add("a")
        for name in "bc":
            made.add(name, "--peer", f"127.0.0.1:{made.port}")
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(running: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """All three are alive, see each other, and nothing is wrong; each test leaves them so."""
    monkeypatch.setenv("CORDEE_HOME", str(running.nodes["a"].home.parent / "nobody"))  # `at_home` changes it
    until(lambda: all(healthy(node) for node in running.nodes.values()))
    return running


def healthy(node: Node) -> bool:
    everybody = {each["name"]: each["state"] for each in node.asked("/nodes")["nodes"]}
    return everybody == dict.fromkeys("abc", "alive") and bool(Members(loaded(node)).known)


def peer(cluster: Cluster) -> tuple[object, ...]:
    return (*SCOUTING, "--peer", f"127.0.0.1:{cluster.port}", "--listen", "127.0.0.1:0")


def expire(admin: Node, node: Node) -> None:
    """Give a node that is down the certificate that it would have after two months."""
    at_home(admin.home)
    signer = identity.load()
    at_home(node.home)
    member = identity.load()
    member.renew(signer.sign(member.request(), time.time() - 60 * DAY_SECONDS))


def fails(node: Node, *options: object) -> subprocess.CompletedProcess[str]:
    """`cordee up` of a node, which must end by itself."""
    done = node.cordee("up", "--port", 0, *options)
    assert done.returncode != 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def log_to(node: Node, *command: object) -> subprocess.Popen[str]:
    """A program that goes on, and says what it says in the node's log."""
    with (node.home / "up.log").open("a") as log:
        return subprocess.Popen(
            [*map(str, command)],
            env=os.environ | {"CORDEE_HOME": str(node.home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )


def described(node: Node, name: str) -> dict:
    return next(each for each in node.asked("/nodes")["nodes"] if each["name"] == name)


@pytest.mark.long
def test_after_the_holidays_members_start_by_themselves_in_any_order(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    ids = [node.id for node in (a, b, c)]
    for node in (c, b, a):
        assert node.down() == 0
    for node in (a, b, c):
        expire(a, node)
    c.process = log_to(c, *PROGRAM, "up", "--port", 0, *peer(cluster))  # before any admin: it waits
    until(lambda: "no admin has renewed it yet (a at 127.0.0.1:" in c.said)
    waiting = c.cordee("nodes")
    assert (waiting.returncode, "not ready yet" in waiting.stderr) == (13, True)
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    until(lambda: c.runs)
    b.up(*peer(cluster))  # after an admin
    assert [node.id for node in (a, b, c)] == ids


def loaded(node: Node) -> identity.Identity:
    at_home(node.home)
    return identity.load()


@pytest.mark.long
def test_a_machine_that_is_off_is_listed_and_once_removed_never_comes_back(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    d = Node(a.home.parent / "d")
    joined = d.cordee("join", a.do("invite").strip())
    assert "Advice: a is the only admin of 4 machines" in joined.stderr
    before = time.time()
    d.up("--name", "d", *peer(cluster))
    gone = d.id
    until(lambda: a.states().get("d") == b.states().get("d") == "alive")
    d.down()
    a.down()
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    missing = described(a, "d")
    assert (missing["id"], missing["state"], missing["version"]) == (gone, "gone", cordee.__version__)
    assert before - 1 <= missing["last_heard"] <= time.time()
    assert re.search(r"^d +\w+ +gone since 20\d\d-\d\d-\d\d \d\d:\d\d ", a.do("nodes"), re.MULTILINE)
    assert "is not running: start `cordee up` on it" in a.cordee("admin", "add", "d").stderr
    assert f"d ({gone}) is removed for good" in a.cordee("remove", "d").stderr
    assert "d" not in a.states()
    expire(a, d)
    done = fails(d, *peer(cluster))
    assert (done.returncode, "removed from the cluster for good" in done.stderr) == (12, True)
    until(lambda: "d" not in b.states())


@pytest.mark.long
def test_a_copied_disk_is_noticed_and_asks_for_an_identity_of_its_own(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    copy = Node(a.home.parent / "copy")
    shutil.copytree(b.home, copy.home, ignore=shutil.ignore_patterns("agent.*"))
    done = fails(copy, *peer(cluster))
    assert (done.returncode, "Another machine runs as this very node" in done.stderr) == (12, True)
    assert "`cordee leave --yes`" in done.stderr
    assert b.process.poll() is None
    for node in (a, b):
        assert f"Warning: Two machines run, or ran a moment ago, as b ({b.id})" in node.do("nodes")
    assert "Warning: Two machines run" in a.do("status")
    told = json.loads(copy.cordee("doctor", "--json").stdout)["findings"]
    assert [each["problem"] for each in told if "The identity of this machine" in each["what"]] == [True]
    assert found(b, "Two machines run as b")
    copy.do("leave", "--yes")
    assert not found(copy, "clone")
    copy.do("join", a.do("invite").strip())
    assert identity_of(copy) != b.id
    until(lambda: a.states().get("b") == "alive")


def identity_of(node: Node) -> str:
    return loaded(node).node


def found(node: Node, text: str) -> list[Finding]:
    """What `cordee doctor` finds there in the identity, as far as it says this."""
    at_home(node.home)
    facts = examine.facts()
    all_found = (*doctor_members.clone(facts), *doctor_members.admins(facts))
    return [each for each in all_found if text in each.what]


@pytest.mark.slow
def test_a_machine_that_restarts_often_is_no_copy(cluster: Cluster) -> None:
    a, _, c = cluster.nodes.values()
    for _ in range(3):
        c.process.kill()
        c.process.wait()
        c.up(*peer(cluster))
    until(lambda: a.states().get("c") == "alive")
    assert not described(a, "c")["cloned"]
    assert not [said for said in a.asked("/nodes")["warnings"] if "as c" in said]


@pytest.mark.slow
def test_versions_that_do_not_understand_each_other_say_so_on_both_sides(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    c.down()
    c.process = log_to(c, sys.executable, "-c", LATER, "up", "--port", 0, *peer(cluster))
    said = f"c runs Cordée 9.9.9 and this node {cordee.__version__}, which do not understand each other"
    for node in (a, b):
        until(lambda node=node: any(said in each for each in node.asked("/nodes")["warnings"]))
        assert said in node.said
    assert f"Warning: {said}" in a.do("status")
    said = f"a runs Cordée {cordee.__version__} and this node 9.9.9, which do not understand each other"
    until(lambda: said in c.said)
    assert said in "".join(c.asked("/nodes")["warnings"])
    later = Node(a.home.parent / "later")
    newcomer = typed(later, "", "join", a.do("invite").strip(), program=(sys.executable, "-c", LATER))
    assert newcomer.returncode == 12
    assert f"runs Cordée {cordee.__version__} and this one 9.9.9" in newcomer.stderr
    c.down()
    c.up(*peer(cluster))


@pytest.mark.long
def test_a_certificate_near_its_end_is_told_ten_days_before(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    a.down()
    b.down()
    signer, member = loaded(a), loaded(b)
    for days, told in ((12, False), (8, True)):
        member.renew(signer.sign(member.request(), time.time() - (30 - days) * DAY_SECONDS))
        b.up(*peer(cluster))
        warnings = b.asked("/nodes")["warnings"]
        assert len([said for said in warnings if "The certificate of b runs out on" in said]) == told
        assert all("running on a for an hour" in said for said in warnings)
        b.down()
    [unreachable] = found(b, "No admin of the cluster can be reached")
    assert (unreachable.problem, "on a." in unreachable.remedy) == (False, True)
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    assert not found(b, "admin")
    b.up(*peer(cluster))
    until(lambda: not [each for each in b.asked("/nodes")["warnings"] if "certificate" in each])


@pytest.mark.long
def test_a_second_admin_is_advised_and_made_while_everything_runs(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    for verb in ("invite", "remove", "admin add"):
        refused = b.cordee(*verb.split(), *(() if verb == "invite" else ("c",)))
        assert refused.returncode in (2, 12)
        assert re.search(rf"Only admins can .* Type `cordee {verb}` on a\.", refused.stderr), refused.stderr
    assert re.search(r"Advice: a is the only admin of \d machines", a.cordee("invite").stderr)
    assert f"c ({c.id}) confirms that it is an admin now" in a.cordee("admin", "add", "c").stderr
    assert "c is an admin already" in a.cordee("admin", "add", "c").stderr
    assert "No node is called 'x'" in a.cordee("admin", "add", "x").stderr
    until(lambda: described(b, "c")["admin"])
    assert "on a or c." in b.cordee("invite").stderr
    a.down()
    invited = c.cordee("invite")
    assert (invited.returncode, "Advice" in invited.stderr) == (0, False)
    e = Node(a.home.parent / "e")
    assert "Advice" not in e.cordee("join", invited.stdout.strip()).stderr
    b.down()
    expire(c, b)
    b.up(*peer(cluster))  # the new admin renews, too, though the first one is off
    a.up("--listen", f"127.0.0.1:{cluster.port}")


# One machine


@pytest.mark.long
def test_a_first_up_that_fails_leaves_nothing_and_one_that_does_not_says_what_it_made(tmp_path: Path) -> None:
    node = Node(tmp_path)
    taken = ("--listen", "203.0.113.1:7")  # not an address of this machine
    for options in (taken, ("--listen", "nowhere:port")):
        fails(node, *SCOUTING, *options)
        assert not (tmp_path / "cluster").exists()
        assert not list(tmp_path.glob(".cluster*"))
    node.up(*SCOUTING, "--listen", "127.0.0.1:0")
    own = node.id
    assert node.down() == 0
    assert "cordee: this is a new cluster" in node.said
    assert "`cordee leave`, then `cordee join CODE`" in node.said
    fails(node, *SCOUTING, *taken)
    node.up(*SCOUTING, "--listen", "127.0.0.1:0")
    assert node.id == own
    assert node.down() == 0
    assert (node.said.count("this is a new cluster"), node.said.count("cordee: node")) == (1, 2)


def typed(
    node: Node, phrase: str, *arguments: object, program: tuple[str, ...] = PROGRAM
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *map(str, arguments)],
        env=os.environ | {"CORDEE_HOME": str(node.home)},
        input=phrase,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_an_identity_is_backed_up_and_restored(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    node, file = Node(tmp_path / "node"), tmp_path / "cluster.backup"
    assert "nothing to back up" in node.cordee("identity", "backup", file).stderr
    node.up(*SCOUTING, "--listen", "127.0.0.1:0", "--name", "pc-1")
    own = node.id
    done = typed(node, "five random words are good\n", "identity", "backup", file)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "and the cluster's key" in done.stderr and "Advice" not in done.stderr
    assert "exists already" in typed(node, "x\n", "identity", "backup", file).stderr
    assert "There is no pass phrase" in typed(node, "", "identity", "backup", file, "--overwrite").stderr
    refused = typed(node, "x\n", "identity", "restore", file, "--overwrite")
    assert (refused.returncode, "A node already runs here" in refused.stderr) == (2, True)
    node.down()
    refused = typed(node, "five random words are good\n", "identity", "restore", file)
    assert (refused.returncode, "--overwrite" in refused.stderr) == (2, True)
    shutil.rmtree(node.home / "cluster")  # the disk died
    (tmp_path / "phrase").write_text("five random words are bad\n")
    wrong = node.cordee("identity", "restore", file, "--passphrase-file", tmp_path / "phrase")
    assert (wrong.returncode, "pass phrase is wrong" in wrong.stderr) == (2, True)
    (tmp_path / "phrase").write_text("five random words are good\n")
    node.do("identity", "restore", file, "--passphrase-file", tmp_path / "phrase")
    node.up(*SCOUTING, "--listen", "127.0.0.1:0")
    assert node.id == own
    assert described(node, "pc-1")["admin"]
    node.down()
