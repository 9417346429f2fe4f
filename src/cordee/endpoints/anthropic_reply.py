"""The replies of Anthropic's messages, whole or as events."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from cordee.api.answers import AnswerPiece, Job, WholeAnswer
from cordee.api.failures import anthropic_error
from cordee.chat.blocks import Block, BlockChange, BlockStream, blocks_of

# Clients send a block of thinking back only if it is signed. Nothing is checked here, so this need not be
# secret.
SIGNATURE = "unsigned"
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageReply:
    """One message. Events: https://docs.anthropic.com/en/api/messages-streaming"""

    media_type = "text/event-stream"

    def __init__(self, job: Job, *, shows_thinking: bool, omits_thinking: bool) -> None:
        self._job = job
        self._shows_thinking = shows_thinking
        self._omits_thinking = omits_thinking
        self._stream = BlockStream(shows_thinking=shows_thinking)
        self._last = AnswerPiece(prompt_tokens=len(job.requests[0].prompt))
        self.keep_alive = _event("ping")

    def begin(self) -> Iterable[bytes]:
        """The message as it is before any token."""
        yield _event("message_start", message=self._message([], self._last))
        yield self.keep_alive

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """What a piece adds to the blocks."""
        self._last = piece
        for change in self._stream.push(piece.events):
            yield from self._change(change)

    def end(self) -> Iterable[bytes]:
        """Why the answer ended, and what it took."""
        for change in self._stream.finish():
            yield from self._change(change)
        yield _event("message_delta", delta=_ending(self._last), usage=_usage(self._last))
        yield _event("message_stop")

    def failure(self, error: Exception) -> Iterable[bytes]:
        """An event with the error; nothing follows it."""
        yield _event(**anthropic_error(error))

    def whole(self, answer: WholeAnswer) -> dict[str, Any]:
        """The reply that is not streamed. A call that the limit of tokens cut off is left out."""
        blocks = blocks_of(answer.events, shows_thinking=self._shows_thinking)
        return self._message([made for block in blocks if (made := self._block(block))], answer.last)

    def _message(self, content: list[dict[str, Any]], last: AnswerPiece) -> dict[str, Any]:
        head = {"id": f"msg_{self._job.id}", "type": "message", "role": "assistant", "model": self._job.model}
        return head | {"content": content} | _ending(last) | {"usage": _usage(last)}

    def _block(self, block: Block) -> dict[str, Any] | None:
        match block.kind:
            case "text":
                return {"type": "text", "text": block.text}
            case "thinking":
                thinking = "" if self._omits_thinking else block.text
                return {"type": "thinking", "thinking": thinking, "signature": SIGNATURE}
            case "call":
                try:
                    arguments = msgspec.json.decode(block.text)
                except (msgspec.DecodeError, RecursionError):
                    return None
                return _tool_use(block) | {"input": arguments}

    def _change(self, change: BlockChange) -> Iterator[bytes]:
        block = change.block
        match change.step:
            case "opened":
                yield _event("content_block_start", index=block.place, content_block=_begun(block))
            case "grown":
                if not (block.kind == "thinking" and self._omits_thinking):
                    yield _delta(block, _grown(block, change.text))
            case "closed":
                if block.kind == "thinking":
                    yield _delta(block, {"type": "signature_delta", "signature": SIGNATURE})
                yield _event("content_block_stop", index=block.place)


def _begun(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": ""}
        case "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "call":
            return _tool_use(block)


def _grown(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "thinking":
            return {"type": "thinking_delta", "thinking": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _tool_use(block: Block) -> dict[str, Any]:
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}


def _delta(block: Block, delta: dict[str, Any]) -> bytes:
    return _event("content_block_delta", index=block.place, delta=delta)


def _ending(last: AnswerPiece) -> dict[str, Any]:
    if last.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop}
    reason = STOP_REASONS.get(last.finish_reason or "")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(last: AnswerPiece) -> dict[str, Any]:
    """Tokens; those of the prompt that were found in the cache count apart."""
    return {
        "input_tokens": last.prompt_tokens - last.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": last.cached_tokens,
        "output_tokens": last.completion_tokens,
        "output_tokens_details": {"thinking_tokens": last.thinking_tokens},
    }


def _event(type: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": type, **fields})
    return b"event: " + type.encode() + b"\ndata: " + data + b"\n\n"
