"""`cordee run`: one answer on standard output, or a chat on the terminal. Prompts stay in memory."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from cordee.cli import options, output
from cordee.errors import BadRequest, ContextExceeded

if TYPE_CHECKING:
    from cordee.cli.session import Session
    from cordee.generation.request import TextChunk

PROMPT_BYTES = 16 << 20  # what a vocabulary tokenizes at most; a prompt from a pipe is read whole
# With these the starter model neither rambles nor repeats itself: of 12 answers to simple questions one (at
# lower temperatures four) never ended without the penalty, and none with it. Greedy answers have no penalty.
TEMPERATURE = 0.5
MIN_P = 0.05
REPEAT_PENALTY = 1.1
MAX_TOKENS = 2048  # ends an answer that goes round in circles after all

HELP = """\
/help    this list
/reset   forget the conversation
/stats   tokens and speed of the last answer
/quit    leave (so does Ctrl-D)
Ctrl-C   stops an answer"""


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
        wait = (self.first or self.last) - self.began
        text = f"{self.tokens} tokens"
        if self.first is not None and self.tokens > self.first_tokens:
            text += f", {(self.tokens - self.first_tokens) / (self.last - self.first):.1f} tokens/s"
        text += f"; prompt of {self.prompt_tokens} tokens"
        if self.cached_tokens:
            text += f" ({self.cached_tokens} already there)"
        new = self.prompt_tokens - self.cached_tokens
        return text + f" read in {wait:.2f} s ({new / wait:.0f} tokens/s)" if wait > 0 else text


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer, as the command line asks for it; `seed` None draws another one for each answer."""

    temperature: float
    max_tokens: int
    seed: int | None
    system: str | None

    def sampling(self) -> dict[str, Any]:
        """The next answer's parameters, by the names that the API has for them, too."""
        if self.temperature == 0:
            return {"temperature": 0.0}
        return {
            "temperature": self.temperature,
            "min_p": MIN_P,
            "repeat_penalty": REPEAT_PENALTY,
            "seed": int.from_bytes(os.urandom(4)) if self.seed is None else self.seed,
        }


class ConversationModel(Protocol):
    """What answers."""

    def answer(
        self, messages: Sequence[Mapping[str, str]], generation: GenerationOptions
    ) -> "Iterator[TextChunk]":
        """The chunks of an answer to a conversation. Closing the iterator cancels it."""


