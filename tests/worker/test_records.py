"""What a stage keeps for spot checks: the rows of the positions that its cache has, and no others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cordee.generation.request import SamplingParams
from cordee.worker.messages import Opening, Record, RecordQuery, Rows, Run
from cordee.worker.records import RECORDS_BYTES_MAX, TRAIL_BYTES_MAX, Records

WIDTH = 8
POSITION_BYTES = 2 * 4 * WIDTH
OPENING = Opening(SamplingParams(temperature=0.0), [1, 2, 3], [])


def rows_of(values: list[int]) -> np.ndarray:
    """Rows that show the position and the run that they come from."""
    return np.repeat(np.array(values, np.float32)[:, None], WIDTH, axis=1)


def note(records: Records, *runs: tuple[Run, int], opens: dict[int, Opening] | None = None) -> None:
    """A micro-batch of runs, each with a number that its rows show."""
    values = [1000 * number + run.first_position + row for run, number in runs for row in range(run.rows)]
    message = Rows("w", 1, tuple(run for run, _ in runs), opens or {}, n_embd=WIDTH)
    chosen = {run.sequence: [number] for run, number in runs if run.output}
    records.note(message, rows_of(values), -rows_of(values), chosen)


def asked(records: Records, sequence: int, tenure: int, rows: int) -> tuple[Record, list[float], list[float]]:
    """The answer, and the values received and sent."""
    answer, payload = records.answer(RecordQuery("w", 1, sequence, tenure, rows, True))
    found = np.frombuffer(payload, np.float32).reshape(-1, WIDTH)[:, 0].tolist()
    return answer, found[:rows], found[rows:]


def test_rows_of_several_batches_are_one_trail() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 0, 3, False, 5), 1), (Run(1, 0, 2, True, 6), 2))
    note(records, (Run(0, 3, 1, True, 5), 3), opens={0: OPENING})
    answer, received, sent = asked(records, 0, 5, 4)
    assert (answer.rows, answer.n_embd, answer.tokens) == (4, WIDTH, {3: 3})
    assert received == [1000, 1001, 1002, 3003] and sent == [-each for each in received]
    assert asked(records, 0, 5, 2)[1:] == ([1000, 1001], [-1000, -1001])
    assert not asked(records, 0, 5, 5)[0].rows and not asked(records, 0, 4, 3)[0].rows
    assert not asked(records, 7, 5, 1)[0].rows and not asked(records, 0, 5, 0)[0].rows


def test_a_copied_sequence_has_the_record_of_what_it_begins_with() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 0, 3, False, 5), 1))
    note(records, (Run(0, 3, 1, True, 5), 3), opens={0: OPENING})
    records.copy(0, 2, 2, 6)
    note(records, (Run(2, 2, 1, False, 6), 4), (Run(0, 4, 1, True, 5), 5))
    assert asked(records, 2, 6, 3)[1] == [1000, 1001, 4002]
    assert asked(records, 0, 5, 5)[1] == [1000, 1001, 1002, 3003, 5004]
    assert asked(records, 2, 6, 1)[0].tokens == {} and asked(records, 2, 6, 1)[0].opening is None
    records.copy(7, 2, 2, 8)  # of what nothing is known
    assert not asked(records, 2, 8, 1)[0].rows


def test_what_is_settled_was_sampled_from_later() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 0, 3, True, 5), 1), opens={0: OPENING})
    assert asked(records, 0, 5, 1)[0].settled == {}  # other stages may still compute these rows
    note(records, (Run(0, 3, 1, True, 5), 2))
    assert asked(records, 0, 5, 1)[0].settled == {0: (5, 3)}
    note(records, (Run(0, 3, 2, False, 6), 3))
    assert asked(records, 0, 6, 1)[0].settled == {}  # another stream went on from there


def test_another_stream_that_takes_the_slot_over_need_not_follow_the_last_choice() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 0, 3, True, 5), 1), opens={0: OPENING})
    note(records, (Run(0, 3, 1, True, 5), 2))
    assert asked(records, 0, 5, 4)[0].tokens == {2: 1, 3: 2}
    note(records, (Run(0, 4, 1, True, 6), 3))  # a chat goes on with what its user wrote
    assert asked(records, 0, 6, 5)[0].tokens == {4: 3}
    note(records, (Run(0, 5, 1, True, 6), 4), (Run(1, 0, 1, True, 7), 5))
    note(records, (Run(0, 5, 1, True, 6), 6))  # computed again: the choice for it stands
    assert asked(records, 0, 6, 6)[0].tokens == {5: 6}
    note(records, (Run(0, 2, 1, False, 8), 7))
    assert asked(records, 0, 8, 3)[0].tokens == {}


def test_a_trail_without_its_beginning_is_none() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 4, 2, False, 5), 1))
    assert not asked(records, 0, 5, 1)[0].rows
    note(records, (Run(0, 0, 4, False, 5), 1))
    records.forget(0)
    note(records, (Run(0, 4, 2, False, 5), 1))
    assert not asked(records, 0, 5, 1)[0].rows


def test_measured_rows_leave_no_trail() -> None:
    records = Records(WIDTH)
    note(records, (Run(0, 0, 4, False, 5), 1))
    records.note(Rows("w", 1, (Run(0, 0, 2, True),), {}, measure=True), rows_of([1, 2]), None, {})
    assert not asked(records, 0, 5, 1)[0].rows and not asked(records, 0, 0, 1)[0].rows


def test_memory_is_bounded_by_trail_and_in_all() -> None:
    wide = 4096
    records, most = Records(wide), TRAIL_BYTES_MAX // (2 * 4 * wide)
    for sequence in range(4):
        for first in range(0, 3 * most, 128):
            rows = np.zeros((128, wide), np.float32)
            run = Run(sequence, first, 128, False, 1)
            records.note(Rows("w", 1, (run,), {}, n_embd=wide), rows, rows, {})
    kept = [
        sequence
        for sequence in range(4)
        if records.answer(RecordQuery("w", 1, sequence, 1, most, False))[0].rows
    ]
    assert kept == [2, 3]
    assert len(kept) * TRAIL_BYTES_MAX <= RECORDS_BYTES_MAX
    assert not records.answer(RecordQuery("w", 1, 3, 1, most + 128, False))[0].rows


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(1, 6)), max_size=25))
def test_the_first_stage_and_the_others_keep_the_same(runs: list[tuple[int, int, int]]) -> None:
    """Whatever travels: a record is that of the last rows at each position, on all stages alike."""
    first, middle, last = Records(WIDTH), Records(WIDTH), Records(WIDTH)
    model: dict[int, list[float]] = {}
    for number, (sequence, at, rows) in enumerate(runs, 1):
        run = Run(sequence, at, rows, True, 1)
        values = [1000 * number + at + row for row in range(rows)]
        note(middle, (run, number))
        message = Rows("w", 1, (run,), {})
        first.note(message, np.array(values, np.int32), rows_of(values), {})
        last.note(message, rows_of(values), None, {sequence: [number]})
        held = model.get(sequence, [])
        if at > len(held):
            model.pop(sequence, None) if not held else None
        else:
            model[sequence] = held[:at] + [float(each) for each in values]
    for sequence in range(3):
        known = model.get(sequence, [])
        for records in (first, middle, last):
            assert records.answer(RecordQuery("w", 1, sequence, 1, len(known) + 1, True))[0].rows == 0
            answer, _ = records.answer(RecordQuery("w", 1, sequence, 1, max(len(known), 1), True))
            assert answer.rows == len(known)
        if known:
            assert asked(middle, sequence, 1, len(known))[1] == known
