"""What `cordee run` and `cordee demo` share: generation options, the conversation, figures of an answer.

The model that answers is one that this process loaded (session.py) or one of the cluster (cluster_model.py).
"""

import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Required, TypedDict

if TYPE_CHECKING:
    from cordee.generation.request import TextChunk

# With these the starter model neither rambles nor repeats itself. Of 12 answers to simple questions one (at
# lower temperatures four) never ended without the penalty; with it, all did. Greedy answers have no penalty.
TEMPERATURE = 0.5
MIN_P = 0.05
REPEAT_PENALTY = 1.1
MAX_TOKENS = 2048  # ends an answer that repeats itself all the same


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams that the command line sets; the API's names, too."""

    temperature: Required[float]
    min_p: float
    repeat_penalty: float
    seed: int


@dataclass
class Stats:
    """What an answer took. Times are seconds of the monotonic clock."""

    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    first_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    finish: str | None = None

    def line(self) -> str:
        """For people: tokens and speed of the answer and of its prompt."""
        wait = (self.first or self.last) - self.began
        text = f"{self.tokens} tokens"
        if self.first is not None and self.tokens > self.first_tokens:
            text += f", {(self.tokens - self.first_tokens) / (self.last - self.first):.1f} tokens/s"
        text += f"; prompt of {self.prompt_tokens} tokens"
        if self.cached_tokens:
            text += f" ({self.cached_tokens} from the KV cache)"
        new = self.prompt_tokens - self.cached_tokens
        return text + f" read in {wait:.2f} s ({new / wait:.0f} tokens/s)" if wait > 0 else text


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer, as the command line asks for it. With `seed` None each answer draws its own."""

    temperature: float
    max_tokens: int
    seed: int | None
    system: str | None

    def sampling(self) -> SamplingOptions:
        """The next answer's sampling parameters."""
        if self.temperature == 0:
            return {"temperature": 0.0}
        return {
            "temperature": self.temperature,
            "min_p": MIN_P,
            "repeat_penalty": REPEAT_PENALTY,
            "seed": int.from_bytes(os.urandom(4)) if self.seed is None else self.seed,
        }


class ConversationModel(Protocol):
    """A model that answers conversations."""

    def answer(
        self, messages: Sequence[Mapping[str, str]], generation: GenerationOptions
    ) -> "Generator[TextChunk]":
        """The chunks of an answer to a conversation, messages with `role` and `content`; closing cancels it.

        Raises:
            CordeeError: the answer failed.
        """
        ...


class Conversation:
    """Messages and answers. A message whose answer failed is dropped."""

    def __init__(self, model: ConversationModel, generation: GenerationOptions) -> None:
        self._model = model
        self._generation = generation
        self.stats: Stats | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system prompt alone."""
        system = self._generation.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Generator[str]:
        """The pieces of the answer to the next message. What came before Ctrl-C stays in the conversation.

        Raises:
            ContextExceeded: the conversation does not fit the context any more.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        self.stats = stats = Stats()
        try:
            with closing(self._model.answer(self._messages, self._generation)) as chunks:
                for chunk in chunks:
                    stats.last = time.monotonic()
                    if stats.first is None and chunk.completion_tokens:
                        stats.first, stats.first_tokens = stats.last, chunk.completion_tokens
                    stats.prompt_tokens, stats.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
                    stats.tokens, stats.finish = chunk.completion_tokens, chunk.finish_reason
                    pieces.append(chunk.text)
                    yield chunk.text
        finally:
            if any(pieces):
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()
