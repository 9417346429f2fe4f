"""How good a model is on a text, and how near to the model it was made from: `cordee eval`.

Perplexity is that of llama.cpp's llama-perplexity: the text is cut into windows of CONTEXT tokens, each
begins with the BOS token if the vocabulary wants one, and the second half of each is scored. The other
figures are means over the same tokens: the Kullback-Leibler divergence from the original's probabilities to
the model's (in nats), and how often both find the same token most likely.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.resources import files
from math import prod
from pathlib import Path

import numpy as np

from cordee.convert.ternary_file import EMBEDDING, HEAD
from cordee.engine.stage import Batch, Stage, StageConfig
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadModelFile, BadRequest
from cordee.models.fit import own_context, parameter_count, size_of, vocabulary_size
from cordee.models.gguf import BLOCK, Header, engine_of

CONTEXT = 512  # llama-perplexity's default
WINDOWS_MIN = 2  # as llama-perplexity has it: fewer say nothing
TEXTS = ("english.txt", "french.txt")  # in the folder texts/, which says where they are from
TEXT_BYTES_MAX = 16 << 20  # a text that takes hours
# In files of `cordee compress`: the weights of the model that was compressed, a tied head counted once.
WEIGHTS_KEY, WEIGHTS_LIMIT = "cordee.compress.weights", 1 << 62

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelSize:
    """Bytes of all tensors; bits per weight with scales, embedding and head, and of the layers alone."""

    nbytes: int
    bits_per_weight: float
    bits_per_layer_weight: float


@dataclass(frozen=True)
class TextScore:
    """Means over `tokens` scored tokens; None where there is no original to compare with."""

    tokens: int
    perplexity: float
    perplexity_original: float | None
    kl: float | None
    same_top1: float | None


def default_text() -> str:
    """The text that comes with the package: English and French prose in the public domain."""
    folder = files("cordee.compress") / "texts"
    return "".join((folder / name).read_text(encoding="utf-8") for name in TEXTS)


def read_text(path: Path) -> str:
    """A text from outside.

    Raises:
        BadRequest: it cannot be read, is not UTF-8, or is longer than TEXT_BYTES_MAX.
    """
    try:
        with path.open("rb") as file:
            data = file.read(TEXT_BYTES_MAX + 1)
        text = data.decode()
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text: save it as UTF-8, or name another file.") from error
    if len(data) > TEXT_BYTES_MAX:
        raise BadRequest(f"{path} has more than {TEXT_BYTES_MAX >> 20} MiB: a part of it is enough.")
    return text


def size_of_model(header: Header) -> ModelSize:
    """The size of a model, in bytes and in bits for each of its weights.

    Raises:
        BadModelFile, UnsupportedModel: the header lacks what is needed to count them.
    """
    stored = parameter_count(header)
    weights = header.count(WEIGHTS_KEY, 0, limit=WEIGHTS_LIMIT) or stored
    if engine_of(header) == "ternary":
        tables = sum(tensor.name in (EMBEDDING, HEAD) for tensor in header.tensors)
        outside = size_of(header, ".embedding_length") * (tables * vocabulary_size(header) + 1)
    else:
        outside = sum(prod(tensor.shape) for tensor in header.tensors if not BLOCK.match(tensor.name))
    layer_bytes = sum(tensor.nbytes for tensor in header.tensors if BLOCK.match(tensor.name))
    return ModelSize(
        header.size_bytes, 8 * header.size_bytes / weights, 8 * layer_bytes / max(stored - outside, 1)
    )


def evaluate(
    header: Header,
    text: str,
    *,
    original: Header | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TextScore:
    """Read `text` with the model of `header`, and with `original` beside it.

    `progress(done_bytes, total_bytes)` counts bytes of the text.

    Raises:
        BadRequest: the text is too short, or the models split it into different tokens.
        StageFailed, BadModelFile, UnsupportedModel: a model cannot be loaded or gives no numbers.
    """
    headers = [header, *([original] if original else [])]
    context = min(CONTEXT, *(own_context(each) or CONTEXT for each in headers))
    windows, nbytes = _windows(headers, text, context), len(text.encode())
    total = _Sums()
    with ExitStack() as stack:
        stages = [stack.enter_context(closing(_stage(each, context, threads))) for each in headers]
        for number, window in enumerate(windows):
            rows = [_second_half(stage, window) for stage in stages]
            for following, *logits in zip(_parts(window, context), *rows, strict=True):
                total.add(headers, following, logits)
            if progress:
                progress(nbytes * (number + 1) // len(windows), nbytes)
    return total.means()


class _Sums:
    """Sums over scored tokens."""

    def __init__(self) -> None:
        self._tokens = self._same = 0
        self._losses = [0.0, 0.0]
        self._divergence = 0.0
        self._compared = False

    def add(self, headers: list[Header], following: np.ndarray, logits: list[np.ndarray]) -> None:
        """Rows of logits of the model, and perhaps of its original, with the token that follows each."""
        rows = np.arange(len(following))
        self._tokens += len(following)
        odds = [_log_softmax(header, each) for header, each in zip(headers, logits, strict=True)]
        for number, each in enumerate(odds):
            self._losses[number] -= float(each[rows, following].sum())
        if len(odds) > 1:
            ours, theirs = odds
            self._compared = True
            self._divergence += float((np.exp(theirs) * (theirs - ours)).sum())
            self._same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())

    def means(self) -> TextScore:
        """The figures."""
        ours, theirs = (_exp(loss / self._tokens) for loss in self._losses)
        if not self._compared:
            return TextScore(self._tokens, ours, None, None, None)
        return TextScore(
            self._tokens, ours, theirs, self._divergence / self._tokens, self._same / self._tokens
        )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond, a float64 overflows


def _log_softmax(header: Header, logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise BadModelFile(f"{header.name} computes values that are not numbers: its file is damaged.")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def tokens_of(header: Header, text: str) -> tuple[list[int], int | None]:
    """The tokens of a text with the model's vocabulary, and the BOS token if windows begin with it."""
    with closing(Vocabulary(header.path, header.name)) as vocabulary:
        bos = vocabulary.bos if vocabulary.wants_bos else None
        return vocabulary.tokenize(text, special=False, add_bos=True), bos


