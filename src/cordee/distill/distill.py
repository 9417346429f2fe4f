"""`cordee distill`: a ternary model wins back, by training, some of what compressing it lost.

The model it was made from teaches it, on a text, a decoder layer at a time (blocks.py), in numpy and in
bounded memory. What is done is kept in a folder beside the file (compress/work.py): an interrupted run goes
on with the layer at which it stopped, and writes the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cordee.compress.calibration import calibration_windows, default_calibration
from cordee.compress.source import Progress, Source
from cordee.compress.work import Work, folder_of, work_folder
from cordee.convert.ternary_file import EMBEDDING
from cordee.distill.blocks import LatentLayer, Trained, through, trained
from cordee.distill.gradients import Layer
from cordee.distill.latent import LatentMatrix
from cordee.distill.weights_file import TernaryFile
from cordee.errors import BadRequest, DoesNotFit, UnsupportedModel
from cordee.models.gguf import TERNARY_KEY, read_header

WORK_FORMAT = 1
THEIRS, OURS = 0, 1
NEXT_ROWS = "next.f32"
TOKENS_MAX = 32_768  # of the text, from its beginning
STEP_WINDOWS = 4
# A weight in training: its float, value, gradient, the two means of its optimiser, and what passes by.
WEIGHT_BYTES = 28
PROGRAM_BYTES = 200 << 20


@dataclass(frozen=True)
class DistillOptions:
    """How to train: `steps` for each layer, on a text (that of the package if none is given)."""

    text: str | None = None
    steps: int = 100
    seed: int = 0
    memory_bytes: int = 4 << 30


def distill(
    path: Path,
    original: Path,
    options: DistillOptions,
    *,
    names: tuple[str, str] | None = None,
    pre: str | None = None,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> None:
    """Train the ternary file at `path`, in place, towards the model at `original` that it was made from.

    `names` are what messages call the two. `progress(done_steps, total_steps)` counts training steps. The
    file is replaced when all is done.

    Raises:
        BadModelFile: a file is damaged, or the one was not made from the other.
        UnsupportedModel: `path` is no ternary file, or of a kind that is not trained.
        BadRequest: the text is too short, or another process works on the file.
        DoesNotFit: `memory_bytes` is too little.
        StorageFailed: no room on disk.
    """
    ours, theirs = names or (path.name, original.name)
    if not path.is_file():
        raise BadRequest(f"{ours} is not a file: name the one that `cordee compress` wrote.", "path")
    header = read_header(path, name=ours)
    if TERNARY_KEY not in header.metadata:
        raise UnsupportedModel(f"{ours} is not ternary: make it so with `cordee compress` first.")
    source = Source(original, theirs, header.text("cordee.ternary.head", "int8"), pre)
    _Run(source, TernaryFile(header, source.model), path, options, progress, report or _silent).run()


def _silent(text: str) -> None:
    """Report nothing."""


class _Run:
    """One run of `distill`."""

    def __init__(
        self,
        source: Source,
        file: TernaryFile,
        path: Path,
        options: DistillOptions,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._file, self._path, self._options = source, file, path, options
        self._progress, self._say = progress, say
        self._model = source.model

    def run(self) -> None:
        """All layers, then the file."""
        self._require_memory()
        with work_folder(self._path, self._settings()) as work:
            windows = self._windows()
            shape = (2, *windows.shape, self._model.n_embd)
            begun = work.layers_done(needs_rows=True)
            if begun:
                self._say(f"going on with layer {begun + 1} of {self._model.layers}")
            if not work.has_rows(begun):
                self._put_embedded(work, windows, shape)
            layer = Layer(self._model, windows.shape[1], self._source.divisors())
            for number in range(begun, self._model.layers):
                self._train(work, layer, number, shape)
            self._say("writing the file")
            self._file.write(self._path, self._changed(work))

    def _train(self, work: Work, layer: Layer, number: int, shape: tuple[int, ...]) -> None:
        """Train a layer, and let both streams through it."""
        hidden, following = work.rows(number, shape), work.new_rows(NEXT_ROWS, shape)
        original = {name: self._source.matrix(number, name) for name in self._model.matrices()}
        vectors = self._source.vectors(number)
        for place, rows in enumerate(through(layer, original, vectors, hidden[THEIRS])):
            following[THEIRS, place] = rows
        found, fixed = self._trained(layer, number, original, (hidden[OURS], following[THEIRS]))
        change = 100 * (1 - found.error_after / found.error_before) if found.error_before else 0.0
        self._say(
            f"layer {number + 1} of {self._model.layers}: {found.error_before:.4f} off before, "
            f"{found.error_after:.4f} after ({change:.0f} % less)"
        )
        matrices = fixed | {name: matrix.dense() for name, matrix in found.matrices.items()}
        for place, rows in enumerate(through(layer, matrices, found.vectors, hidden[OURS])):
            following[OURS, place] = rows
        work.put_layer(number, self._tensors(number, found))
        work.put_rows(number + 1, following, NEXT_ROWS)
        if self._progress:
            self._progress((number + 1) * self._options.steps, self._model.layers * self._options.steps)

    def _trained(
        self,
        layer: Layer,
        number: int,
        original: dict[str, np.ndarray],
        rows: tuple[np.ndarray, np.ndarray],
    ) -> tuple[Trained, dict[str, np.ndarray]]:
        """What came of a layer, and its matrices at 8 bits, which stay."""
        all_of = {name: self._file.matrix(number, name) for name in self._model.matrices()}
        before = {name: matrix for name, matrix in all_of.items() if self._file.is_ternary(number, name)}
        fixed = {name: matrix.dense() for name, matrix in all_of.items() if name not in before}
        latent = {
            name: LatentMatrix(matrix.codes, matrix.scales, matrix.span, original[name])
            for name, matrix in before.items()
        }
        vectors = {name: self._file.vector(number, name).copy() for name in self._model.norms()}
        found = trained(
            layer,
            LatentLayer(latent, fixed, vectors),
            before,
            rows,
            steps=self._options.steps,
            windows=STEP_WINDOWS,
            seed=self._options.seed + number,
        )
        return found, fixed

    def _tensors(self, number: int, found: Trained) -> dict[str, np.ndarray]:
        """A layer as its tensors' bytes."""
        tensors: dict[str, np.ndarray] = {}
        for name, matrix in found.matrices.items():
            tensors |= self._file.packed(number, name, matrix.codes, matrix.scales)
        return tensors | {f"blk.{number}.{name}.weight": each for name, each in found.vectors.items()}

    def _changed(self, work: Work) -> Iterator[tuple[str, np.ndarray]]:
        for number in range(self._model.layers):
            yield from work.tensors(number).items()

    def _windows(self) -> np.ndarray:
        text = self._options.text or default_calibration()
        return calibration_windows(self._source, text, folder_of(self._path), TOKENS_MAX)

    def _put_embedded(self, work: Work, windows: np.ndarray, shape: tuple[int, ...]) -> None:
        rows = work.new_rows(NEXT_ROWS, shape)
        for number, window in enumerate(windows):
            for place, token in enumerate(window.tolist()):
                rows[:, number, place] = self._source.rows(EMBEDDING, token, token + 1)[0]
        work.put_rows(0, rows, NEXT_ROWS)

    def _settings(self) -> str:
        """What the result depends on."""
        options = asdict(self._options)
        options["text"] = hashlib.sha256((self._options.text or "").encode()).hexdigest()
        stat = self._path.stat()
        ours = [str(self._path.resolve()), stat.st_size, stat.st_mtime_ns]
        return json.dumps(["distill", WORK_FORMAT, ours, self._source.identity(), options])

    def _require_memory(self) -> None:
        weights = sum(rows * cols for rows, cols in self._model.matrices().values())
        need = PROGRAM_BYTES + WEIGHT_BYTES * weights
        if need > self._options.memory_bytes:
            raise DoesNotFit(
                f"Training a layer of {self._source.name} takes {need / 1e9:.1f} GB of memory, and "
                f"{self._options.memory_bytes / 1e9:.1f} GB may be used: allow more with --memory."
            )
