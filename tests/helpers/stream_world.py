"""A world for streams between gateways and hosts, all from one seed: a network that loses, duplicates, delays
and reorders, hosts that crash, freeze and lose their pipelines, gateways that disagree on the host, and
clients that know the undisturbed answer.

Stages are those of `scheduler_world`: a token is a function of all tokens that the stream's sequence holds.
With `salted` it depends also on who computes it, as between unequal builds: then an answer must still be one
that somebody computed from what the client has, token by token.
"""

import heapq
import itertools
from dataclasses import dataclass, field
from random import Random

from cordee.errors import BadRequest, ContextExceeded, Overloaded
from cordee.generation import streams
from cordee.generation.batches import Limits, MicroBatch
from cordee.generation.gateway import TICK_SECONDS, Gateway, News
from cordee.generation.host import Host
from cordee.generation.request import Request, SamplingParams
from cordee.generation.scheduler import Scheduler
from cordee.generation.streams import Message, Said
from cordee.generation.tokenlog import TokenLog
from scheduler_world import END, VOCABULARY, FakePipeline, next_token, scores_of

SALTS = 3
MODELS = ("small", "large")
BAD_TOKEN = VOCABULARY  # no token of the vocabulary


@dataclass
class Weather:
    """How bad the network is: probabilities, and the mean delay in seconds."""

    loss: float = 0.0
    doubled: float = 0.0
    delay: float = 0.01


class Stages(FakePipeline):
    """Stages whose arithmetic may differ with each stream that a host starts."""

    def __init__(self, limits: Limits, salted: bool, salts: "itertools.count[int]") -> None:
        super().__init__(limits)
        self._salted, self._next = salted, salts
        self._salts: dict[TokenLog, int] = {}

    def _salt(self, log: TokenLog) -> int:
        if not self._salted:
            return 0
        return self._salts.setdefault(log, next(self._next) % SALTS)

    def send(self, batch: MicroBatch) -> None:
        super().send(batch)
        batch, opens = self.under_way.pop()
        salted = {
            sequence: (seed * SALTS + self._salt(batch.opens[sequence]), history)
            for sequence, (seed, history) in opens.items()
        }
        self.under_way.append((batch, salted))


@dataclass(eq=False)
class Client:
    """What the client of one request sees; it compares every token with the undisturbed answer."""

    request: Request
    model: str
    context: int
    salts: int
    got: list[int] = field(default_factory=list[int])
    ended: str | None = None

    def tell(self, news: News) -> None:
        assert self.ended is None, "news after the end"
        if news.progress is not None:
            assert not news.choices and news.finish_reason is None
            place, read_tokens = news.progress
            assert place > 0 or (not self.got and 0 < read_tokens <= len(self.request.prompt))
            return
        is_scored = self.request.scores_prompt and bool(news.choices) and not self.got
        assert news.prompt_choices == (scores_of(self.request.prompt) if is_scored else ())
        for choice in news.choices:
            assert choice.token in self._possible(), "a token that nobody computed from these"
            if choice.token == END:
                assert self.request.scores_prompt and news.finish_reason == "stop"
            else:
                self.got.append(choice.token)
        if isinstance(news.error, Overloaded | ContextExceeded | BadRequest):
            assert not self.got, "refused in mid-answer"
        if news.error is not None:
            self.ended = type(news.error).__name__
        elif news.finish_reason == "stop":
            assert END in self._possible()
            self.ended = "stop"
        elif news.finish_reason is not None:
            self.ended = news.finish_reason
        assert (self.ended == "length") == self._full(), (self.ended, len(self.got))

    def _possible(self) -> set[int]:
        seed, history = self.request.sampling.seed, [*self.request.prompt, *self.got]
        return {next_token(seed * SALTS + salt, history) for salt in range(self.salts)}

    def _full(self) -> bool:
        return bool(self.got) and (
            len(self.got) == self.request.max_tokens
            or len(self.got) + len(self.request.prompt) == self.context
        )