class LocalModel:
    """A model that this process loaded."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    def answer(
        self, messages: Sequence[Mapping[str, str]], generation: GenerationOptions
    ) -> "Iterator[TextChunk]":
        from cordee.generation.request import Request, SamplingParams

        sampling = SamplingParams(**generation.sampling())
        prompt = self._prompt(messages)
        return self._session.generate(
            Request(id="run", prompt=prompt, sampling=sampling, max_tokens=generation.max_tokens)
        )

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        from cordee.api.prompts import chat_prompt
        from cordee.api.schemas import ChatRequest, Message

        service = self._session.service
        if service.template is None:  # a base model goes on with the text
            text = "\n".join(message["content"] for message in messages)
            return tuple(service.vocabulary.tokenize(text, add_bos=True))
        request = ChatRequest(model=service.name, messages=[Message(**message) for message in messages])
        return chat_prompt(service, request, datetime.now())


class Conversation:
    """A conversation. A message whose answer failed is forgotten."""

    def __init__(self, source: ConversationModel, generation: GenerationOptions) -> None:
        self._source = source
        self._generation = generation
        self.stats: Stats | None = None
        self.reset()

    def reset(self) -> None:
        system = self._generation.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The pieces of the answer to the next message. What was said before Ctrl-C stays said.

        Raises:
            ContextExceeded: the conversation does not fit the context any more.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        self.stats = stats = Stats()
        try:
            with closing(self._source.answer(self._messages, self._generation)) as chunks:
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


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0, 10),
    default=TEMPERATURE,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option(
    "--max-tokens",
    metavar="N",
    type=click.IntRange(1),
    default=MAX_TOKENS,
    show_default=True,
    help="End an answer after N tokens.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), help="The same seed gives the same answer."
)
@click.option("--system", metavar="TEXT", help="Instructions that come before the conversation.")
@click.option(
    "--stats", is_flag=True, help="Tell tokens and speed on standard error even without a terminal."
)
@options.serving
def run(
    model: str,
    prompt: str | None,
    stats: bool,
    stages: int,
    temperature: float,
    max_tokens: int,
    seed: int | None,
    system: str | None,
    **loading: Any,
) -> None:
    """Answer PROMPT with MODEL, or chat.

    With PROMPT, or with text from a pipe, the answer goes to standard output as it is generated, and nothing
    else does. With neither, it is a chat. Prompts and answers are never written to disk.

    Where a node runs here (`cordee up`), its cluster answers, if it has the model and no option says how to
    load it.
    """
    text = _prompt(prompt)
    generation = GenerationOptions(temperature, max_tokens, seed, system)
    context = click.get_current_context()
    given = [
        name for name in ("stages", *loading) if context.get_parameter_source(name) != ParameterSource.DEFAULT
    ]
    with _source(model, stages, loading, by_cluster=not given) as source:
        conversation = Conversation(source, generation)
        if text is None:
            output.note(f"{model}; /help lists what you can type")
            _chat(conversation)
        else:
            _say(conversation, text)
            if stats or sys.stderr.isatty():
                output.note(conversation.stats.line())


@contextmanager
def _source(
    model: str, stages: int, loading: Mapping[str, Any], *, by_cluster: bool
) -> Iterator[ConversationModel]:
    """The cluster, if it has the model and nothing is said about how to load it; else a process of ours."""
    from cordee.cli.cluster_model import ClusterModel

    cluster_model = ClusterModel.find(model) if by_cluster else None
    if cluster_model is not None:
        cluster_model.wait()
        yield cluster_model
        return
    from cordee.cli.models import find
    from cordee.cli.session import Session
    from cordee.models.store import Store
    from cordee.serving.local_service import ServiceConfig

    store = Store()
    stored = find(store, model)
    config = ServiceConfig(sequences=1, **options.configuration(loading))
    with output.loading() as report:
        session = Session(stored, store, stages, config, report)
    with session:
        yield LocalModel(session)


def _prompt(argument: str | None) -> str | None:
    """The prompt from the command line or a pipe; None means a chat."""
    if argument is None:
        if sys.stdin.isatty() and sys.stdout.isatty():
            return None
        data = sys.stdin.buffer.read(PROMPT_BYTES + 1)
        source = "standard input"
    else:
        data = os.fsencode(argument)
        source = "the command line"
    if len(data) > PROMPT_BYTES:
        raise BadRequest(f"The prompt is longer than {output.size(PROMPT_BYTES)}: shorten it.", "prompt")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"The prompt from {source} is no UTF-8 text.", "prompt") from None
    if not text.strip():
        raise BadRequest(f"The prompt from {source} is empty: say something.", "prompt")
    return text


def _say(conversation: Conversation, text: str) -> None:
    """Print an answer as it comes, and why it ended if it is not whole."""
    end = ""
    with closing(conversation.answer(text)) as pieces:
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
            end = piece or end
    if not end.endswith("\n"):
        click.echo()
    if conversation.stats.finish == "length":
        output.note("cordee: the answer is cut off here: --max-tokens or the context is used up")


def _chat(conversation: Conversation) -> None:
    import readline  # gives input() line editing and a history that lives in memory only

    readline.set_auto_history(True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            output.note("\n/quit or Ctrl-D leaves")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            _turn(conversation, line)


def _command(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
        output.note("the conversation is forgotten")
    elif line == "/stats":
        output.note(conversation.stats.line() if conversation.stats else "no answer yet")
    else:
        output.note(HELP)


def _turn(conversation: Conversation, line: str) -> None:
    try:
        _say(conversation, line)
    except KeyboardInterrupt:
        output.note("\n(stopped)")
    except ContextExceeded as error:
        output.note(f"{error.message} /reset starts a new conversation.")
