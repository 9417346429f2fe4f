"""`cordee run`: one answer on standard output, or a chat on the terminal. Prompts stay in memory."""

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import click
from click.core import ParameterSource

from cordee.cli import options, output
from cordee.cli.conversation import (
    MAX_TOKENS,
    TEMPERATURE,
    Conversation,
    ConversationModel,
    GenerationOptions,
    Stats,
)
from cordee.errors import BadRequest, ContextExceeded

PROMPT_BYTES = 16 << 20  # what a vocabulary tokenizes at most; a prompt from a pipe is held whole
HELP = """\
/help    this list
/reset   forget the conversation
/stats   tokens and speed of the last answer
/quit    leave (so does Ctrl-D)
Ctrl-C   stops an answer"""


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
    neither, it is a chat. Prompts and answers are never written to disk.

    If a node runs on this machine (`cordee up`) and its cluster has MODEL, the cluster answers. With an
    option that says how to load the model (--stages and those below it), this machine answers alone.
    """
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
        raise BadRequest(f"The prompt from {source} is not UTF-8 text.", "prompt") from None
    if not text.strip():
        raise BadRequest(f"The prompt from {source} is empty: write something.", "prompt")
    return text


def _say(conversation: Conversation, text: str) -> Stats:
    """Print an answer as it comes, and a note if it was cut off; return what it took."""
    end = ""
    with closing(conversation.answer(text)) as pieces:
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
            end = piece or end
    if not end.endswith("\n"):
        click.echo()
    assert conversation.stats is not None, "the answer above set it"
    if conversation.stats.finish == "length":
        output.note("cordee: the answer is cut off here: --max-tokens or the context is used up")
    return conversation.stats


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
            output.note("\n/quit or Ctrl-D ends the chat")
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
