"""How long an answer took: llama.cpp's `timings`, and what the metrics count."""

import time
from types import TracebackType
from typing import Any, Self

import msgspec

from cordee.generation.request import TextChunk


class Timings(msgspec.Struct, frozen=True):
    """llama.cpp's object of this name. A wait for other requests is no part of it, as far as is known: where
    a request stands in the queue is told once a second."""

    cache_n: int  # tokens of the prompt that were in the KV cache
    prompt_n: int  # those that were read
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Watch:
    """Watches one answer. A context: it ends with the answer, however that ends."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waits = False
        self.first: float | None = None  # when the first token came
        self.last = self.began  # when the newest tokens came
        self.tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def saw(self, chunk: TextChunk) -> None:
        """A chunk came."""
        now = time.monotonic()
        if chunk.progress is not None:
            self.waits = chunk.progress.place > 0
            if self.waits:
                self.began = self.last = now
            return
        self.waits = False
        self.first = self.first or now
        self.last = now
        self.tokens = chunk.completion_tokens

    def timings(self, chunk: TextChunk) -> Timings:
        """The timings of the answer that ends with this chunk."""
        first = self.first or self.last
        read = max(chunk.prompt_tokens - chunk.cached_tokens, 0)
        prompt_seconds, answer_seconds = first - self.began, self.last - first
        return Timings(
            cache_n=chunk.cached_tokens,
            prompt_n=read,
            predicted_n=chunk.completion_tokens,
            **_rates("prompt", prompt_seconds, read),
            **_rates("predicted", answer_seconds, chunk.completion_tokens),
        )


def _rates(name: str, seconds: float, tokens: int) -> dict[str, Any]:
    return {
        f"{name}_ms": round(1000 * seconds, 3),
        f"{name}_per_token_ms": round(1000 * seconds / tokens, 3) if tokens else 0.0,
        f"{name}_per_second": round(tokens / seconds, 3) if seconds > 0 else 0.0,
    }
