"""An answer as the blocks that it consists of: text, thinking, calls, in the order in which they came.

Responses calls them items of its output, Anthropic's messages call them content blocks; both tell where each
begins and ends.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from cordee.chat.events import ArgumentsDelta, CallBegun, Event, TextDelta, ThinkingDelta

NO_ARGUMENTS = "{}"  # of a call that has none: clients parse what they get


@dataclass
class Block:
    """A block. `place` counts the answer's blocks from 0; `call_id` and `name` are a call's."""

    kind: Literal["text", "thinking", "call"]
    place: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        """The text, or a call's arguments."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class BlockChange:
    """What became of a block: it opened, grew by `text`, or closed."""

    step: Literal["opened", "grown", "closed"]
    block: Block
    text: str = ""


class BlockStream:
    """Makes blocks of events; one is open at a time.

    White space alone opens no block: some families write line breaks between thinking, text and calls. It is
    kept where more of its kind follows. Without `shows_thinking` thinking is left out.
    """

    def __init__(self, *, shows_thinking: bool = True) -> None:
        self.blocks: list[Block] = []
        self._shows_thinking = shows_thinking
        self._open: Block | None = None
        self._space: dict[str, str] = {}  # by kind: may begin a block

    def push(self, events: Iterable[Event]) -> Iterator[BlockChange]:
        """What the events change."""
        for event in events:
            match event:
                case TextDelta(text):
                    yield from self._say("text", text)
                case ThinkingDelta(text):
                    if self._shows_thinking:
                        yield from self._say("thinking", text)
                case CallBegun(call_id, name):
                    yield from self._begin(Block("call", len(self.blocks), call_id, name))
                case ArgumentsDelta(text):
                    yield from self._grow(text)

    def finish(self) -> Iterator[BlockChange]:
        """The end of the block that is open."""
        block, self._open = self._open, None
        if block is None:
            return
        if block.kind == "call" and not block.pieces:
            block.pieces.append(NO_ARGUMENTS)
            yield BlockChange("grown", block, NO_ARGUMENTS)
        yield BlockChange("closed", block)

    def _say(self, kind: Literal["text", "thinking"], text: str) -> Iterator[BlockChange]:
        if self._open is None or self._open.kind != kind:
            text = self._space.get(kind, "") + text
            self._space = {kind: text}
            if not text.strip():
                return
            yield from self._begin(Block(kind, len(self.blocks)))
        yield from self._grow(text)

    def _begin(self, block: Block) -> Iterator[BlockChange]:
        yield from self.finish()
        self.blocks.append(block)
        self._open = block
        self._space = {}
        yield BlockChange("opened", block)

    def _grow(self, text: str) -> Iterator[BlockChange]:
        assert self._open is not None, "it has begun"
        if text:
            self._open.pieces.append(text)
            yield BlockChange("grown", self._open, text)


def blocks_of(events: Iterable[Event], *, shows_thinking: bool = True) -> list[Block]:
    """The blocks of a whole answer."""
    stream = BlockStream(shows_thinking=shows_thinking)
    for _ in (*stream.push(events), *stream.finish()):
        pass
    return stream.blocks
