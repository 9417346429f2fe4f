"""Holidays, a second admin, copied disks, versions, missing machines: real nodes on this machine."""

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
assert "WIRE = 1\\n" in source
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
exec(compile(source.replace("WIRE = 1\\n", "WIRE = 99\\n"), spec.origin, "exec"), module.__dict__)
cordee.__version__ = "9.9.9"
from cordee.cli.main import main
main()
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Admin a, and members b and c."""
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path / "nobody"))  # `at_home` changes it
    made = Cluster(tmp_path, None, *SCOUTING)
    try:
        made.add("a")
        for name in "bc":
            made.add(name, "--peer", f"127.0.0.1:{made.port}")
        until(lambda: all(node.states() == dict.fromkeys("abc", "alive") for node in made.nodes.values()))
        yield made
    finally:
        made.close()


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


def described(node: Node, name: str) -> dict:
    return next(each for each in node.asked("/nodes")["nodes"] if each["name"] == name)


def test_after_the_holidays_members_start_by_themselves_in_any_order(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    ids = {node: node.id for node in (a, b, c)}
    until(lambda: Members(loaded(b)).admins and Members(loaded(c)).admins)
    for node in (c, b, a):
        assert node.down() == 0
    for node in (a, b, c):
        expire(a, node)
    a.up()
    b.up(*peer(cluster))  # after an admin
    assert b.id == ids[b]
    a.down()
    c.process = c.start("up", "--port", 0, *peer(cluster))  # before any admin: it waits
    until(lambda: c.cordee("nodes").returncode == 13)
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    until(lambda: c.runs)
    assert c.id == ids[c]
    until(lambda: a.states() == dict.fromkeys("abc", "alive"))


def loaded(node: Node) -> identity.Identity:
    at_home(node.home)
    return identity.load()


def test_a_removed_machine_does_not_come_back_after_the_holidays(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    until(lambda: Members(loaded(b)).admins)
    b.down()
    a.do("remove", "b")
    expire(a, b)
    done = fails(b, *peer(cluster))
    assert (done.returncode, "removed from the cluster for good" in done.stderr) == (12, True)
    assert "b" not in a.states()


def test_a_second_admin_is_advised_and_made_while_everything_runs(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    for verb in (("invite",), ("remove", "c"), ("admin", "add", "c")):
        refused = b.cordee(*verb)
        assert refused.returncode in (2, 12)
        assert re.search(
            rf"Only admins can .*Type `cordee {' '.join(verb[:2]) if verb[0] == 'admin' else verb[0]}` on a\.",
            refused.stderr,
        )
    code = a.cordee("invite")
    assert "Advice: a is the only admin of 4 machines" in code.stderr
    d = Node(a.home.parent / "d")
    joined = d.cordee("join", code.stdout.strip())
    assert "Advice: a is the only admin of 4 machines" in joined.stderr
    added = a.cordee("admin", "add", "c")
    assert f"c ({c.id}) confirms that it is an admin now" in added.stderr
    assert "an admin already" in a.cordee("admin", "add", "c").stderr
    assert "No node is called 'x'" in a.cordee("admin", "add", "x").stderr
    until(lambda: described(b, "c")["admin"])
    assert "on a or c." in b.cordee("invite").stderr
    a.down()
    code = c.cordee("invite")
    assert (code.returncode, "Advice" in code.stderr) == (0, False)
    e = Node(a.home.parent / "e")
    assert "Advice" not in e.cordee("join", code.stdout.strip()).stderr
    expire_by_copy = loaded(c)
    assert expire_by_copy.is_admin
    b.down()
    expire(c, b)
    b.up(*peer(cluster))  # the new admin renews, too, though the first one is off
    assert "gone since" in b.do("nodes")


def test_missing_machines_are_listed_and_removed_by_name(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    assert {each["version"] for each in a.told("nodes")["nodes"]} == {cordee.__version__}
    before, gone = time.time(), c.id
    c.down()
    a.down()
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    until(lambda: a.states().get("b") == "alive")
    missing = described(a, "c")
    assert (missing["id"], missing["state"], missing["version"]) == (gone, "gone", cordee.__version__)
    assert before - 60 < missing["last_heard"] <= time.time()
    assert re.search(r"^c +\w+ +gone since 20\d\d-\d\d-\d\d \d\d:\d\d ", a.do("nodes"), re.MULTILINE)
    assert "is not running: start `cordee up` on it" in a.cordee("admin", "add", "c").stderr
    assert f"c ({gone}) is removed for good" in a.cordee("remove", "c").stderr
    assert set(a.states()) == {"a", "b"}


def test_a_copied_disk_is_noticed_and_the_copy_asks_for_an_identity_of_its_own(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    copy = Node(a.home.parent / "copy")
    shutil.copytree(b.home, copy.home, ignore=shutil.ignore_patterns("agent.*"))
    done = fails(copy, *peer(cluster))
    assert done.returncode == 12
    assert "Another machine runs as this very node" in done.stderr
    assert "cordee leave --yes" in done.stderr
    assert b.process.poll() is None
    until(lambda: a.states() == dict.fromkeys("abc", "alive"))
    for node in (a, b):
        assert f"Warning: Two machines run, or ran a moment ago, as b ({b.id})" in node.do("nodes")
        assert "Two machines run" in node.do("status")
    findings = [each["what"] for each in doctor(copy)["findings"]]
    assert any("identity of this machine" in what and "is cloned" in what for what in findings), findings
    assert any("Two machines run as b" in each["what"] for each in doctor(b)["findings"])
    assert not any(
        "clone" in each["what"] or "machines run" in each["what"]
        for each in doctor(a)["findings"]
        if "as b" not in each["what"]
    )
    copy.do("leave", "--yes")
    copy.do("join", a.do("invite").strip())
    copy.up("--name", "d", *peer(cluster))
    assert copy.id != b.id
    until(lambda: a.states() == dict.fromkeys("abcd", "alive"))
    copy.down()


def doctor(node: Node) -> dict:
    import json

    return json.loads(node.cordee("doctor", "--json").stdout)


def test_a_machine_that_restarts_often_is_no_copy(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    for _ in range(4):
        b.process.kill()
        b.process.wait()
        b.up(*peer(cluster))
    until(lambda: a.states().get("b") == "alive")
    time.sleep(5)  # longer than it would take to notice
    assert a.asked("/nodes")["warnings"] == []
    assert not described(a, "b")["cloned"]


def test_versions_that_do_not_understand_each_other_say_so_on_both_sides(cluster: Cluster) -> None:
    a, b, c = cluster.nodes.values()
    c.down()
    with (c.home / "up.log").open("a") as log:
        c.process = subprocess.Popen(
            [sys.executable, "-c", LATER, "up", "--port", "0", *map(str, peer(cluster))],
            env=os.environ | {"CORDEE_HOME": str(c.home)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    said = f"c runs Cordée 9.9.9 and this node {cordee.__version__}, which do not understand each other"
    for node in (a, b):
        until(lambda node=node: any(said in each for each in node.asked("/nodes")["warnings"]))
        assert f"Warning: {said}" in node.do("status")
        assert said in node.said
    said = f"a runs Cordée {cordee.__version__} and this node 9.9.9, which do not understand each other"
    until(lambda: said in c.said)
    assert said in "".join(c.asked("/nodes")["warnings"])
    newcomer = subprocess.run(
        [sys.executable, "-c", LATER, "join", a.do("invite").strip()],
        env=os.environ | {"CORDEE_HOME": str(a.home.parent / "later")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert newcomer.returncode == 12
    assert f"runs Cordée {cordee.__version__} and this one 9.9.9" in newcomer.stderr


def test_a_certificate_near_its_end_is_told_ten_days_before(cluster: Cluster) -> None:
    a, b, _ = cluster.nodes.values()
    until(lambda: Members(loaded(b)).admins)
    a.down()
    b.down()
    signer, member = loaded(a), loaded(b)
    for days, told in ((12, False), (8, True)):
        member.renew(signer.sign(member.request(), time.time() - (30 - days) * DAY_SECONDS))
        b.up(*peer(cluster))
        warnings = b.asked("/nodes")["warnings"]
        assert (
            any(
                "The certificate of b runs out on" in each and "on a for an hour" in each for each in warnings
            )
            == told
        )
        assert ("Warning: The certificate of b" in b.do("status")) == told
        what = [
            each for each in doctor(b)["findings"] if "No admin of the cluster can be reached" in each["what"]
        ]
        assert len(what) == 1
        assert not what[0]["problem"] and "on a." in what[0]["remedy"]
        b.down()
    a.up("--listen", f"127.0.0.1:{cluster.port}")
    b.up(*peer(cluster))
    until(lambda: b.asked("/nodes")["warnings"] == [])
    assert not [each for each in doctor(b)["findings"] if "admin" in each["what"]]


# One machine


def test_a_first_up_says_that_the_cluster_is_new_and_a_second_does_not(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for times in (1, 2):
        node.up(*SCOUTING, "--listen", "127.0.0.1:0")
        assert node.down() == 0
        assert node.said.count("cordee: this is a new cluster") == 1
        assert node.said.count("cordee: node") == times
    assert "`cordee leave`, then `cordee join CODE`" in node.said


@pytest.mark.parametrize("options", [("--listen", "203.0.113.1:7"), ("--listen", "nowhere:port")])
def test_a_first_up_that_fails_leaves_no_identity(tmp_path: Path, options: tuple[str, str]) -> None:
    node = Node(tmp_path)
    fails(node, *SCOUTING, *options)
    assert not (tmp_path / "cluster").exists()
    assert not list(tmp_path.glob(".cluster*"))


def test_a_later_up_that_fails_keeps_the_identity(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.up(*SCOUTING, "--listen", "127.0.0.1:0")
    own = node.id
    node.down()
    fails(node, *SCOUTING, "--listen", "203.0.113.1:7")
    node.up(*SCOUTING, "--listen", "127.0.0.1:0")
    assert node.id == own
    node.down()


def typed(node: Node, phrase: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
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
    assert "A node runs here" in typed(node, "x\n", "identity", "restore", file).stderr
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
