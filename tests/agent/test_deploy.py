"""`cordee deploy owner/name` with real nodes: no disk holds all of the model, and the hub gives it once."""

import asyncio
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster_processes import MEMORY, SERVED, Cluster, Node, until
from clusters import shape_of
from cordee.agent.control import Deploy, Deployed
from cordee.agent.deploy import Deployer
from cordee.cluster.demand import SEQUENCES, SizeRequest
from cordee.cluster.deployments import Deployment
from cordee.cluster.facts import Gauges, Offer, Reading
from cordee.cluster.memory import Demand
from cordee.distribution import hub_source
from cordee.distribution.hub import HubFile
from cordee.distribution.hub_ranges import FIRST_BYTES
from cordee.distribution.slice_store import SliceStore
from cordee.errors import BadRequest, ModelNotFound
from cordee.models.gguf import read_header
from cordee.models.store import Store
from fake_hub import FakeHub

HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def hub(starter_path: Path) -> Iterator[FakeHub]:
    made = FakeHub({"o/Small-GGUF": {"small-Q4_K_M.gguf": starter_path.read_bytes()}})
    before = dict(os.environ)
    os.environ |= {"HF_ENDPOINT": made.endpoint, "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    yield made
    made.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hub: FakeHub) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), None, "--memory", MEMORY, "--scouting", "off")
    try:
        for name in "abc":
            made.add(name, "--peer", f"127.0.0.1:{made.port}")
        yield made
    finally:
        made.close()


def hello(node: Node, model: str) -> str:
    with node.client() as client:
        done = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
    return done.choices[0].message.content


def fetched(hub: FakeHub, start: int, end: int) -> int:
    """How many bytes between two places of the file the hub was asked for."""
    spans = [tuple(map(int, re.findall(r"\d+", asked))) for asked in hub.ranges]
    return sum(max(0, min(last + 1, end) - max(first, start)) for first, last in spans)


def holders(cluster: Cluster, first: int, last: int) -> list[str]:
    """The nodes whose disks hold a slice."""
    found = []
    for name, node in cluster.nodes.items():
        slice_store = SliceStore(Store(node.home / "models"))
        held = [
            (held.first, held.last) for digest in slice_store.known() for held in slice_store.held(digest)
        ]
        if (first, last) in held:
            found.append(name)
    return found


@pytest.mark.long
def test_a_model_of_the_hub_is_deployed_fetched_once_and_outlives_hub_and_host(
    cluster: Cluster, hub: FakeHub, starter_path: Path
) -> None:
    a, b, c = cluster.nodes.values()
    refused = b.cordee("deploy", "o/Small-GGUF", "--context", 2048, "--sequences", 64)
    assert refused.returncode == 6, refused.stderr
    assert "is not read from the hub, as the cluster could not run it" in refused.stderr
    assert fetched(hub, 0, 1 << 40) <= FIRST_BYTES  # its header

    deployed = b.cordee("deploy", "o/Small-GGUF", *SERVED)
    assert deployed.returncode == 0, deployed.stderr
    assert "serves Small from now on" in deployed.stderr
    assert re.search(r"reading o/Small-GGUF/small-Q4_K_M\.gguf from the hub once", b.said)
    until(lambda: all(node.model("Small")["state"] == "serving" for node in cluster.nodes.values()))
    answers = {hello(node, "Small") for node in cluster.nodes.values()}
    assert len(answers) == 1

    layers = [tensor for tensor in read_header(starter_path).tensors if tensor.name.startswith("blk.")]
    start, end = layers[0].offset, layers[-1].offset + layers[-1].nbytes
    times = fetched(hub, start, end) / (end - start)
    assert (
        2 <= times < 2.1 + 3 * FIRST_BYTES / (end - start)
    )  # read once, then fetched once by the nodes together

    [placement] = a.model("Small")["placements"]
    ranges = [tuple(stage["layers"]) for stage in placement["stages"]]
    assert len(ranges) == 2
    asked = len(hub.ranges)
    until(lambda: all(len(holders(cluster, *each)) >= 2 for each in [*ranges, (0, 0)]))
    assert len(hub.ranges) == asked
    assert all(right[0] == left[1] for left, right in pairwise(ranges))

    hub.close()
    host = next(node for node in (a, b, c) if node.id == placement["host"])
    host.process.kill()
    host.process.wait()
    others = [node for node in (a, b, c) if node is not host]
    until(lambda: all(_host(node) not in ("", placement["host"]) for node in others))
    assert {hello(node, "Small") for node in others} == answers