class HostNode:
    """A node that hosts one model, when it is up."""

    def __init__(self, world: "World", name: str, model: str) -> None:
        self.world, self.name, self.model = world, name, model
        self.frozen_until = 0.0
        self.start()

    def start(self) -> None:
        """A new process; what the old one held is gone."""
        limits = self.world.limits
        self.stages = Stages(limits, self.world.salted, self.world.salts)
        self.scheduler = Scheduler(limits, {END})
        self.host = Host(self.scheduler, VOCABULARY, self.world.random)
        self.host.ready = True
        self.up = True

    def lose(self) -> None:
        """A worker ended: the pipeline gets a new wiring."""
        self.stages.forget()
        self.host.lost()

    def work(self, failing: float) -> None:
        while (batch := self.host.next_batch()) is not None:
            self.stages.send(batch)
        self.stages.halted.update(self.host.halts())
        if self.stages.under_way and self.world.random.random() < 0.9:
            batch, choices, failed, last = self.stages.answer(
                END, lambda _: self.world.random.random() < failing
            )
            chosen = {sequence: choice for sequence, choice in choices.items() if sequence not in failed}
            self.host.complete(batch.id, chosen, failed, self.stages.scores, last=last)
        self.scheduler.check_slots()


class World:
    """Gateways, hosts, what is under way between them, and the time."""

    def __init__(self, seed: int, *, salted: bool = False, limits: Limits | None = None) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.salted, self.salts = salted, itertools.count()
        self.limits = limits or Limits(sequences=3, context=40, batch_rows=16, queue=30, in_flight=2)
        self.weather = Weather()
        self.failing = 0.0  # the chance that a token cannot be chosen
        self._under_way: list[tuple[float, int, str, str, bytes]] = []
        self._numbers = itertools.count()
        self.messages = 0
        self.gateways = {name: self._gateway() for name in ("g0", "g1")}
        self.hosts = {
            f"{model}{index}": HostNode(self, f"{model}{index}", model)
            for model in MODELS
            for index in range(2)
        }
        self.clients: dict[str, dict[str, Client]] = {name: {} for name in self.gateways}  # open ones
        self.ended: list[Client] = []

    def _gateway(self) -> Gateway:
        return Gateway(self.random.getrandbits(63))

    def open(self, gateway: str, request: Request, model: str = "small") -> Client:
        client = Client(request, model, self.limits.context, SALTS if self.salted else 1)
        self.gateways[gateway].open(request, model)
        self.clients[gateway][request.id] = client
        return client

    def cancel(self, gateway: str, name: str) -> None:
        self.gateways[gateway].cancel(name)
        client = self.clients[gateway].pop(name)
        client.ended = "cancelled"
        self.ended.append(client)

    def restart_gateway(self, name: str) -> None:
        self.gateways[name] = self._gateway()
        for client in self.clients[name].values():
            client.ended = "gateway lost"
            self.ended.append(client)
        self.clients[name].clear()

    def send(self, source: str, node: str, message: Message) -> None:
        self.messages += 1
        data = streams.encode(message)
        copies = 1 + (self.random.random() < self.weather.doubled)
        for _ in range(copies):
            if self.random.random() >= self.weather.loss:
                due = self.now + self.random.expovariate(1 / self.weather.delay)
                heapq.heappush(self._under_way, (due, next(self._numbers), source, node, data))

    def step(self, seconds: float = TICK_SECONDS) -> None:
        """Let time pass, messages arrive, stages work."""
        self.now += seconds
        while self._under_way and self._under_way[0][0] <= self.now:
            _, _, source, node, data = heapq.heappop(self._under_way)
            self._deliver(source, node, data)
        for node in self.hosts.values():
            if node.up and node.frozen_until <= self.now:
                node.host.tick(self.now)
                node.work(self.failing)
                for target, said in node.host.drain():
                    self.send(node.name, target, said)
        for name, gateway in self.gateways.items():
            gateway.tick(self.now)
            messages, news = gateway.drain()
            for target, message in messages:
                self.send(name, target, message)
            for each in news:
                self._tell(name, each)

    def _deliver(self, source: str, name: str, data: bytes) -> None:
        message = streams.decode(data)
        if isinstance(message, Said):
            self.gateways[name].receive(source, message)
            return
        node = self.hosts[name]
        if node.up and node.frozen_until > self.now:  # it will read it then
            heapq.heappush(self._under_way, (node.frozen_until, next(self._numbers), source, name, data))
        elif node.up:
            node.host.receive(source, message)

    def _tell(self, gateway: str, news: News) -> None:
        client = self.clients[gateway][news.stream]  # KeyError: news of a stream that ended
        client.tell(news)
        if client.ended is not None:
            self.ended.append(self.clients[gateway].pop(news.stream))

    def settle(self, seconds: float) -> None:
        """No more faults: one host of each model is up, and all gateways agree on it. Every stream must end
        within `seconds`."""
        self.weather, self.failing = Weather(), 0.0
        for model in MODELS:
            chosen, other = self.random.sample([f"{model}0", f"{model}1"], 2)
            self.hosts[other].up = False
            node = self.hosts[chosen]
            if not node.up:
                node.start()
            node.frozen_until = 0.0
            node.host.ready = True
            for gateway in self.gateways.values():
                gateway.route(model, chosen)
        end = self.now + seconds
        while any(self.clients.values()):
            assert self.now < end, f"still open: {self.clients}"
            self.step()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step(TICK_SECONDS if seconds < 20.0 else 0.5)


