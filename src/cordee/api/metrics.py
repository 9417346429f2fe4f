"""What `GET /metrics` tells: counts and times of the answers that came through this server, for Prometheus.

Nothing of a prompt, an answer or a client is in it but the name of the model.
"""

from collections import Counter as Counts
from collections.abc import Callable, Iterable
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cordee.api.timings import Watch
from cordee.generation.request import TextChunk
from cordee.serving.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. A prompt takes a tenth of a second on a good machine, and minutes where it is long; a token takes a
# few milliseconds to a few seconds.
FIRST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BETWEEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


# What is known of services, and of the cluster, when it is asked for.
Samples = Callable[[], Iterable[Sample]]


disable_created_metrics()  # when each series began: nobody asks, and it doubles what is sent


class Metrics:
    """The metrics of one server. `samples` are read at each `text`."""

    def __init__(self) -> None:
        self.samples: list[Samples] = [self._open_requests]
        self._registry = registry = CollectorRegistry()
        self._first = Histogram(
            "cordee_time_to_first_token_seconds",
            "From a request, or from its turn in the queue, to its first token.",
            ["model"],
            buckets=FIRST_BUCKETS,
            registry=registry,
        )
        self._between = Histogram(
            "cordee_time_between_tokens_seconds",
            "From one token of an answer to the next; tokens that come together share the time.",
            ["model"],
            buckets=BETWEEN_BUCKETS,
            registry=registry,
        )
        self._prompt = _counter(registry, "prompt_tokens", "Tokens of prompts.", "model")
        self._cached = _counter(
            registry, "prompt_tokens_cached", "Tokens of prompts that were in the KV cache.", "model"
        )
        self._generated = _counter(registry, "generated_tokens", "Tokens of answers.", "model")
        self._answers = _counter(
            registry, "answers", "Answers by how they ended: stop, length, failed or left.", "model", "ending"
        )
        self._running: Counts[str] = Counts()
        self._waiting: Counts[str] = Counts()
        registry.register(_Sampled(self))

    def watch(self, model: str) -> Watch:
        """Watch an answer of a model."""
        return _CountedWatch(self, model)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _open_requests(self) -> Iterable[Sample]:
        for name, text, counts in (
            ("requests_running", "Requests that are being answered.", self._running),
            ("requests_waiting", "Requests that wait for others to end.", self._waiting),
        ):
            yield from (Sample("gauge", name, text, n, {"model": model}) for model, n in counts.items())

    def began(self, model: str) -> None:
        """A request came."""
        self._running[model] += 1
        self._waiting[model] += 0

    def moved(self, model: str, waits: bool) -> None:
        """A request waits now, or does no longer."""
        step = 1 if waits else -1
        self._waiting[model] += step
        self._running[model] -= step

    def first_token(self, model: str, seconds: float) -> None:
        """An answer began."""
        self._first.labels(model).observe(seconds)

    def tokens(self, model: str, count: int, seconds: float) -> None:
        """Tokens of an answer came so many seconds after those before."""
        for _ in range(count):
            self._between.labels(model).observe(seconds / count)

    def ended(self, model: str, waited: bool, last: TextChunk | None, ending: str) -> None:
        """A request ended; `last` is the last chunk of its answer."""
        (self._waiting if waited else self._running)[model] -= 1
        self._answers.labels(model, ending).inc()
        if last is not None:
            self._prompt.labels(model).inc(last.prompt_tokens)
            self._cached.labels(model).inc(last.cached_tokens)
            self._generated.labels(model).inc(last.completion_tokens)


class _CountedWatch(Watch):
    """A watch that tells the metrics what it sees."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        super().__init__()
        self._metrics = metrics
        self._model = model
        self._newest: TextChunk | None = None

    def __enter__(self) -> "_CountedWatch":
        self._metrics.began(self._model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = "left" if self._newest is None else self._newest.finish_reason or "left"
        if isinstance(error, Exception):
            ending = "failed"
        self._metrics.ended(self._model, self.waits, self._newest, ending)

    def saw(self, chunk: TextChunk) -> None:
        waited, tokens, last, is_first = self.waits, self.tokens, self.last, self.first is None
        super().saw(chunk)
        if self.waits != waited:
            self._metrics.moved(self._model, self.waits)
        if chunk.progress is not None:
            return
        self._newest = chunk
        if is_first:
            self._metrics.first_token(self._model, self.last - self.began)
        elif chunk.completion_tokens > tokens:
            self._metrics.tokens(self._model, chunk.completion_tokens - tokens, self.last - last)


class _Sampled(Collector):
    """What is read when it is asked for, in families by name."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for sample in (each for samples in self._metrics.samples for each in samples()):
            if sample.name not in families:
                kind = GaugeMetricFamily if sample.kind == "gauge" else CounterMetricFamily
                families[sample.name] = kind(f"cordee_{sample.name}", sample.help, labels=[*sample.labels])
            families[sample.name].add_metric([*sample.labels.values()], sample.value)
        return families.values()


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"cordee_{name}", text, labels, registry=registry)
