"""What services of both kinds need: checks of requests, tokens turned into text, tokens per second."""

import asyncio
import time
from collections import deque

from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest, CordeeError
from cordee.generation import sampling, text
from cordee.generation.request import (
    Choice,
    FinishReason,
    GuessCounts,
    PromptProgress,
    Request,
    TextChunk,
)
from cordee.generation.template import ChatTemplate
from cordee.worker.grammar_trials import GrammarTrials

RATE_TOKENS = 256  # how many tokens the reported rate covers at most ...
RATE_SECONDS = 10.0  # ... and how many seconds
SCORES_MAX = 1 << 20  # log-probabilities of a prompt: about 15 MB in the message that brings them


def template_of(vocabulary: Vocabulary) -> ChatTemplate | None:
    """The model's chat template; None for a base model.

    Raises:
        UnsupportedModel: there is one, and it cannot be used.
    """
    source = vocabulary.chat_template
    return None if source is None else ChatTemplate(source, vocabulary.bos_text, vocabulary.eos_text)


class Checks:
    """Refuses requests that cannot be answered as asked, before they are queued. It owns the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._grammars = GrammarTrials.of(vocabulary.path, vocabulary.name)

    async def check(self, request: Request) -> None:
        """Check a request; a grammar that is new is tried first, in another process.

        Raises:
            BadRequest: names the parameter.
            UnsupportedModel: a grammar is asked for and cannot bind this model.
            Overloaded: too many grammars are being tried.
            StageFailed: the grammar could not be tried.
        """
        text.check(request.stop)
        size = self._vocabulary.size
        if request.prompt and not 0 <= min(request.prompt) <= max(request.prompt) < size:
            raise BadRequest(f"the prompt's token ids must be 0 to {size - 1}", "prompt")
        if request.prediction and not 0 <= min(request.prediction) <= max(request.prediction) < size:
            raise BadRequest(f"the prediction's token ids must be 0 to {size - 1}", "prediction")
        sampling.check(request.sampling, size)
        if request.scores_prompt:
            _check_scores(request)
        if request.sampling.grammar is not None:
            await self._grammars.check(request.sampling.grammar)

    async def close(self) -> None:
        """Free the vocabulary; closing twice is harmless."""
        await asyncio.to_thread(self._vocabulary.close)


def _check_scores(request: Request) -> None:
    """Refuse to score more of a prompt than fits a message."""
    assert request.sampling.top_logprobs is not None, "it says how much is reported of each token"
    scores = len(request.prompt) * (1 + request.sampling.top_logprobs)
    if scores > SCORES_MAX:
        raise BadRequest(
            f"{len(request.prompt)} tokens of the prompt with {request.sampling.top_logprobs} alternatives "
            f"each are {scores} log-probabilities; at most {SCORES_MAX} are given: ask for fewer",
            "logprobs",
        )


class Answer:
    """A stream on its way to its client: its tokens become text here, which waits here.

    The queue needs no bound of its own: a stream never has more chunks than its context has tokens, and its
    progress before the first is told at most as often as that changes.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.cached_tokens = 0
        self.guesses = GuessCounts()
        self._vocabulary = vocabulary
        self._text = text.TextStream(request.stop)
        self._shown_tokens = frozenset(request.shown_tokens)
        self._prompt_tokens = len(request.prompt)
        self._completion_tokens = 0
        self._wants_choices = request.sampling.top_logprobs is not None
        self._choices: list[Choice] = []
        self._prompt_choices: tuple[Choice, ...] = ()
        self._chunks: asyncio.Queue[TextChunk | CordeeError] = asyncio.Queue()

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._text.stopped is not None

    def add_prompt(self, choices: tuple[Choice, ...]) -> None:
        """Add the prompt's scores, before the first token."""
        self._prompt_choices = choices

    def tell_progress(self, progress: PromptProgress) -> None:
        """Queue a chunk that says how far the stream is before its first token."""
        tokens = self._completion_tokens
        self._chunks.put_nowait(TextChunk(text="", progress=progress, completion_tokens=tokens))

    def add(self, choice: Choice | None, finish_reason: FinishReason | None) -> None:
        """Add a token, or the end, or both; queue a chunk if there is something to show."""
        shown = ""
        if choice is not None:
            self._completion_tokens += 1
            if self._wants_choices:
                self._choices.append(choice)
            shown = self._text.push(self._piece(choice.token))
        if self.stopped:
            finish_reason = "stop"
        elif finish_reason is not None:
            shown += self._text.finish()
        if not shown and finish_reason is None:
            return
        self._chunks.put_nowait(
            TextChunk(
                text=shown,
                choices=tuple(self._choices),
                prompt_choices=self._prompt_choices,
                finish_reason=finish_reason,
                stop=self._text.stopped,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self.cached_tokens,
                completion_tokens=self._completion_tokens,
                guesses=self.guesses,
            )
        )
        self._choices.clear()
        self._prompt_choices = ()

    def _piece(self, token: int) -> bytes:
        if token in self._vocabulary.end_of_generation:
            return b""
        return self._vocabulary.piece(token, special=token in self._shown_tokens)

    def fail(self, error: CordeeError) -> None:
        """End the stream with an error."""
        self._chunks.put_nowait(error)

    async def next(self) -> TextChunk:
        """The next chunk; raises the error that ended the stream."""
        item = await self._chunks.get()
        if isinstance(item, CordeeError):
            raise item
        return item


class Rate:
    """Recent tokens per second."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RATE_TOKENS)

    def count(self, tokens: int = 1) -> None:
        """Count tokens that came now."""
        self._recent.extend([time.monotonic()] * tokens)

    def per_second(self) -> float:
        """Over the last RATE_TOKENS tokens or RATE_SECONDS, whichever is less; 0 below two tokens."""
        now = time.monotonic()
        recent = [moment for moment in self._recent if now - moment < RATE_SECONDS]
        return len(recent) / (now - recent[0]) if len(recent) > 1 else 0.0
