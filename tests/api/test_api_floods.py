"""Floods from the network on a small server: wrong keys, and a key that asks for far too much.

Both get proper answers, what the server holds stays bounded, and somebody honest is answered meanwhile."""

import http.client
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cordee.access.failed_keys import ADDRESSES_MAX, FREE
from cordee.access.keyring import new_key
from cordee.serving.local_service import ServiceConfig
from house import House, opened
from serving import COMPLETIONS, SECONDS
from tiny import make_tiny

ADDRESSES = 4  # of this machine, from which the wrong keys come
SHORT = {"model": "starter", "prompt": "a", "max_tokens": 4, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 60, "stream": True}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, starter_path: Path) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("small")
    model = make_tiny("llama", folder / "tiny.gguf", tokenizer="bytes")
    with opened(model, folder, ServiceConfig(context=256, sequences=2)) as made:
        yield made


@pytest.fixture(autouse=True)
def nobody_failed(house: House) -> None:
    house.failed.__init__()


def from_address(house: House, number: int) -> http.client.HTTPSConnection:
    connection = house.open()
    connection.source_address = (f"127.0.1.{number + 1}", 0)
    return connection


def tried(house: House, number: int, keys: list[str]) -> Counter[int]:
    """Ask with each key, from one address; the statuses. Each 429 says when to come again."""
    found: Counter[int] = Counter()
    with closing(from_address(house, number)) as connection:
        for key in keys:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            response = connection.getresponse()
            said = json.loads(response.read())["error"]
            found[response.status] += 1
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
            assert key not in said["message"]
    return found


def wrong_keys(house: House, count: int) -> None:
    honest = house.add("marie")
    assert house.ask("POST", COMPLETIONS, SHORT, honest).status == 200
    made = [new_key("nobody", ())[1] for _ in range(ADDRESSES)]
    made += [f"{made[0][:-5]}{number:05d}" for number in range(count - ADDRESSES)]
    parts = [made[number::ADDRESSES] for number in range(ADDRESSES)]
    with ThreadPoolExecutor(ADDRESSES) as threads:
        tries = [threads.submit(tried, house, number, part) for number, part in enumerate(parts)]
        asked = 0
        while not all(each.done() for each in tries) or not asked:
            assert house.ask("POST", COMPLETIONS, SHORT, honest).status == 200
            asked += 1
        found = [each.result() for each in tries]
    for each in found:
        assert each.keys() == {401, 429}
        assert FREE <= each[401] < FREE + 40  # looked at; the pauses only grow
    assert len(house.failed) == ADDRESSES <= ADDRESSES_MAX
    assert house.ask("POST", COMPLETIONS, SHORT, honest).status == 200


def test_wrong_keys_are_slowed_down_and_an_honest_one_is_not(house: House) -> None:
    wrong_keys(house, 200)


@pytest.mark.long
def test_ten_thousand_wrong_keys(house: House) -> None:
    wrong_keys(house, 10_000)


def flood(house: House, clients: int, **bounds: Any) -> Counter[int]:
    """One key sends long requests from so many clients, again and again; somebody else asks meanwhile. The
    statuses that the flood got."""
    greedy, honest = house.add("greedy", **bounds), house.add("marie")
    enough, found = threading.Event(), Counter[int]()
    began = threading.Barrier(clients + 1)

    def ask() -> None:
        for turn in itertools.count():
            reply = house.ask("POST", COMPLETIONS, LONG, greedy)
            found[reply.status] += 1
            assert reply.status in (200, 429, 503), reply.body
            if reply.status != 200:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.error["code"] in ("rate_limit_exceeded", "overloaded")
            if turn == 0:
                began.wait(SECONDS)
            if enough.is_set():
                return

    with ThreadPoolExecutor(clients) as threads:
        asking = [threads.submit(ask) for _ in range(clients)]
        for _ in range(3):
            assert house.ask("POST", COMPLETIONS, SHORT, honest).status == 200
        enough.set()
        began.wait(SECONDS)
        for each in asking:
            each.result()
    house.server.until(lambda status: (status["active"], status["queue"]) == (0, 0))
    assert house.ask("POST", COMPLETIONS, SHORT, greedy).status == 200
    return found


def test_a_key_that_floods_is_told_to_wait_and_others_are_answered(house: House) -> None:
    found = flood(house, 6, requests=2)
    assert found[429] and found[200]


@pytest.mark.long
def test_a_key_without_bounds_floods_a_server_with_two_slots(house: House) -> None:
    """400 clients of one key at once: it may have 256 requests, and half a queue of them may wait."""
    found = flood(house, 400)
    assert found[429] + found[503] and found[200]
