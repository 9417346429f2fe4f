"""`cordee run`: one answer on standard output, or a chat on the terminal. Prompts stay in memory."""

import select
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import click
from click.core import ParameterSource

from cordee import privacy
from cordee.cli import options
from cordee.cli.conversation import (
    MAX_TOKENS,
    TEMPERATURE,
    Conversation,
    ConversationModel,
    GenerationOptions,
    Stats,
)
from cordee.errors import BadRequest, ContextExceeded
from cordee.terminal import keyboard, output

PROMPT_BYTES = 16 << 20  # what a vocabulary tokenizes at most; a prompt from a pipe is held whole
# A pipe beside a PROMPT that says nothing for so long may be one that nobody meant to be read.
SILENT_PIPE_SECONDS = 3.0
HELP = f"""\
/help    this list
/reset   forget the conversation
/stats   tokens and speed of the last answer
/quit    leave (so does Ctrl-D)
Ctrl-C   stops an answer
{keyboard.MESSAGE_HELP}"""


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0, 10),
    default=TEMPERATURE,
    show_default=True,
    help="How freely tokens are chosen; 0 always takes the most likely one.",
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
@click.option(
    "--system", metavar="TEXT", help="System prompt: instructions that come before the conversation."
)
@click.option(
    "--stats", is_flag=True, help="Print tokens and speed to standard error, even without a terminal."
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

    With PROMPT, or with text from a pipe, the answer alone goes to standard output, as it is generated. With
    both, PROMPT comes after the text: cat letter.txt | cordee run starter "Summarise this." With neither, it
    is a chat. What a model thinks before it answers is not shown; the API has it. Prompts and answers are
    never written to disk.

    If a node runs on this machine (`cordee up`) and its cluster has MODEL, the cluster answers. With an
    option that says how to load the model (--stages and those below it), this machine answers alone.
    """
    privacy.show_only(f"cordee run {model}")  # not the question
    text = _prompt(prompt)
    generation = GenerationOptions(temperature, max_tokens, seed, system)
    context = click.get_current_context()
    given = [
        name for name in ("stages", *loading) if context.get_parameter_source(name) != ParameterSource.DEFAULT
    ]
    with _model(model, stages, loading, by_cluster=not given) as answering:
        conversation = Conversation(answering, generation)
        if text is None:
            output.note(f"{model}; /help lists what you can type")
            _chat(conversation)
        else:
            took = _say(conversation, text)
            if stats or sys.stderr.isatty():
                output.note(took.line())


@contextmanager
def _model(
    name: str, stages: int, loading: Mapping[str, Any], *, by_cluster: bool
) -> Generator[ConversationModel]:
    """The cluster's model if `by_cluster` and it has one of that name, else one that this process loads."""
    from cordee.cli.cluster_model import ClusterModel

    cluster_model = ClusterModel.find(name) if by_cluster else None
    if cluster_model is not None:
        cluster_model.wait()
        yield cluster_model
        return
    from cordee.cli.known import find
    from cordee.cli.session import LocalModel, Session
    from cordee.models.store import Store
    from cordee.serving.local_service import ServiceConfig

    store = Store()
    stored = find(store, name)
    config = ServiceConfig(sequences=1, command=f"cordee run {name}", **options.configuration(loading))
    with output.loading() as report:
        session = Session(stored, store, stages, config, report)
    with session:
        output.note_shortened(name, session.service.shortened)
        yield LocalModel(session)


def _prompt(argument: str | None) -> str | None:
    """The prompt from a pipe and the command line; None means a chat."""
    if argument is None and sys.stdin.isatty() and sys.stdout.isatty():
        return None
    given = "" if argument is None else argument
    try:
        given.encode()
    except UnicodeEncodeError:
        raise BadRequest("The prompt from the command line is not UTF-8 text.", "prompt") from None
    piped = "" if argument is not None and sys.stdin.isatty() else _piped(expected=argument is None)
    parts = [part for part in (piped, given) if part.strip()]
    if not parts:
        source = "the command line" if argument is not None else "standard input"
        raise BadRequest(f"The prompt from {source} is empty: write something.", "prompt")
    text = "\n\n".join(parts)
    _require_short(text.encode())
    return text


def _require_short(prompt: bytes) -> None:
    if len(prompt) > PROMPT_BYTES:
        raise BadRequest(f"The prompt is longer than {output.size(PROMPT_BYTES)}: shorten it.", "prompt")


def _piped(*, expected: bool) -> str:
    """The text from standard input, which is `expected` if there is no other prompt."""
    if not expected and not select.select([sys.stdin], [], [], SILENT_PIPE_SECONDS)[0]:
        output.note("cordee: waiting for the end of standard input; without a text there, add </dev/null")
    data = sys.stdin.buffer.read(PROMPT_BYTES + 1)
    _require_short(data)
    for encoding in ("utf-8", sys.stdin.encoding):  # an old terminal's programs write in its encoding
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    raise BadRequest(
        "The prompt from standard input is not UTF-8 text: convert it first, as with "
        "`iconv -f ISO-8859-1 -t UTF-8`.",
        "prompt",
    )


def _say(conversation: Conversation, text: str) -> Stats:
    """Print an answer as it comes, and a note if it was cut off; return what it took."""
    from cordee.terminal.wrapping import AnswerPrinter

    printer, has_text, is_told = AnswerPrinter(wrap=sys.stdout.isatty()), False, not sys.stderr.isatty()
    with closing(conversation.answer(text)) as pieces:
        try:
            for piece in pieces:
                if not piece and not has_text and not is_told:
                    output.note("(the model thinks first)")
                    is_told = True
                printer.add(piece)
                has_text = has_text or bool(piece)
        finally:
            printer.end()
    if printer.in_line or not has_text:
        click.echo()
    assert conversation.stats is not None, "the answer above set it"
    if conversation.stats.finish == "length":
        output.note("cordee: the answer is cut off here: --max-tokens or the context is used up")
    return conversation.stats


def _chat(conversation: Conversation) -> None:
    keyboard.prepare()
    while True:
        try:
            message = keyboard.read_message()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            output.note("\n/quit or Ctrl-D ends the chat")
            continue
        if message == "/quit":
            return
        if keyboard.is_command(message):
            _command(conversation, message)
        elif message:
            _turn(conversation, message)


def _command(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
        output.note("the conversation is forgotten")
    elif line == "/stats":
        output.note(conversation.stats.line() if conversation.stats else "no answer yet")
    else:
        output.note(HELP)


def _turn(conversation: Conversation, message: str) -> None:
    try:
        with keyboard.silent():
            _say(conversation, message)
    except KeyboardInterrupt:
        output.note("\n(stopped)")
    except ContextExceeded as error:
        output.note(f"{error.message} /reset starts a new conversation.")
