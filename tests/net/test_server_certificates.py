"""Certificates of the API: for this house's names, of no use for anything else."""

import asyncio
import ssl
import time
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from cordee.access.lan import LanCertificate, host_names, label
from cordee.errors import BadRequest, IdentityDamaged, SetupNeeded
from cordee.net import enrolment, identity
from cordee.net.enrolment import Renewal
from cordee.net.identity import Identity
from cordee.net.server_certificates import NAMES_MAX, OwnAuthority, fingerprint, is_of_house, names_of
from members import cluster

NAMES = ["pc-2.local", "pc-2", "192.168.1.12", "fd00::12"]


class Bus:
    """A bus with one admin, which answers renewals as over the network."""

    def __init__(self, admin: Identity | None) -> None:
        self._answer = None
        if admin is not None:
            enrolment.serve_renewals(self, admin)

    def serve(self, key: str, answer) -> None:
        self._answer = answer

    async def query(self, pattern: str, question: bytes, seconds: float) -> list[bytes]:
        answer = None if self._answer is None else await self._answer(question)
        return [] if answer is None else [answer]


@pytest.fixture
def nodes(tmp_path: Path, home: Path) -> list[Identity]:
    """An admin and a member."""
    return cluster(tmp_path, 2)


def certificate(bus: Bus, member: Identity, names: list[str]) -> x509.Certificate:
    signed = asyncio.run(enrolment.server_certificate(bus, member, names, time.time()))
    return x509.load_pem_x509_certificate(signed)


@pytest.mark.parametrize("who", [0, 1])
def test_a_node_gets_a_certificate_for_its_own_key_and_names(nodes: list[Identity], who: int) -> None:
    member = nodes[who]
    found = certificate(Bus(nodes[0]), member, NAMES)
    assert names_of(found) == set(NAMES)
    found.verify_directly_issued_by(member.authority)
    assert identity.certified_node(found) == member.node
    assert found.subject.rfc4514_string() not in {f"CN={slot}" for slot in identity.slots()}
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.parametrize(
    "name", ["www.example.org", "example.com", "8.8.8.8", "2606:4700::1111", "local.example"]
)
def test_a_member_gets_none_for_a_name_of_the_world(nodes: list[Identity], name: str) -> None:
    admin, member = nodes
    bus = Bus(admin)
    with pytest.raises(BadRequest, match="--cert"):
        certificate(bus, member, [name])
    question = Renewal(member.request(), identity.pem(member.certificate), (*NAMES, name))
    assert asyncio.run(bus.query("", msgspec.msgpack.encode(question), 1)) == []
    assert names_of(certificate(bus, admin, [name])) == {name}  # its own affair


def test_who_was_removed_or_asks_for_anothers_key_gets_none(nodes: list[Identity]) -> None:
    admin, member = nodes
    bus = Bus(admin)
    theirs = Renewal(
        identity.certificate_request(identity.new_key()), identity.pem(member.certificate), ("pc-2",)
    )
    assert asyncio.run(bus.query("", msgspec.msgpack.encode(theirs), 1)) == []
    many = Renewal(member.request(), identity.pem(member.certificate), tuple(map(str, range(NAMES_MAX + 1))))
    assert asyncio.run(bus.query("", msgspec.msgpack.encode(many), 1)) == []
    admin.revoke(member.node)
    with pytest.raises(SetupNeeded, match="No admin answered"):
        certificate(bus, member, NAMES)


def test_an_admin_that_does_not_know_of_names_is_told_apart(nodes: list[Identity]) -> None:
    admin, member = nodes

    class Old(Bus):
        async def query(self, pattern: str, question: bytes, seconds: float) -> list[bytes]:
            return [admin.sign_again(member.request(), identity.pem(member.certificate), time.time())]

    with pytest.raises(SetupNeeded, match="of this version"):
        certificate(Old(None), member, NAMES)


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        *(("pc-1", True), ("pc-1.local", True), ("ai.school.lan", True), ("host.docker.internal", True)),
        *(("10.0.0.1", True), ("169.254.1.1", True), ("fe80::1", True), ("100.64.0.1", True)),
        *(("example.org", False), ("pc.local.org", False), ("1.1.1.1", False), ("local.", False)),
    ],
)
def test_names_of_the_house_are_told_from_those_of_the_world(name: str, is_ours: bool) -> None:
    assert is_of_house(name) == is_ours


def test_a_machine_in_no_cluster_has_an_authority_of_its_own(tmp_path: Path) -> None:
    own = OwnAuthority(tmp_path / "authority")
    again = OwnAuthority(tmp_path / "authority")
    assert fingerprint(own.authority) == fingerprint(again.authority)
    assert (tmp_path / "authority").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "authority" / "ca.key").write_text("nothing")
    with pytest.raises(IdentityDamaged, match="delete it"):
        OwnAuthority(tmp_path / "authority")


def test_a_certificate_is_kept_until_names_change_or_it_is_due(tmp_path: Path) -> None:
    own = OwnAuthority(tmp_path / "authority")
    names, signed, now = ["pc-1"], [], [time.time()]

    async def sign(wanted: list[str]) -> bytes:
        signed.append(wanted)
        return own.sign(wanted, now[0])

    def another() -> LanCertificate:
        return LanCertificate(own.folder, own.folder / "api.key", sign, lambda: names)

    kept = another()
    for each in (kept, kept, another()):
        asyncio.run(each.ensure())
    assert signed == [["pc-1"]]
    names.append("192.168.1.11")
    asyncio.run(kept.ensure())
    assert signed[1:] == [["192.168.1.11", "pc-1"]]
    assert isinstance(kept.context, ssl.SSLContext)
    now[0] -= identity.CERTIFICATE_SECONDS  # one that has run out
    (own.folder / "api.pem").write_bytes(own.sign(names, now[0]))
    asyncio.run(another().ensure())
    assert len(signed) == 3
    (own.folder / "api.pem").write_text("nothing")
    now[0] = time.time()
    asyncio.run(another().ensure())
    assert len(signed) == 4


def test_a_node_is_called_by_one_label_whatever_people_call_it() -> None:
    assert [label(name) for name in ("PC 1", "pc-1.example.org", "Büro", "--", "a" * 90)] == [
        *("pc-1", "pc-1", "b-ro", ""),
        "a" * 63,
    ]
    names = host_names("PC 1", ["AI.lan"])
    assert names[:2] == ["ai.lan", "pc-1.local"] and "pc-1" in names
