"""`cordee demo`: a chat over three nodes on this machine, of which any but the first may be felled."""

import contextlib
import queue
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import click

from cordee.cli import output
from cordee.cli.models import STARTER, find
from cordee.cli.run import MAX_TOKENS, TEMPERATURE, GenerationOptions
from cordee.errors import ContextExceeded

if TYPE_CHECKING:
    from cordee.cli.cluster_model import ClusterModel
    from cordee.cli.demo_cluster import DemoCluster
    from cordee.generation.request import TextChunk

PAUSE_SECONDS = 0.3  # a silence behind a fall that is worth telling; between tokens there is less
TURN_SECONDS = 0.02  # how often keys and tokens are looked for while an answer comes in

HELP = """\
/kill    fell a node that runs a part of the model, also while it answers
/nodes   who holds which layers
/reset   forget the conversation
/quit    leave (so does Ctrl-D)
Ctrl-C   stops an answer"""


@click.command()
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
def demo(temperature: float, max_tokens: int) -> None:
    """Chat over three nodes on this machine, and fell them while they answer.

    They are processes of one cluster, as machines would be, none of which lends enough memory for the whole
    starter model. /kill ends one that runs a part of it with SIGKILL: the others take over, and the
    answer goes on. A felled node comes back after some seconds. All nodes end with the chat; their folders
    stay, for the next time.
    """
    from cordee.cli.cluster_model import ClusterModel
    from cordee.cli.demo_cluster import DemoCluster
    from cordee.files import home
    from cordee.models.store import Store

    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # the terminal is gone
    folder, model = home() / "demo", find(Store(), STARTER)
    news: queue.SimpleQueue[str] = queue.SimpleQueue()  # bounded by what can happen: a node ends or comes
    with contextlib.ExitStack() as stack:
        with output.loading() as report:
            report("starting three nodes")
            rope = stack.enter_context(DemoCluster(folder, model, report, news.put))
        source = ClusterModel(model.name, rope.api)
        source.wait()
        Chat(rope, source, GenerationOptions(temperature, max_tokens, None, None), news).run()


class AnswerReader:
    """An answer that comes in on a thread of its own, so that the keyboard is heard meanwhile."""

    def __init__(
        self, source: "ClusterModel", messages: Sequence[dict[str, str]], generation: GenerationOptions
    ) -> None:
        self.ended = False
        # Bounded by the answer: no more chunks than the context has tokens.
        self._items: queue.SimpleQueue[tuple[float, TextChunk] | Exception | None] = queue.SimpleQueue()
        self._left = threading.Event()
        work = (source, messages, generation)
        threading.Thread(target=self._read, args=work, name="answer", daemon=True).start()

    def chunks(self) -> "Iterator[tuple[float, TextChunk]]":
        """The chunks that came since, each with the time of the monotonic clock when it did.

        Raises:
            CordeeError: the answer failed.
        """
        while not self.ended and not self._items.empty():
            item = self._items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                self.ended = True
            else:
                yield item

    def leave(self) -> None:
        """No more is wanted: the stream is cancelled at its next chunk."""
        self._left.set()

    def _read(
        self, source: "ClusterModel", messages: Sequence[dict[str, str]], generation: GenerationOptions
    ) -> None:
        try:
            with closing(source.answer(messages, generation)) as chunks:
                for chunk in chunks:
                    if self._left.is_set():
                        break
                    self._items.put((time.monotonic(), chunk))
            self._items.put(None)
        except Exception as error:  # for whoever takes
            self._items.put(error)