@pytest.mark.long
def test_a_model_is_deployed_right_after_it_was_pulled(cluster: Cluster, starter_path: Path) -> None:
    a = next(node for node in cluster.nodes.values() if node.process.poll() is None)
    assert a.cordee("pull", starter_path, "--name", "just-now").returncode == 0
    deployed = a.cordee("deploy", "just-now", "--context", 300)
    assert deployed.returncode == 0, deployed.stderr
    until(lambda: _host(a) != "")
    assert hello(a, "just-now") == hello(a, "Small")  # one file under two names, deployed differently
    assert a.cordee("undeploy", "just-now").returncode == 0
    asked = a.cordee("rm", "just-now")  # of what was read from the hub no node has a whole copy
    assert (asked.returncode, "last whole copy of just-now" in asked.stderr) == (2, True)
    assert a.cordee("rm", "just-now", "--yes").returncode == 0


class FakeAgent:
    """An agent that knows some offers and deployments; it keeps what is deployed, and reads nothing."""

    def __init__(self, offers: list[Offer], deployments: list[Deployment]) -> None:
        self.services: dict[str, object] = {}
        self.local_models = SimpleNamespace(reading=())
        self.controller = self
        self.deployments = deployments
        self.deployed: list[tuple[object, ...]] = []
        self._offers = {offer.name: offer for offer in offers}

    def offers(self) -> dict[str, Offer]:
        return self._offers

    def gauges(self, _now: float) -> dict[str, Gauges]:
        hub = Reading("Third", "o/Third-GGUF/third.gguf", 5, 10)
        return {"b": Gauges(reading=(hub, Reading("pulled", "", 3, 10)))}

    def deploy(self, name, shape, context, sequences, _now, replicas=1, source="", only=()) -> None:
        self.deployed.append((name, shape.digest, context, sequences, replicas, source))

    def changed(self) -> None:
        pass

    async def look(self) -> None:
        pass

    async def sized(self, _name: str, _shape: object, requested: SizeRequest, _only: object) -> Demand:
        return requested.full


def test_nothing_is_read_that_is_known_under_way_or_has_a_taken_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def files(source: str) -> list[HubFile]:
        repository = source.partition(":")[0]
        return [HubFile(repository, "file.gguf", 10, "0" * 64)]

    monkeypatch.setattr(hub_source, "files", files)
    pulled = Offer("mine", shape_of("p"), 64, "o/Pulled-GGUF/file.gguf")
    undeployed = Deployment("Old", shape_of("o"), 32, 2, 0, source="o/Old-GGUF/file.gguf")
    agent = FakeAgent([pulled, Offer("Taken", shape_of("t"), 64)], [undeployed])

    def deploy(model: str, **more) -> Deployed:
        return asyncio.run(Deployer(agent).deploy(Deploy(model, **more)))

    assert deploy("o/Pulled-GGUF:Q8_0") == Deployed("mine", demand=Demand(64, SEQUENCES))
    assert deploy("o/Old-GGUF", context=16) == Deployed("Old", demand=Demand(16, 2))
    assert deploy("Old") == Deployed("Old", demand=Demand(32, 2))
    assert agent.deployed == [
        ("mine", "p", 64, SEQUENCES, 1, "o/Pulled-GGUF/file.gguf"),
        ("Old", "o", 16, 2, 1, "o/Old-GGUF/file.gguf"),
        ("Old", "o", 32, 2, 1, "o/Old-GGUF/file.gguf"),
    ]
    with pytest.raises(BadRequest, match="another model called Taken"):
        deploy("x/Taken-GGUF")
    assert deploy("o/Third-GGUF").reading.done_bytes == 5  # another node reads it
    with pytest.raises(ModelNotFound, match="one from the hub"):
        deploy("nothing")
    with pytest.raises(ModelNotFound, match=r"still being read \(30 %\)"):
        deploy("pulled")
    assert len(agent.deployed) == 3


def _host(node: Node) -> str:
    """The node that hosts the model, once it serves; empty before."""
    model = node.model("Small")
    return model["placements"][0]["host"] if model["state"] == "serving" else ""
