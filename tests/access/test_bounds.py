"""Bounds of keys, wrong keys, and the ledger."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.access import failed_keys, ledger, limits
from cordee.access.elsewhere import REMEMBERED_SECONDS, Elsewhere
from cordee.access.failed_keys import ADDRESSES_MAX, FREE, PAUSE_SECONDS_MAX, FailedKeys
from cordee.access.ledger import REST, Ledger, Used
from cordee.access.limits import REQUESTS_AT_ONCE, Allowance
from cordee.cluster.facts import Gauges, KeyUse
from cordee.cluster.soundness import fault
from cordee.errors import BadRequest, RateLimited, StorageFailed

# --- limits


@given(st.integers(0, 999_999), st.integers(0, 10**11))
def test_a_limit_is_read_as_it_is_written(requests: int, tokens: int) -> None:
    text = limits.written(requests, tokens)
    if text:
        assert limits.parse(text) == (requests, tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "requests",
        "requests=0",
        "requests=-1",
        "tokens=1/h",
        "requests=1,requests=2",
        "tokens=1;requests=1",
    ],
)
def test_what_is_no_limit_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest, match="requests=4"):
        limits.parse(text)


def test_requests_at_once_are_bounded_also_without_a_bound_of_ones_own() -> None:
    for bound, most in ((3, 3), (0, REQUESTS_AT_ONCE)):
        allowance = Allowance()
        for _ in range(most):
            allowance.enter(bound, 0, 0.0)
        with pytest.raises(RateLimited, match=f"{most} requests at once"):
            allowance.enter(bound, 0, 0.0)
        allowance.leave()
        allowance.enter(bound, 0, 0.0)


@given(
    tokens=st.integers(60, 6000),
    asked=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3000)), min_size=1, max_size=60),
)
def test_over_any_time_nobody_gets_more_than_the_rate_a_minutes_budget_and_one_answer(tokens, asked) -> None:
    allowance, now, got, largest = Allowance(), 0.0, 0, 0
    for pause, wanted in asked:
        now += pause
        try:
            allowance.enter(0, tokens, now)
        except RateLimited as error:
            now += error.wait_seconds
            allowance.enter(0, tokens, now)  # what it was told is true
        allowance.spend(wanted)
        allowance.leave()
        got, largest = got + wanted, max(largest, wanted)
        assert got <= tokens * (1 + now / 60) + largest + 1e-6


# --- wrong keys


def test_an_address_may_err_a_few_times_and_then_waits_longer_and_longer() -> None:
    failed, now = FailedKeys(), 100.0
    for _ in range(FREE):
        assert failed.pause_seconds("10.0.0.1", now) == 0
        failed.note("10.0.0.1", now)
    pauses = []
    for _ in range(10):
        pauses.append(failed.pause_seconds("10.0.0.1", now))
        now += pauses[-1]
        assert failed.pause_seconds("10.0.0.1", now) == 0
        failed.note("10.0.0.1", now)
    assert pauses == sorted(pauses) and pauses[0] > 0 and pauses[-1] == PAUSE_SECONDS_MAX
    assert failed.pause_seconds("10.0.0.2", now) == 0
    now += failed_keys.FORGOTTEN_SECONDS
    failed.note("10.0.0.1", now)
    assert failed.pause_seconds("10.0.0.1", now) == 0


def test_one_machine_is_one_address_whatever_it_calls_itself() -> None:
    failed = FailedKeys()
    for number in range(FREE):
        failed.note(f"2001:db8::{number:x}", 0.0)
        failed.note("::ffff:10.0.0.1" if number % 2 else "10.0.0.1", 0.0)
    assert failed.pause_seconds("2001:db8::ffff", 0.0) > 0
    assert failed.pause_seconds("2001:db8:0:1::1", 0.0) == 0
    assert failed.pause_seconds("10.0.0.1", 0.0) > 0


def test_ten_thousand_wrong_keys_take_bounded_memory() -> None:
    failed = FailedKeys()
    for number in range(10_000):
        failed.note(f"10.{number >> 8}.{number & 255}.1", 0.0)
    assert len(failed) == ADDRESSES_MAX


# --- the ledger


def test_what_two_processes_count_is_added(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path, lambda: 5.0), Ledger(tmp_path, lambda: 9.0)]
    for each in ledgers:
        each.count("marie", requests=1)
        each.count("marie", tokens_in=10, tokens_out=3)
        asyncio.run(each.flush())
    ledgers[0].count("marie", requests=1)  # not written yet
    assert ledgers[0].read() == {"marie": Used(3, 20, 6, None, 5.0, 9.0)}
    assert ledgers[1].read() == {"marie": Used(2, 20, 6, None, 5.0, 9.0)}
    assert (tmp_path / "usage").stat().st_mode & 0o777 == 0o600


def test_energy_goes_to_those_who_had_tokens_computed(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.count("marie", tokens_out=30)
    book.count("paul", tokens_in=10)
    book.count("anna", requests=1)
    book.share_out(100.0)
    book.share_out(50.0)  # nobody asked meanwhile: it is nobody's
    found = {name: used.joules for name, used in book.read().items()}
    assert found == {"marie": 75.0, "paul": 25.0, "anna": None}


def test_the_ledger_is_bounded_and_nothing_of_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "KEYS_MAX", 5)
    now = [0.0]
    book = Ledger(tmp_path, lambda: now[0])
    for number in range(20):
        now[0] += 1
        book.count(f"key{number}", tokens_out=1)
        asyncio.run(book.flush())
    found = book.read()
    assert len(found) == 5 and {"key19", "key18", REST} <= found.keys()
    assert sum(used.tokens_out for used in found.values()) == 20


def test_a_damaged_ledger_is_named_and_counting_goes_on(tmp_path: Path) -> None:
    (tmp_path / "usage").write_bytes(b"\xc1")
    book = Ledger(tmp_path)
    book.count("marie", tokens_out=1)
    with pytest.raises(StorageFailed, match="usage is damaged"):
        asyncio.run(book.flush())
    (tmp_path / "usage").unlink()
    asyncio.run(book.flush())
    assert book.read()["marie"].tokens_out == 1


def test_the_ledger_is_written_at_the_end(tmp_path: Path) -> None:
    book = Ledger(tmp_path)

    async def served() -> None:
        keeping = asyncio.create_task(book.keep(lambda: None, print))
        await asyncio.sleep(0)
        book.count("marie", tokens_out=1)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(served())
    assert msgspec.msgpack.decode((tmp_path / "usage").read_bytes())["marie"]["tokens_out"] == 1
    assert book.read()["marie"].last <= time.time()


# --- what other gateways tell


def told(node: Ledger) -> tuple[KeyUse, ...]:
    """As it comes with a heartbeat."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(node.uses()), type=tuple[KeyUse, ...])


