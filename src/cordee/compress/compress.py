"""`cordee compress`: an ordinary model becomes a ternary one, a layer at a time, in bounded memory.

A layer's matrices are made by one of three methods and kept in a folder beside the output (work.py); when all
are there, they are written as a file for the ternary engine (convert/ternary_file.py) in one go. Embedding
and head stay at 8 bits, or what `head` says.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGUFWriter

from cordee.compress.calibration import calibration_windows, default_calibration
from cordee.compress.decoder import Decoder
from cordee.compress.evaluate import WEIGHTS_KEY
from cordee.compress.gptq import WIDE_COLUMNS, compressed
from cordee.compress.layerwise import LayerCompressor, LayerWeights
from cordee.compress.source import Progress, Source
from cordee.compress.trits import TernaryMatrix, fitted, mean_magnitudes
from cordee.compress.work import Work, folder_of, work_folder
from cordee.convert.convert import convert
from cordee.convert.ternary_file import EMBEDDING, TernaryModel, write
from cordee.errors import BadRequest, DoesNotFit, StorageFailed, UnsupportedModel
from cordee.files import atomic_file
from cordee.models.gguf import TERNARY_KEY, read_header

Method = Literal["absmean", "fit", "gptq"]
WORK_FORMAT = 1  # of the folder: another one is begun anew
COPY_BYTES = 4 << 20
# Python, numpy and the vocabulary's child.
PROGRAM_BYTES = 150 << 20
# Most windows that are computed at a time: more gain nothing.
WINDOWS_AT_ONCE = 8
NEXT_ROWS, INNER_ROWS = "next.f32", "inner.f32"
CODES_PER_BYTE = 4


@dataclass(frozen=True)
class CompressOptions:
    """How to compress. `span` columns of a row share a scale (0: all);
    without `calibration`, a text, that of the package is read.
    """

    method: Method = "gptq"
    span: int = 128
    planes: int = 1
    head: str = "int8"
    calibration: str | None = None
    memory_bytes: int = 4 << 30


def compress(
    path: Path,
    out: Path,
    options: CompressOptions,
    *,
    name: str | None = None,
    pre: str | None = None,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> None:
    """Write the model at `path`, which messages call `name`, to `out`.

    `pre` is as for `cordee convert`. `progress(done_bytes, total_bytes)` counts weights as two bytes each. An
    interrupted run goes on where it stopped and writes the same bytes. A model that is ternary already is
    written without a changed weight.

    Raises:
        BadModelFile: a tensor is missing, has a wrong shape or holds what is no number; names it.
        UnsupportedModel: the ternary engine does not run such models.
        BadRequest: `out` is the model, or the calibration text is too short.
        DoesNotFit: `memory_bytes` is too little.
        StorageFailed: no room on disk. After any of these nothing is left but what was there before.
    """
    called = name or path.name
    say = report or _silent
    if out.exists() and out.samefile(path):
        raise BadRequest(f"{out} is the model to be compressed: name another file.", "path")
    if _passed_through(path, out, options, pre, progress):
        say(f"{called} is ternary already: no weight was changed")
        return
    source = Source(path, called, options.head, options.span, pre)
    _Run(source, out, options, progress, say).run()


def _passed_through(
    path: Path, out: Path, options: CompressOptions, pre: str | None, progress: Progress | None
) -> bool:
    """Whether the model is ternary; then it was written."""
    if path.is_file() and path.suffix != ".safetensors" and TERNARY_KEY in read_header(path).metadata:
        with path.open("rb") as file, atomic_file(out) as target:
            shutil.copyfileobj(file, target, COPY_BYTES)
        return True
    try:
        convert(path, out, layout="trit5", head=options.head, pre=pre, progress=progress)
    except UnsupportedModel:
        return False
    return True


def _silent(text: str) -> None:
    """Report nothing."""


class _Run:
    """One run of `compress`."""

    def __init__(
        self,
        source: Source,
        out: Path,
        options: CompressOptions,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._out, self._options, self._say = source, out, options, say
        self._model = source.model
        self._progress = progress
        self._done = 0
        self._total = 2 * sum(rows * cols for rows, cols in source.matrices.values())

    def run(self) -> None:
        """Layers, then the file."""
        needs_rows = self._options.method == "gptq"
        at_once = self._windows_at_once() if needs_rows else 0
        self._require_disk(needs_rows)
        with work_folder(self._out, self._settings()) as work:
            begun = work.layers_done(needs_rows)
            if begun:
                self._say(f"going on with layer {begun + 1} of {self._model.layers}")
            else:
                self._say("reading all weights once")
                self._source.check_numbers()
            self._done = self._total * begun // self._model.layers
            if needs_rows:
                self._by_gptq(work, begun, at_once)
            else:
                for layer in range(begun, self._model.layers):
                    self._keep(work, layer, {n: self._plain(layer, n) for n in self._model.matrices()})
            self._say("writing the file")
            write(self._out, self._model, _Kept(self._source, work), describe=self._describe)

    def _by_gptq(self, work: Work, begun: int, at_once: int) -> None:
        text = self._options.calibration or default_calibration()
        windows = calibration_windows(self._source, text, folder_of(self._out))
        shape = (2, *windows.shape, self._model.n_embd)
        if not work.has_rows(begun):
            self._put_embedded(work, windows, shape)
        inner_shape = (*shape[:3], self._model.heads * self._model.head_dim)
        inner = work.new_rows(INNER_ROWS, inner_shape)
        decoder = Decoder(self._model, windows.shape[1])
        for layer in range(begun, self._model.layers):
            following = work.new_rows(NEXT_ROWS, shape)
            made = LayerCompressor(
                decoder,
                LayerWeights(partial(self._source.matrix, layer), self._source.vectors(layer)),
                self._fit,
                hidden=work.rows(layer, shape),
                following=following,
                inner=inner,
                windows_at_once=at_once,
            ).run()
            self._keep(work, layer, made)
            work.put_rows(layer + 1, following, NEXT_ROWS)

    def _fit(self, name: str, weights: np.ndarray, hessian: np.ndarray) -> TernaryMatrix:
        found = compressed(weights, hessian, self._options.planes, self._span(weights))
        self._count(weights)
        return found

    def _plain(self, layer: int, name: str) -> TernaryMatrix:
        """A matrix for itself, without regard to its inputs."""
        weights = self._source.matrix(layer, name)
        scales = mean_magnitudes if self._options.method == "absmean" else None
        found = fitted(weights, self._options.planes, self._span(weights), scales)
        self._count(weights)
        return found

    def _span(self, weights: np.ndarray) -> int:
        return self._options.span or weights.shape[1]

    def _count(self, weights: np.ndarray) -> None:
        self._done += 2 * weights.size
        if self._progress:
            self._progress(self._done, self._total)

    def _put_embedded(self, work: Work, windows: np.ndarray, shape: tuple[int, ...]) -> None:
        rows = work.new_rows(NEXT_ROWS, shape)
        for number, window in enumerate(windows):
            for place, token in enumerate(window.tolist()):
                rows[:, number, place] = self._source.rows(EMBEDDING, token, token + 1)[0]
        work.put_rows(0, rows, NEXT_ROWS)

    def _keep(self, work: Work, layer: int, matrices: dict[str, TernaryMatrix]) -> None:
        tensors = dict[str, np.ndarray]()
        for name, matrix in matrices.items():
            tensors[f"{name}.codes"] = _packed(matrix.codes)
            tensors[f"{name}.scales"] = matrix.scales
        work.put_layer(layer, tensors)

    def _describe(self, writer: GGUFWriter) -> None:
        self._source.describe(writer)
        writer.add_uint64(WEIGHTS_KEY, self._source.weights)

    def _settings(self) -> str:
        """What the result depends on."""
        options = asdict(self._options)
        options["calibration"] = hashlib.sha256((self._options.calibration or "").encode()).hexdigest()
        return json.dumps([WORK_FORMAT, self._source.identity(), options])

    def _windows_at_once(self) -> int:
        """How many windows the memory allows.

        Raises:
            DoesNotFit: not one.
        """
        fixed, window = layer_bytes(self._model), window_bytes(self._model)
        count = (self._options.memory_bytes - fixed) // window
        if count < 1:
            raise DoesNotFit(
                f"{self._source.name} needs {(fixed + window) / 1e9:.1f} GB of memory for its widest "
                f"matrix, and {self._options.memory_bytes / 1e9:.1f} GB may be used: allow more with "
                "--memory, or take --method fit."
            )
        return int(min(count, WINDOWS_AT_ONCE))

    def _require_disk(self, needs_rows: bool) -> None:
        """Raise StorageFailed if the disk cannot hold what the run will write."""
        need = disk_bytes(self._model, self._source.weights, needs_rows)
        folder = self._out.resolve().parent
        try:
            free = shutil.disk_usage(folder).free
        except OSError:  # atomic_file says what is wrong with the folder
            return
        if free < need:
            raise StorageFailed(
                f"{self._out} and the work on it need {need / 1e9:.1f} GB, and its disk has "
                f"{free / 1e9:.1f} GB free: free some space, then try again."
            )


class _Kept:
    """What the folder holds, as a `cordee.convert.ternary_file.WeightSource`."""

    def __init__(self, source: Source, work: Work) -> None:
        self.vector = source.vector
        self._source, self._work = source, work
        self._last: tuple[str, np.ndarray] = ("", np.empty(0))  # strips of one matrix follow one another

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `WeightSource.rows`."""
        _, layer, matrix, *_ = (*name.split("."), "", "")
        if not layer.isdigit():
            return self._source.rows(name, first, last)
        if self._last[0] != name:
            packed = self._work.tensor(int(layer), f"{matrix}.codes")
            self._last = (name, _unpacked(packed, self._source.model.matrices()[matrix]))
        return self._last[1][first:last]

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`."""
        _, layer, matrix, _ = name.split(".")
        [scales] = self._work.tensor(int(layer), f"{matrix}.scales")
        return scales if self._source.model.scale_columns else scales[:, 0]


def _packed(codes: np.ndarray) -> np.ndarray:
    """(planes, rows, cols) codes, flat, four in a byte."""
    flat = codes.reshape(-1)
    padded = np.zeros(-(-len(flat) // CODES_PER_BYTE) * CODES_PER_BYTE, dtype=np.uint8)
    padded[: len(flat)] = (flat + 1).astype(np.uint8)
    quads = padded.reshape(-1, CODES_PER_BYTE)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def _unpacked(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `_packed` for one plane of that shape."""
    fields = np.stack([packed >> 2 * field & 3 for field in range(CODES_PER_BYTE)], axis=1)
    return (fields.reshape(-1)[: shape[0] * shape[1]].astype(np.int8) - 1).reshape(shape)


def layer_bytes(model: TernaryModel) -> int:
    """The most memory that fitting one matrix takes, without windows of rows.

    Of the widest input: H and the cross products while rows are added, or H with its factor, a copy of it and
    the work of inverting; beside either the matrices of one input, those of both streams.
    """
    most = 0
    for rows, cols in model.matrices().values():
        number = 4 if cols > WIDE_COLUMNS else 8
        most = max(most, cols * cols * (8 + 3 * number) + rows * cols * (4 + 2 * number))
    gates = 2 * model.n_ff * model.n_embd * 4
    return PROGRAM_BYTES + max(most, 2 * gates + 8 * model.n_ff**2)


def window_bytes(model: TernaryModel) -> int:
    """Memory for each window that is computed at a time."""
    width = 4 * model.n_embd + 3 * model.heads * model.head_dim + 4 * model.n_ff
    length = min(model.context, 512)
    return 4 * length * (width + 2 * length)


def disk_bytes(model: TernaryModel, weights: int, needs_rows: bool) -> int:
    """What a run writes: the file, the layers in the folder, and rows of both streams three times."""
    tables = 2 * model.n_embd * model.n_vocab * 9 // 8
    rows = 2 * 16_384 * (2 * model.n_embd + model.heads * model.head_dim) * 4 if needs_rows else 0
    return weights // 2 + tables + rows