class Chat:
    """The conversation, the keyboard and the screen. `news` are lines of what happens to the nodes."""

    def __init__(
        self,
        rope: "DemoCluster",
        source: "ClusterModel",
        generation: GenerationOptions,
        news: "queue.SimpleQueue[str]",
    ) -> None:
        self._rope = rope
        self._source = source
        self._generation = generation
        self._news = news
        self._keys = sys.stdin.isatty() and sys.stdout.isatty()
        self._messages: list[dict[str, str]] = []
        self._in_line = False  # the screen's last line is not at its end
        self._fell = 0.0  # when, in an answer; 0: not, or it went on since
        self._heard = 0.0  # when the answer's last token came

    def run(self) -> None:
        """Until the person leaves."""
        if self._keys:
            import readline  # gives input() line editing and a history that lives in memory only

            readline.set_auto_history(True)
        self._note(f"{self._source.name} over three nodes; /help lists what you can type")
        self._nodes()
        while True:
            try:
                line = self._line()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._turn(line)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                self._note("/quit or Ctrl-D leaves")

    # What is typed.

    def _line(self) -> str:
        self._tell_news()
        self._break_line()
        if self._keys:
            return input("> ").strip()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.strip()

    def _command(self, line: str) -> None:
        if line == "/kill":
            self._kill()
        elif line == "/nodes":
            self._nodes()
        elif line == "/reset":
            self._messages.clear()
            self._note("the conversation is forgotten")
        else:
            self._note(HELP)

    def _kill(self) -> None:
        felled = self._rope.fell()
        if felled is None:
            self._note("no other node runs a part of the model just now: try again in a moment")
            return
        self._fell = time.monotonic()
        name, layers = felled
        self._note(f"node {name} is gone, and layers {layers} with it")

    def _nodes(self) -> None:
        from cordee.cli.demo_cluster import layers_of

        rows = [
            (
                f"{node['name']} (yours)" if node["self"] else node["name"],
                node["state"],
                layers_of(node["stages"]) or "-",
                output.size(sum(device["memory_bytes"] for device in node["devices"])),
            )
            for node in self._rope.nodes()
        ]
        self._note("\n".join(output.table(("NODE", "STATE", "LAYERS", "LENDS"), rows)))

    # What is answered.

    def _turn(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer, pieces = AnswerReader(self._source, self._messages, self._generation), list[str]()
        self._heard, self._fell = time.monotonic(), 0.0
        try:
            with _silent_keys() if self._keys else contextlib.nullcontext() as loud:
                while not answer.ended:
                    if self._keys and select.select([sys.stdin], [], [], TURN_SECONDS)[0]:
                        with loud():
                            self._interject()
                    elif not self._keys:
                        time.sleep(TURN_SECONDS)
                    self._show(answer, pieces)
        except KeyboardInterrupt:
            self._note("(stopped)")
        except ContextExceeded as error:
            self._note(f"{error.message} /reset starts a new conversation.")
        finally:
            answer.leave()
            if any(pieces):
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()
        self._break_line()

    def _interject(self) -> None:
        """Somebody types while an answer comes in: it waits for the end of the line."""
        self._break_line()
        line = input("> ").strip()
        if line == "/quit":
            raise EOFError
        if line in ("/kill", "/nodes", "/help"):
            self._command(line)
        elif line:
            self._note("first the answer: wait for its end, or stop it with Ctrl-C")

    def _show(self, answer: AnswerReader, pieces: list[str]) -> None:
        for when, chunk in answer.chunks():
            if not chunk.text:
                continue
            silence = when - self._heard
            if self._fell and when > self._fell and silence > PAUSE_SECONDS:
                self._note(f"the answer goes on ({silence:.1f} s)")
                self._fell = 0.0
            self._heard = when
            pieces.append(chunk.text)
            click.echo(chunk.text, nl=False)
            sys.stdout.flush()
            self._in_line = not chunk.text.endswith("\n")
        self._tell_news()

    # The screen.

    def _tell_news(self) -> None:
        while not self._news.empty():
            self._note(self._news.get())

    def _note(self, text: str) -> None:
        self._break_line()
        click.secho(text, dim=True, err=True)

    def _break_line(self) -> None:
        if self._in_line:
            click.echo()
        self._in_line = False


@contextlib.contextmanager
def _silent_keys() -> "Iterator[Callable[[], contextlib.AbstractContextManager[None]]]":
    """Keys are not shown, and are there as soon as they are pressed; but for blocks of what this gives."""
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~(termios.ECHO | termios.ICANON)

    @contextlib.contextmanager
    def loud() -> Iterator[None]:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)

    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield loud
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
