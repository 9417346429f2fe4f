"""Shares of the scheduler: whoever floods holds up nobody else for long, and loses nothing either."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import Overloaded
from cordee.generation.batches import Limits
from scheduler_world import NEVER, VOCABULARY, Client, World


def world_of(sequences: int, in_flight: int = 1, queue: int = 64) -> World:
    limits = Limits(
        sequences=sequences, context=400, batch_rows=sequences + 32, queue=queue, in_flight=in_flight
    )
    return World(limits, NEVER)


def prompt_of(seed: int, count: int = 6) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def flood(world: World, share: str, count: int, tokens: int) -> list[Client]:
    return [
        world.submit(f"{share}{number}", prompt_of(number), tokens, share=share) for number in range(count)
    ]


def results_until(world: World, client: Client) -> int:
    """How many results come until a stream ends."""
    count = 0
    while client.ended is None:
        world.step()
        count += 1
    return count


@given(
    sequences=st.integers(2, 8),
    in_flight=st.integers(1, 3),
    begun=st.integers(0, 60),
    tokens=st.integers(1, 20),
)
def test_one_that_floods_makes_another_wait_no_more_than_twice_its_share(
    sequences: int, in_flight: int, begun: int, tokens: int
) -> None:
    """However long the answers of the one are: the other shares the pipeline with one such stream alone,
    and then with a flood of them, where each result may be of rows that are not its own."""
    alone = world_of(sequences, in_flight)
    flood(alone, "a", 1, 300)
    for _ in range(begun):
        alone.step()
    shared = results_until(alone, alone.submit("b", prompt_of(1), tokens, share="b"))
    flooded = world_of(sequences, in_flight)
    flood(flooded, "a", sequences + 20, 300)
    for _ in range(begun):
        flooded.step()
    assert (
        results_until(flooded, flooded.submit("b", prompt_of(1), tokens, share="b")) <= 2 * shared + in_flight
    )


@pytest.mark.parametrize("sequences", [2, 3, 4, 8])
@pytest.mark.parametrize("shares", ["ab", "abc"])
def test_those_who_ask_at_the_same_time_get_slots_alike(sequences: int, shares: str) -> None:
    world = world_of(sequences)
    for share in shares:
        flood(world, share, 12, 40)
        for _ in range(5):
            world.step()
    got: Counter[str] = Counter()

    def wanted() -> Counter[str]:
        return Counter(client.request.share for client in world.clients.values())

    world.pump()
    while all(wanted()[share] > sequences for share in shares):
        held = Counter(
            client.request.share for client in world.clients.values() if client.sequence is not None
        )
        assert max(held.values()) - min(held[share] for share in shares) <= 1
        got.update(event.stream[0] for event in world.answer() if event.choice is not None)
        world.pump()
    if sequences % len(shares) == 0:
        assert max(got.values()) <= 1.1 * min(got[share] for share in shares)
    world.finish()


def test_with_one_slot_they_take_turns_and_no_answer_is_interrupted() -> None:
    world = world_of(1)
    flood(world, "a", 5, 3)
    world.step()
    flood(world, "b", 2, 3)
    ended = []
    while world.clients:
        ended += [event.stream for event in world.step() if event.finish_reason]
    assert ended == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]
    assert not any(client.moved for client in world.clients.values())


def test_a_stream_that_gave_its_slot_goes_on_before_others_of_its_share() -> None:
    world = world_of(2)
    first, second, third = flood(world, "a", 3, 30)
    for _ in range(4):
        world.step()
    world.submit("b", prompt_of(9), 5, share="b")
    world.finish()
    assert (first.moved, second.moved, third.moved) == (False, True, False)
    assert [len(client.got) for client in (first, second, third)] == [30, 30, 30]


def test_nobody_alone_fills_the_queue() -> None:
    world = world_of(2, queue=8)
    with pytest.raises(Overloaded, match="4 requests of a"):
        flood(world, "a", 100, 30)
    flood(world, "b", 4, 30)
    with pytest.raises(Overloaded, match="requests are waiting"):
        flood(world, "", 100, 30)
    world.submit("c", prompt_of(1), 3, share="c")
    world.finish()


def test_who_has_gone_is_forgotten() -> None:
    world = world_of(2)
    for number in range(50):
        world.submit(str(number), prompt_of(number), 1, share=f"key {number}")
        world.finish()
    assert len(world.scheduler._shares._served) <= 2