def _windows(headers: list[Header], text: str, context: int) -> np.ndarray:
    """(windows, context) int32 tokens."""
    found = [tokens_of(header, text) for header in headers]
    if any(each != found[0] for each in found):
        raise BadRequest(
            f"{headers[0].name} and {headers[1].name} split the text into different tokens: figures of "
            "models with different vocabularies cannot be compared."
        )
    tokens, bos = found[0]
    count = len(tokens) // context
    if count < WINDOWS_MIN:
        raise BadRequest(
            f"The text has {len(tokens)} tokens, and at least {WINDOWS_MIN * context} are needed: "
            "give a longer one with --text."
        )
    windows = np.array(tokens[: count * context], dtype=np.int32).reshape(count, context)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _stage(header: Header, context: int, threads: int | None) -> Stage:
    config = StageConfig(context=context, sequences=1, batch_rows=context, threads=threads)
    if engine_of(header) == "ternary":
        from cordee.engine.ternary import TernaryStage

        return TernaryStage(header.path, config, name=header.name)
    from cordee.engine.llama.stage import LlamaStage

    return LlamaStage(header.path, config, name=header.name)


def _parts(window: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """The tokens to be predicted, as many at a time as `_second_half` gives rows of logits."""
    half, at_once = context // 2, _at_once(context)
    for first in range(half, context - 1, at_once):
        yield window[first + 1 : min(first + at_once, context - 1) + 1]


def _second_half(stage: Stage, window: np.ndarray) -> Iterator[np.ndarray]:
    """The logits of a window's second half but for its last token, some rows at a time."""
    context = len(window)
    half, at_once = context // 2, _at_once(context)
    stage.clear()
    _decode(stage, window, 0, half, False)
    for first in range(half, context - 1, at_once):
        yield _decode(stage, window, first, min(first + at_once, context - 1), True)


def _at_once(context: int) -> int:
    return StageConfig(context=context, sequences=1, batch_rows=context).output_rows


def _decode(stage: Stage, window: np.ndarray, first: int, last: int, outputs: bool) -> np.ndarray:
    places = np.arange(first, last, dtype=np.int32)
    return stage.decode(
        Batch(window[first:last], places, np.zeros_like(places), np.full(len(places), outputs))
    )
