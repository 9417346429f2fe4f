"""`cordee demo`: a chat with a cluster of three nodes on this machine; all but the first may be killed."""

import contextlib
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import click

from cordee.cli.conversation import MAX_TOKENS, TEMPERATURE, GenerationOptions
from cordee.cli.known import find
from cordee.cli.models import STARTER
from cordee.cli.open import page_of
from cordee.errors import ContextExceeded
from cordee.system import events
from cordee.terminal import keyboard, output
from cordee.terminal.wrapping import AnswerPrinter

if TYPE_CHECKING:
    from cordee.cli.cluster_model import ClusterModel
    from cordee.demo.demo_cluster import DemoCluster
    from cordee.generation.request import TextChunk

PAUSE_SECONDS = 0.3  # a pause after a kill that is worth a line; between tokens there is less
TURN_SECONDS = 0.02  # how often keys and tokens are looked for while an answer comes in

LINE_BYTES = 4096  # what a terminal gives as a line

HELP = f"""\
/kill    kill a node that runs layers of the model, also during an answer (it then shows after Enter)
/nodes   which node runs which layers
/reset   forget the conversation
/quit    leave (so does Ctrl-D)
Ctrl-C   stops an answer
{keyboard.MESSAGE_HELP}"""


@click.command()
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
def demo(temperature: float, max_tokens: int) -> None:
    """Chat with three nodes on this machine, and kill them while they answer.

    They are processes of one cluster, like three machines, none with enough memory for the whole starter
    model. /kill ends one that runs layers of it, with SIGKILL: the others take over, and the answer goes on.
    A killed node comes back after a few seconds. All nodes end with the chat; their folders stay for the next
    time.
    """
    from cordee.cli.cluster_model import ClusterModel
    from cordee.demo.demo_cluster import DemoCluster
    from cordee.files import home
    from cordee.models.store import Store

    signal.signal(events.HANGUP, signal.getsignal(signal.SIGTERM))  # the terminal is gone
    folder, model = home() / "demo", find(Store(), STARTER)
    news: queue.SimpleQueue[str] = queue.SimpleQueue()  # short: a line when a node is back
    with contextlib.ExitStack() as stack:
        with output.loading() as report:
            report("starting three nodes")
            cluster = stack.enter_context(DemoCluster(folder, model, report, news.put))
        cluster_model = ClusterModel(model.name, cluster.api)
        cluster_model.wait()
        Chat(cluster, cluster_model, GenerationOptions(temperature, max_tokens, None, None), news).run()


class AnswerReader:
    """An answer that is read on a thread of its own, so that the keyboard works meanwhile."""

    def __init__(
        self, model: "ClusterModel", messages: Sequence[dict[str, str]], generation: GenerationOptions
    ) -> None:
        self.ended = False
        # Bounded by the answer: no more chunks than the context has tokens.
        self._items: queue.SimpleQueue[tuple[float, TextChunk] | Exception | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        work = (model, messages, generation)
        threading.Thread(target=self._read, args=work, name="answer", daemon=True).start()

    def chunks(self) -> "Iterator[tuple[float, TextChunk]]":
        """The chunks since the last call, each with the time of the monotonic clock when it came.

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

    def cancel(self) -> None:
        """Cancel the answer, at its next chunk."""
        self._cancelled.set()

    def _read(
        self, model: "ClusterModel", messages: Sequence[dict[str, str]], generation: GenerationOptions
    ) -> None:
        try:
            with closing(model.answer(messages, generation)) as chunks:
                for chunk in chunks:
                    if self._cancelled.is_set():
                        break
                    self._items.put((time.monotonic(), chunk))
            self._items.put(None)
        except Exception as error:  # raised again by chunks()
            self._items.put(error)


class Chat:
    """The conversation, the keyboard and the screen. `news` are lines about the nodes."""

    def __init__(
        self,
        cluster: "DemoCluster",
        model: "ClusterModel",
        generation: GenerationOptions,
        news: "queue.SimpleQueue[str]",
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._generation = generation
        self._news = news
        self._keys = sys.stdin.isatty() and sys.stdout.isatty()
        self._messages: list[dict[str, str]] = []
        self._printer = AnswerPrinter(wrap=sys.stdout.isatty())
        self._killed = 0.0  # when a node was, during this answer; 0: none, or the answer went on since
        self._last_token = 0.0  # when it came

    def run(self) -> None:
        """Chat until the person leaves."""
        if self._keys:
            keyboard.prepare()
        self._note(f"{self._model.name} over three nodes; /help lists what you can type")
        self._note(f"the same in a browser: {page_of(self._cluster.api)}")
        self._nodes()
        while True:
            try:
                message = self._message()
                if message == "/quit":
                    return
                if keyboard.is_command(message):
                    self._command(message)
                elif message:
                    self._turn(message)
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                self._note("/quit or Ctrl-D ends the chat")

    # What is typed.

    def _message(self) -> str:
        self._tell_news()
        return keyboard.read_message(input if self._keys else _piped_line)

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
        killed = self._cluster.kill()
        if killed is None:
            self._note("no other node runs layers of the model right now: try again in a moment")
            return
        self._killed = time.monotonic()
        name, layers = killed
        self._note(f"node {name} is gone, and layers {layers} with it")

    def _nodes(self) -> None:
        from cordee.demo.demo_cluster import layers_of

        rows = [
            (
                f"{node['name']} (yours)" if node["self"] else node["name"],
                node["state"],
                layers_of(node["stages"]) or "-",
                output.size(sum(device["memory_bytes"] for device in node["devices"])),
            )
            for node in self._cluster.nodes()
        ]
        self._note("\n".join(output.table(("NODE", "STATE", "LAYERS", "LENDS"), rows)))

    # What is answered.

    def _turn(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer, pieces = AnswerReader(self._model, self._messages, self._generation), list[str]()
        self._last_token, self._killed = time.monotonic(), 0.0
        try:
            with keyboard.silent():
                while not answer.ended:
                    if not self._keys:
                        time.sleep(TURN_SECONDS)
                    elif select.select([sys.stdin], [], [], TURN_SECONDS)[0]:
                        self._interject()
                    self._show(answer, pieces)
        except KeyboardInterrupt:
            self._note("(stopped)")
        except ContextExceeded as error:
            self._note(f"{error.message} /reset starts a new conversation.")
        finally:
            answer.cancel()
            if any(pieces):
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()
            self._printer.end()
            self._printer.break_line()

    def _interject(self) -> None:
        """Do what a line says that was typed while an answer comes in."""
        typed = os.read(sys.stdin.fileno(), LINE_BYTES)
        line = typed.decode(errors="replace").strip()
        self._printer.break_line()
        click.echo(f"> {line}")
        if line == "/quit" or not typed:
            raise EOFError
        if line in ("/kill", "/nodes", "/help"):
            self._command(line)
        elif line:
            self._note("wait for the end of the answer, or stop it with Ctrl-C")

    def _show(self, answer: AnswerReader, pieces: list[str]) -> None:
        for when, chunk in answer.chunks():
            if not chunk.text:
                continue
            pause = when - self._last_token
            if self._killed and when > self._killed and pause > PAUSE_SECONDS:
                self._note(f"the answer goes on ({pause:.1f} s)")
                self._killed = 0.0
            self._last_token = when
            pieces.append(chunk.text)
            self._printer.add(chunk.text)
        self._tell_news()

    # The screen.

    def _tell_news(self) -> None:
        while not self._news.empty():
            self._note(self._news.get())

    def _note(self, text: str) -> None:
        self._printer.break_line()
        click.secho(text, dim=True, err=True)


def _piped_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
