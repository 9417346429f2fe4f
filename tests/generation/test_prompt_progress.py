"""Where a stream stands before its first token: in the queue, or so many tokens of its prompt were read."""

from cordee.generation.batches import Limits
from cordee.generation.request import PromptProgress
from scheduler_world import VOCABULARY, World


def test_where_streams_stand_until_their_first_token() -> None:
    world = World(Limits(sequences=1, context=100, batch_rows=10, queue=5))
    world.submit("first", [token % VOCABULARY for token in range(25)], 3)
    world.submit("second", [1, 2, 3, 4, 5], 3)
    told = []
    while world.clients:
        told.append(world.scheduler.progress())
        world.step()
    of = {name: [each[name] for each in told if name in each] for name in ("first", "second")}
    assert [read for place, read in of["first"] if not place and read] == [10, 20]
    assert PromptProgress(place=1) in of["second"]
    assert told[-1] == {}  # it writes
