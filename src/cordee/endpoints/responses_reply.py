"""The replies of `POST /v1/responses`, whole or as events."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from cordee.api.answers import AnswerPiece, Job, WholeAnswer
from cordee.api.failures import error_text
from cordee.chat.blocks import Block, BlockChange, BlockStream, blocks_of
from cordee.errors import BadRequest, Overloaded

Status = Literal["in_progress", "completed", "incomplete", "failed"]

PREFIXES = {"text": "msg", "thinking": "rs", "call": "fc"}  # of the ids of items


class ResponsesReply:
    """One response. `echo` are the fields of the request that are in the reply.

    Events: https://platform.openai.com/docs/api-reference/responses-streaming
    """

    media_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"

    def __init__(self, job: Job, echo: Mapping[str, Any]) -> None:
        self._job = job
        self._echo = echo
        self._stream = BlockStream()
        self._done: list[dict[str, Any]] = []  # items
        self._last = AnswerPiece()
        self._number = 0

    def begin(self) -> Iterable[bytes]:
        """The response as it is before any token."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """What a piece adds to the items."""
        self._last = piece
        yield from self._changes(self._stream.push(piece.events))
        if piece.finish_reason is not None:
            yield from self._changes(self._stream.finish())
            if not self._stream.blocks:
                yield from self._nothing()

    def end(self) -> Iterable[bytes]:
        """The response as it has become."""
        status = self._status(self._last)
        yield self._event(f"response.{status}", response=self._response(status))

    def failure(self, error: Exception) -> Iterable[bytes]:
        """The response as far as it came, and why it ended."""
        code = "server_error"
        if isinstance(error, Overloaded):
            code = "rate_limit_exceeded"
        elif isinstance(error, BadRequest):
            code = "invalid_prompt"
        failed = self._response("failed")
        failed["error"] = {"code": code, "message": error_text(error)}
        yield self._event("response.failed", response=failed)

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        """The reply that is not streamed."""
        self._last = answer.last
        status = self._status(answer.last)
        blocks = blocks_of(answer.events) or [Block("text", 0)]
        self._done = [self._item(block, self._status_of(block, blocks)) for block in blocks]
        return self._response(status)

    def _status(self, last: AnswerPiece) -> Status:
        return "incomplete" if last.finish_reason == "length" else "completed"

    def _status_of(self, block: Block, blocks: list[Block]) -> Status:
        """The last block is what a limit of tokens leaves incomplete."""
        return self._status(self._last) if block is blocks[-1] else "completed"

    def _nothing(self) -> Iterator[bytes]:
        """A message without text: clients read an answer's first item."""
        block = Block("text", 0)
        yield from self._changes([BlockChange("opened", block), BlockChange("closed", block)])

    def _changes(self, changes: Iterable[BlockChange]) -> Iterator[bytes]:
        for change in changes:
            block = change.block
            match change.step:
                case "opened":
                    yield self._event(
                        "response.output_item.added",
                        output_index=block.place,
                        item=self._item(block, "in_progress"),
                    )
                    if block.kind != "call":
                        yield self._at(block, "content_part.added", part=_part(block))
                case "grown":
                    yield self._at(block, f"{_content(block)}.delta", delta=change.text)
                case "closed":
                    yield from self._close(block)

    def _close(self, block: Block) -> Iterator[bytes]:
        item = self._item(block, self._status_of(block, self._stream.blocks or [block]))
        if block.kind == "call":
            yield self._at(block, "function_call_arguments.done", arguments=block.text, name=block.name)
        else:
            yield self._at(block, f"{_content(block)}.done", text=block.text)
            yield self._at(block, "content_part.done", part=_part(block))
        yield self._event("response.output_item.done", output_index=block.place, item=item)
        self._done.append(item)

    def _at(self, block: Block, kind: str, **fields: Any) -> bytes:
        """An event about a part of an item."""
        where: dict[str, Any] = {"item_id": self._id(block), "output_index": block.place}
        if block.kind != "call":
            where["content_index"] = 0
        if kind.startswith("output_text"):
            where["logprobs"] = []
        return self._event(f"response.{kind}", **where, **fields)

    def _id(self, block: Block) -> str:
        return f"{PREFIXES[block.kind]}_{self._job.id}_{block.place}"

    def _item(self, block: Block, status: Status) -> dict[str, Any]:
        parts = [_part(block)] if status != "in_progress" else []
        item: dict[str, Any] = {"id": self._id(block), "status": status}
        match block.kind:
            case "text":
                return item | {"type": "message", "role": "assistant", "content": parts}
            case "thinking":
                return item | {"type": "reasoning", "summary": [], "content": parts}
            case "call":
                called = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | called

    def _response(self, status: Status) -> dict[str, Any]:
        is_over = status in ("completed", "incomplete")
        return {
            "id": f"resp_{self._job.id}",
            "object": "response",
            "created_at": self._job.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._job.model,
            "output": list(self._done),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
            **self._echo,
        }

    def _usage(self) -> dict[str, Any]:
        last = self._last
        return {
            "input_tokens": last.prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": last.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": last.thinking_tokens},
            "total_tokens": last.prompt_tokens + last.completion_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


def _content(block: Block) -> str:
    """The middle of the names of events about a block's content."""
    return {"text": "output_text", "thinking": "reasoning_text", "call": "function_call_arguments"}[
        block.kind
    ]


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