def test_what_a_key_uses_elsewhere_counts_here_once(tmp_path: Path) -> None:
    other, now = Ledger(tmp_path), 0.0
    other.count("marie", requests=1, tokens_in=5000)  # long ago: before this node heard anything
    elsewhere = Elsewhere(lambda: {"b": told(other)})
    elsewhere.look(now)
    allowance = Allowance()
    allowance.enter(0, 900, now, elsewhere.at_once("marie"), elsewhere.spent("marie", now))
    other.count("marie", requests=1, tokens_in=600, tokens_out=100)
    elsewhere.look(now)
    other.count("marie", tokens_out=250)
    other.count("paul", tokens_out=10**6)
    for _ in range(2):
        with pytest.raises(RateLimited, match="900 tokens a minute"):
            allowance.enter(0, 900, now, 0, elsewhere.spent("marie", now))
        assert allowance.level == -50  # each token counts once
    allowance.enter(0, 900, 30.0, 0, elsewhere.spent("marie", 30.0))
    # What was used a minute ago has grown back, also where nobody asked here meanwhile.
    other.count("marie", tokens_out=800)
    elsewhere.look(40.0)
    assert elsewhere.spent("marie", 40.0 + REMEMBERED_SECONDS) == 0


def test_a_key_that_is_new_at_a_known_node_counts_from_its_first_token(tmp_path: Path) -> None:
    other = Ledger(tmp_path)
    elsewhere = Elsewhere(lambda: {"b": told(other)})
    elsewhere.look(0.0)  # b is there, and tells nothing yet
    other.count("zoe", requests=1, tokens_in=5, tokens_out=3)
    assert elsewhere.spent("zoe", 1.0) == 8
    assert elsewhere.spent("zoe", 2.0) == 0


def test_requests_at_once_are_those_of_all_gateways(tmp_path: Path) -> None:
    others = {name: Ledger(tmp_path / name) for name in "bc"}
    elsewhere = Elsewhere(lambda: {name: told(each) for name, each in others.items()})
    for each in others.values():
        each.count("marie", requests=1)
        each.at_once["marie"] += 1
    with pytest.raises(RateLimited, match="2 requests at once"):
        Allowance().enter(2, 0, 0.0, elsewhere.at_once("marie"))
    Allowance().enter(0, 0, 0.0, elsewhere.at_once("marie"))  # without a bound of its own
    del others["c"]  # it is gone
    Allowance().enter(2, 0, 0.0, elsewhere.at_once("marie"))


def test_a_ledger_tells_what_all_nodes_counted_and_the_latest_keys_to_others(tmp_path: Path) -> None:
    clock = iter(range(1, 10_000)).__next__
    here, there = Ledger(tmp_path / "a", clock), Ledger(tmp_path / "b", clock)
    (tmp_path / "b").mkdir()
    there.count("marie", requests=1, tokens_in=7, tokens_out=3)
    there.share_out(50.0)
    asyncio.run(there.flush())
    assert there.uses()[0].tokens_out == 3  # no less while and after it was written
    there.count("marie", requests=1, tokens_in=1)
    here.count("marie", requests=2, tokens_out=10)
    here.elsewhere = Elsewhere(lambda: {"b": told(there)})
    marie = here.read_all()["marie"]
    assert (marie.requests, marie.tokens_in, marie.tokens_out, marie.joules) == (4, 8, 13, 50.0)
    assert here.read()["marie"].requests == 2  # its own are written alone
    for number in range(2 * ledger.USES_MAX):
        there.count(f"key-{number}", requests=1)
    there.at_once["marie"] += 1
    names = [use.name for use in there.uses()]
    assert len(names) == ledger.USES_MAX and names[0] == "marie" and "key-0" not in names
    assert Ledger(tmp_path / "b").uses()[0].tokens_in == 7  # after a restart
    gauges = Gauges(used=there.uses())
    assert not fault(gauges)
    too_many = msgspec.structs.replace(gauges, used=(*gauges.used, KeyUse("one more")))
    assert "used" in fault(too_many)
