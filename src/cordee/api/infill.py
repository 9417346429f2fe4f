"""Filling in: a prompt from what stands before and behind the answer, and llama.cpp's replies to `/infill`.

The order of the tokens is llama.cpp's: other files, then prefix, suffix, and the mark behind which the model
writes what stands between. Texts of files never become control tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cordee.api.answers import AnswerPiece, Job, WholeAnswer
from cordee.api.failures import error_body
from cordee.api.prompts import GivenPrompt, check_bytes, check_ids, utf8_bytes
from cordee.api.schemas import ExtraFile, InfillRequest
from cordee.engine.vocabulary import Infill, Vocabulary
from cordee.errors import UnsupportedModel
from cordee.serving.interface import ModelService

# Of what fits, so much goes to the text before the cursor; the rest to that behind it. As in llama.cpp.
PREFIX_SHARE = 0.75
ANSWER_SHARE = 0.25  # of the context, for an answer that is not bounded by the request
# Of a long file only what is near the cursor is tokenized: hardly any text has more characters to a token.
CHARS_PER_TOKEN = 8
NAMELESS = "tmp"  # a file without a name; llama.cpp's name for it
SNIPPET = "\n\n--- snippet ---\n\n"  # before another file, where a model knows no files; llama.cpp's text
REPOSITORY, OWN_FILE = "myproject\n", "filename\n"  # llama.cpp's names for them


def infill_tokens(service: ModelService) -> Infill:
    """The model's tokens for filling in.

    Raises:
        UnsupportedModel: it has none.
    """
    found = service.vocabulary.infill
    if found is None:
        raise UnsupportedModel(
            f"{service.name} has no tokens for filling in what stands between two texts: take a model for "
            "code, such as one of Qwen2.5-Coder, StarCoder2 or Codestral"
        )
    return found


def suffix_prompt(service: ModelService, prefix: GivenPrompt, suffix: str) -> tuple[int, ...]:
    """The prompt for what stands between two texts, all of both. A prefix may hold token ids.

    Raises:
        UnsupportedModel: the model has no tokens for that.
        ContextExceeded: a text is too long, whatever tokens it becomes.
    """
    marks, vocabulary = infill_tokens(service), service.vocabulary
    pieces = [prefix] if isinstance(prefix, str) else prefix
    texts = [each for each in (*pieces, suffix) if isinstance(each, str)]
    check_bytes(service, sum(map(utf8_bytes, texts)), "suffix")
    before: list[int] = []
    for piece in pieces:
        before += _plain(vocabulary, piece) if isinstance(piece, str) else [piece]
    check_ids(vocabulary, before, "prompt")
    return _joined(vocabulary, marks, [], before, _plain(vocabulary, suffix))


def infill_prompt(service: ModelService, request: InfillRequest, answer_tokens: int) -> tuple[int, ...]:
    """The prompt for what stands at a cursor, cut around it so that `answer_tokens` still fit.

    Raises:
        UnsupportedModel: the model has no tokens for that.
    """
    marks, vocabulary = infill_tokens(service), service.vocabulary
    room = max(service.context - answer_tokens - 4, 0)  # the marks, and the begin-of-text token
    chars = CHARS_PER_TOKEN * room
    before = _plain(vocabulary, (request.input_prefix + (request.prompt or ""))[-chars:])
    behind = _plain(vocabulary, request.input_suffix[:chars])
    kept = min(len(behind), max(room - len(before), int(room * (1 - PREFIX_SHARE))))
    behind = behind[:kept]
    before = _last(before, room - len(behind))
    extra = _extra(vocabulary, marks, request.input_extra or (), room - len(before) - len(behind))
    return _joined(vocabulary, marks, extra, before, behind)


def _extra(vocabulary: Vocabulary, marks: Infill, files: Sequence[ExtraFile], room: int) -> list[int]:
    """The other files, of which the last ones count most; those that do not fit are left out."""
    found: list[int] = []
    head = [] if marks.repository is None else [marks.repository, *_plain(vocabulary, REPOSITORY)]
    own = [] if marks.separator is None else [marks.separator, *_plain(vocabulary, OWN_FILE)]
    for file in reversed(files):
        text = file.text[: CHARS_PER_TOKEN * max(room, 1)]
        if marks.separator is None:
            tokens = _plain(vocabulary, SNIPPET + text)
        else:
            tokens = [marks.separator, *_plain(vocabulary, f"{file.filename or NAMELESS}\n{text}")]
        if len(head) + len(tokens) + len(found) + len(own) > room:
            break
        found = tokens + found
    return head + found + own if found else []


def _joined(
    vocabulary: Vocabulary, marks: Infill, extra: Sequence[int], before: Sequence[int], behind: Sequence[int]
) -> tuple[int, ...]:
    begin = [vocabulary.bos] if vocabulary.wants_bos and vocabulary.bos is not None else []
    return (*begin, *extra, marks.prefix, *before, marks.suffix, *behind, marks.middle)


def _plain(vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.tokenize(text, special=False, add_bos=False) if text else []


def _last(tokens: list[int], count: int) -> list[int]:
    return tokens[-count:] if count > 0 else []


class InfillReply:
    """llama.cpp's own shape of an answer, whole or as events; there is no mark after the last one.

    `stop_type` says what ended it: `limit`, `word` (a stop string, which is `stopping_word`) or `eos`.
    """

    media_type = "text/event-stream"
    keep_alive = b": keep-alive\n\n"

    def __init__(self, job: Job) -> None:
        self._job = job

    def begin(self) -> Iterable[bytes]:
        """Nothing comes before the first token."""
        return ()

    def push(self, index: int, piece: AnswerPiece) -> Iterable[bytes]:
        """A chunk's event, and one more for the end."""
        if piece.text:
            counts = {
                "tokens_predicted": piece.completion_tokens,
                "tokens_evaluated": piece.prompt_tokens,
            }
            yield _data({"index": index, "content": piece.text, "stop": False} | counts)
        if piece.finish_reason is not None:
            yield _data(self._end(index, "", piece))

    def end(self) -> Iterable[bytes]:
        """Nothing comes after the last end."""
        return ()

    def failure(self, error: Exception) -> Iterable[bytes]:
        """An event with the error; nothing follows it."""
        return (_data(error_body(error)),)

    def whole(self, answers: Sequence[WholeAnswer]) -> Any:
        """The reply that is not streamed; a list where several answers were asked for, as llama.cpp does."""
        found = [self._end(index, answer.said.text, answer.last) for index, answer in enumerate(answers)]
        return found[0] if len(found) == 1 else found

    def _end(self, index: int, text: str, last: AnswerPiece) -> dict[str, Any]:
        ended = "eos" if last.stop is None else "word"
        return {
            "index": index,
            "content": text,
            "stop": True,
            "model": self._job.model,
            "tokens_predicted": last.completion_tokens,
            "tokens_evaluated": last.prompt_tokens,
            "tokens_cached": last.cached_tokens,
            "stop_type": "limit" if last.finish_reason == "length" else ended,
            "stopping_word": last.stop or "",
            "timings": last.timings,
        }


def _data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
