"""Guessers: what they guess is in the text, they never fail, and they say how far they are to be believed."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cordee.speculation.costs import GUESSES_MAX, Costs
from cordee.speculation.guesser import Guesser
from cordee.speculation.lookup import CONTEXT, Lookup

few_tokens = st.lists(st.integers(1, 6), max_size=80)


@given(text=few_tokens, prediction=few_tokens, answer=few_tokens, most=st.integers(1, 12))
def test_guesses_are_tokens_of_the_text_or_the_prediction_whatever_comes(
    text: list[int], prediction: list[int], answer: list[int], most: int
) -> None:
    lookup = Lookup(text, prediction)
    seen = {*text, *prediction}
    for token in answer:
        guess = lookup.guess(most)
        assert len(guess) <= most and set(guess) <= seen
        lookup.append(token)
        seen.add(token)


def right_guesses(lookup: Lookup, answer: Sequence[int]) -> int:
    """How many tokens of an answer were the first guess when they came."""
    right = 0
    for token in answer:
        right += lookup.guess(1) == [token]
        lookup.append(token)
    return right


def test_a_text_that_is_copied_is_guessed_from_the_fourth_token_on() -> None:
    text = list(range(100, 200))
    assert right_guesses(Lookup([1, 2, *text, 3]), text) == len(text) - CONTEXT


def test_a_copy_with_edits_is_found_again_behind_each_of_them() -> None:
    text = list(range(100, 200))
    edited = [*text[:30], 7, *text[31:60], 8, 9, *text[60:]]  # a token replaced, two inserted
    assert right_guesses(Lookup([1, *text, 2]), edited) >= len(edited) - CONTEXT - 3 - 2


def test_a_prediction_is_guessed_from_the_first_token_on() -> None:
    assert right_guesses(Lookup([1, 2, 3], [50, 51, 52, 53]), [50, 51, 52, 53]) == 4


def test_a_text_that_repeats_itself_is_guessed_beyond_its_end() -> None:
    assert Lookup([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]).guess(6) == [4, 1, 2, 3, 4, 1]


@given(text=few_tokens, answer=few_tokens, steps=st.integers(1, 4))
def test_what_travels_is_the_beginning_of_what_is_proposed_next(
    text: list[int], answer: list[int], steps: int
) -> None:
    """Else guesses behind right ones would be thrown away."""
    guesser = Guesser(text, (), ends=())
    for token in answer:
        pending: list[int] = []
        for _ in range(steps):
            found = guesser.propose(pending, 1)
            whole = guesser.propose([], len(pending) + 1)
            assert [guess.token for guess in found] == [guess.token for guess in whole[len(pending) :]]
            pending += [guess.token for guess in found]
        guesser.append(token)
        if pending and pending[0] == token and (found := guesser.propose([], 1)):
            assert 0 < found[0].chance <= 1


def test_chances_fall_with_wrong_guesses_rise_with_right_ones_and_multiply() -> None:
    guesser = Guesser([], (), ends=())
    chances: list[float] = []
    for index, right in enumerate((False,) * 20 + (True,) * 40):
        guesser.draft([5, 6])
        first, second = guesser.propose([], 2)
        assert first.chance > second.chance
        chances.append(first.chance)
        guesser.append(5 if right else 100 + index)
    assert chances[20] < 0.2 < 0.8 < chances[-1]


def test_an_end_of_the_answer_is_never_guessed_and_what_is_forced_comes_first() -> None:
    guesser = Guesser([1, 2, 3, 4, 9, 1, 2, 3], (), ends={9})
    assert [guess.token for guess in guesser.propose([], 5)] == [4]
    guesser.force([7, 8])
    assert [guess.token for guess in guesser.propose([], 5)] == [7, 8]
    guesser.append(7)
    assert [guess.token for guess in guesser.propose([], 5)] == [8]
    assert guesser.propose([5], 1) == []  # what travels is not what is forced now


@given(
    rows=st.integers(1, 8),
    chances=st.lists(st.lists(st.floats(0, 1), max_size=20), max_size=4),
    measured=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), max_size=30),
)
def test_a_depth_is_within_what_is_proposed(
    rows: int, chances: list[list[float]], measured: list[tuple[int, float]]
) -> None:
    costs = Costs()
    for seen, seconds in measured:
        costs.observe(seen, seconds)
    falling = [sorted(own, reverse=True) for own in chances]
    depths = costs.depth(rows, falling)
    assert all(0 <= depth <= min(len(own), GUESSES_MAX) for depth, own in zip(depths, falling, strict=True))


def test_guesses_pay_where_rows_are_cheap_and_stop_where_they_are_dear_or_wrong() -> None:
    cheap, dear = Costs(), Costs()
    for rows in (1, 4, 8) * 20:
        cheap.observe(rows, 0.1 + 0.005 * rows)
        dear.observe(rows, 0.1 * rows)
    likely, unlikely = [0.9**index for index in range(1, 12)], [0.1**index for index in range(1, 12)]
    assert cheap.depth(1, [likely])[0] >= 6
    assert dear.depth(1, [likely]) == [0]
    assert cheap.depth(1, [unlikely]) == [0]