def random_request(random: Random, name: str, context: int) -> Request:
    """Mostly ones that can be answered."""
    length = random.choice((1, random.randint(1, context - 1), random.randint(1, context // 2)))
    prompt = [random.randrange(VOCABULARY) for _ in range(length)]
    oddity = random.random()
    if oddity < 0.02:
        prompt = [1] * context
    elif oddity < 0.04:
        prompt[-1] = BAD_TOKEN
    seed, limit = random.randrange(3), random.choice((None, 1, 5, 20))
    return Request(
        id=name,
        prompt=tuple(prompt),
        sampling=SamplingParams(seed=seed),
        max_tokens=limit,
        scores_prompt=random.random() < 0.2,
    )


class Chaos:
    """All faults at once, then none."""

    def __init__(self, seed: int) -> None:
        random = self.random = Random(seed)
        limits = Limits(
            sequences=random.randint(1, 4),
            context=random.choice((12, 40)),
            batch_rows=random.choice((8, 40)),
            queue=random.choice((1, 30)),
            in_flight=random.randint(1, 3),
        )
        self.world = World(seed, salted=random.random() < 0.3, limits=limits)
        self.world.weather = Weather(
            loss=random.choice((0.0, 0.05, 0.4)),
            doubled=random.choice((0.0, 0.3)),
            delay=random.choice((0.001, 0.1, 2.0)),
        )
        self.world.failing = random.choice((0.0, 0.0, 0.0, 0.01))
        self.can_fail = self.world.failing > 0.0
        self.faults = random.choice((0.0, 0.05, 0.3))
        self._names = itertools.count()

    def run(self) -> None:
        random, world = self.random, self.world
        for gateway in world.gateways.values():
            for model in MODELS:
                gateway.route(model, random.choice((f"{model}0", f"{model}1", None)))
        for _ in range(random.choice((50, 300))):
            if random.random() < 0.1:
                name = str(next(self._names))
                request = random_request(random, name, world.limits.context)
                world.open(random.choice(list(world.gateways)), request, random.choice(MODELS))
            if random.random() < self.faults:
                random.choice(
                    (self.reroute, self.reroute, self.crash, self.freeze, self.lose, self.cancel, self.halt)
                )()
            if random.random() < self.faults / 50:
                world.restart_gateway(random.choice(list(world.gateways)))
            world.step(random.choice((TICK_SECONDS, random.uniform(0, 1.0))))
        world.settle(60.0)
        world.pass_time(60.0)  # what was sent in bad weather arrives; leases of gateways that are no more end
        for node in filter(lambda node: node.up, world.hosts.values()):
            assert (node.host.active, node.host.waiting) == (0, 0), "work for no client"
        failed = any(client.ended == "StageFailed" for client in world.ended)
        assert not failed or self.can_fail

    def reroute(self) -> None:
        """One gateway, alone, believes in another host or in none."""
        model = self.random.choice(MODELS)
        node = self.random.choice((f"{model}0", f"{model}1", f"{model}0", f"{model}1", None))
        self.random.choice(list(self.world.gateways.values())).route(model, node)

    def crash(self) -> None:
        node = self.random.choice(list(self.world.hosts.values()))
        if node.up:
            node.up = False
        else:
            node.start()

    def freeze(self) -> None:
        node = self.random.choice(list(self.world.hosts.values()))
        node.frozen_until = self.world.now + self.random.choice((0.5, 5.0, 30.0))

    def lose(self) -> None:
        self.random.choice(list(self.world.hosts.values())).lose()

    def halt(self) -> None:
        """A pipeline is being wired, for a while."""
        host = self.random.choice(list(self.world.hosts.values())).host
        host.ready = not host.ready

    def cancel(self) -> None:
        gateway = self.random.choice(list(self.world.gateways))
        if self.world.clients[gateway]:
            self.world.cancel(gateway, self.random.choice(list(self.world.clients[gateway])))
