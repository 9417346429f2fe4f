"""Results: how long a host waits for what is under way."""

from cordee.generation.results import (
    LATE_KEPT_SECONDS,
    RESULT_SECONDS,
    RESULT_SECONDS_MAX,
    Expectation,
    Results,
)


def waited(results: Results, since: float, until: float) -> float | None:
    """When a result is late, looked for four times a second."""
    now = since
    while now < until:
        if results.late_seconds(now):
            return now
        now += 0.25
    return None


def expecting(row_seconds: float = 0.01, read_seconds: float = 0.0) -> Results:
    results = Results()
    results.expect("ab", Expectation(row_seconds, read_seconds))
    return results


def test_nothing_under_way_is_never_late() -> None:
    assert waited(expecting(), 0, 5000) is None


def test_a_result_is_late_by_what_was_expected_of_its_rows() -> None:
    results = expecting(row_seconds=0.1)
    results.sent(1, 5, 100.0)
    late = waited(results, 100.0, 1000.0)
    assert late is not None and 20.0 < late - 100.0 <= 20.5  # 10 s, and 20 times 0.1 s a row


def test_the_first_result_may_wait_for_the_disk_and_the_others_not() -> None:
    results = expecting(read_seconds=50.0)
    results.sent(1, 1, 0.0)
    assert waited(results, 0.0, 60.0) is None
    results.came(1, True, 60.0)
    results.sent(2, 1, 60.0)
    assert waited(results, 60.0, 80.0) is not None


def test_results_of_a_micro_batch_that_goes_round_are_signs_of_life() -> None:
    results = expecting()
    results.sent(1, 1, 0.0)
    for second in range(100):
        assert not results.late_seconds(float(second))
        results.came(1, False, float(second))
    assert waited(results, 100.0, 200.0) is not None
    results.came(1, True, 200.0)
    assert waited(results, 200.0, 300.0) is None


def test_where_nothing_is_known_the_wait_is_as_long_as_ever() -> None:
    results = expecting(row_seconds=0.0)
    results.sent(1, 1, 0.0)
    assert waited(results, 0.0, RESULT_SECONDS_MAX) is None
    assert waited(results, RESULT_SECONDS_MAX, RESULT_SECONDS_MAX + 2) is not None


def test_a_pause_of_this_process_is_nobodys_fault() -> None:
    results = expecting()
    results.sent(1, 1, 0.0)
    assert not results.late_seconds(1.0)
    assert not results.late_seconds(301.0)  # the machine slept
    assert not results.late_seconds(302.0)
    assert waited(results, 302.0, 400.0) is not None


def test_late_again_on_the_same_machines_the_wait_doubles_and_on_others_not() -> None:
    results, now, waits = expecting(), 0.0, list[float]()
    for _ in range(4):
        results.sent(1, 1, now)
        late = waited(results, now, now + 1000)
        assert late is not None
        waits.append(late - now)
        results.clear()
        now = late + 1
    assert [round(wait / RESULT_SECONDS) for wait in waits] == [1, 2, 4, 8]
    results.expect("cd", Expectation(0.01))
    results.sent(1, 1, now)
    late = waited(results, now, now + 1000)
    assert late is not None and late - now < RESULT_SECONDS + 1


def test_that_a_result_was_late_is_forgotten_after_a_while() -> None:
    results = expecting()
    results.sent(1, 1, 0.0)
    late = waited(results, 0.0, 100.0)
    assert late is not None
    results.clear()
    now = late + LATE_KEPT_SECONDS + 1
    assert not results.late_seconds(now)
    results.sent(2, 1, now)
    again = waited(results, now, now + 100.0)
    assert again is not None and again - now < RESULT_SECONDS + 1
