"""Bounds of keys, wrong keys, and the ledger."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.access import failed_keys, ledger, limits
from cordee.access.failed_keys import ADDRESSES_MAX, FREE, PAUSE_SECONDS_MAX, FailedKeys
from cordee.access.ledger import REST, Ledger, Used
from cordee.access.limits import REQUESTS_AT_ONCE, Allowance
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
