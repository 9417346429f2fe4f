"""`cordee distill`: a ternary model wins back, by training, some of what compressing it lost.

The model it was made from teaches it, on a text: a decoder layer at a time (blocks.py), in numpy and in
bounded memory; then, if that is wanted, all layers together (end_to_end.py). What is done is kept in a folder
beside the file (compress/work.py): an interrupted run goes on with the layer or the steps at which it
stopped, and writes the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cordee.compress.calibration import calibration_windows, default_calibration
from cordee.compress.source import Progress, Source
from cordee.compress.trits import TernaryMatrix
from cordee.compress.work import Work, folder_of, work_folder
from cordee.convert.ternary_file import HEAD, OUTPUT_NORM
from cordee.distill.blocks import LatentLayer, Trained, through, trained
from cordee.distill.end_to_end import EndToEnd, Head
from cordee.distill.gradients import Layer
from cordee.distill.latent import LatentMatrix
from cordee.distill.weights_file import TernaryFile
from cordee.errors import BadRequest, DoesNotFit, UnsupportedModel
from cordee.models.gguf import TERNARY_KEY, read_header

WORK_FORMAT = 1
THEIRS, OURS = 0, 1
NEXT_ROWS, BLOCKS = "next.f32", "blocks.gguf"
TOKENS_MAX = 32_768  # of the text, from its beginning
STEP_WINDOWS = 4
CHECKPOINT_STEPS = 20  # of end to end: a killed run loses no more
# A weight in training: its float, value, gradient, the two means of its optimiser, and what passes by.
WEIGHT_BYTES = 28
PROGRAM_BYTES = 200 << 20


@dataclass(frozen=True)
class DistillOptions:
    """How to train: `steps` for each layer, then `end_to_end` steps for all together.

    Without a `text` that of the package is read.
    """

    text: str | None = None
    steps: int = 100
    end_to_end: int = 0
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
            layer = Layer(self._model, windows.shape[1], self._source.divisors())
            self._by_blocks(work, layer, windows, shape)
            changed = self._kept(work)
            if self._options.end_to_end:
                blocks = folder_of(self._path) / BLOCKS
                if not blocks.exists():
                    self._file.write(blocks, changed)
                changed = self._end_to_end(work, layer, blocks, windows, shape)
            self._say("writing the file")
            self._file.write(self._path, changed)

    def _by_blocks(self, work: Work, layer: Layer, windows: np.ndarray, shape: tuple[int, ...]) -> None:
        begun = work.layers_done(needs_rows=True)
        if 0 < begun < self._model.layers:
            self._say(f"going on with layer {begun + 1} of {self._model.layers}")
        if not work.has_rows(begun):
            self._put_embedded(work, windows, shape)
        for number in range(begun, self._model.layers):
            self._train(work, layer, number, shape)

    def _end_to_end(
        self, work: Work, layer: Layer, blocks: Path, windows: np.ndarray, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Train all layers together; what the file's tensors are then."""
        file = TernaryFile(read_header(blocks), self._model)
        layers = [self._latent(file, n, self._originals(n)) for n in range(self._model.layers)]
        head = Head(
            self._source.vector(OUTPUT_NORM),
            self._source.rows(HEAD, 0, self._model.n_vocab),
            self._model.epsilon,
        )
        rows = (np.stack(list(self._source.embedded(windows))), work.rows(self._model.layers, shape)[THEIRS])
        options = self._options
        run = EndToEnd(layer, layers, head, rows, steps=options.end_to_end, seed=options.seed)
        before = run.divergence()
        if (state := work.state()) is not None:
            run.restore(state)
            self._say(f"going on with step {run.step + 1} of {options.end_to_end}")
        while run.step < options.end_to_end:
            run.train_step()
            if run.step % CHECKPOINT_STEPS == 0 and run.step < options.end_to_end:
                work.put_state(run.state())
            self._count(self._model.layers * options.steps + run.step * self._model.layers)
        after = run.divergence()
        self._say(f"end to end: KL divergence {before:.4f} before, {after:.4f} after")
        if after >= before:
            return self._kept(work)
        return (
            tensor
            for number, each in enumerate(layers)
            for tensor in self._tensors(number, each.rounded(), each.vectors).items()
        )

    def _kept(self, work: Work) -> Iterator[tuple[str, np.ndarray]]:
        """What the file's tensors are after training block by block."""
        return (each for number in range(self._model.layers) for each in work.tensors(number).items())

    def _train(self, work: Work, layer: Layer, number: int, shape: tuple[int, ...]) -> None:
        """Train a layer, and let both streams through it."""
        hidden, following = work.rows(number, shape), work.new_rows(NEXT_ROWS, shape)
        original, vectors = self._originals(number), self._source.vectors(number)
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
        work.put_layer(number, self._tensors(number, found.matrices, found.vectors))
        work.put_rows(number + 1, following, NEXT_ROWS)
        self._count((number + 1) * self._options.steps)

    def _trained(
        self,
        layer: Layer,
        number: int,
        original: dict[str, np.ndarray],
        rows: tuple[np.ndarray, np.ndarray],
    ) -> tuple[Trained, dict[str, np.ndarray]]:
        """What came of a layer, and its matrices at 8 bits, which stay."""
        latent = self._latent(self._file, number, original)
        found = trained(
            layer,
            latent,
            {name: self._file.matrix(number, name) for name in latent.latent},
            rows,
            steps=self._options.steps,
            windows=STEP_WINDOWS,
            seed=self._options.seed + number,
        )
        return found, latent.fixed

    def _latent(self, file: TernaryFile, number: int, original: dict[str, np.ndarray]) -> LatentLayer:
        """A layer of `file`, to be trained; `original` are the matrices that it was made from."""
        latent, fixed = dict[str, LatentMatrix](), dict[str, np.ndarray]()
        for name, weights in original.items():
            matrix = file.matrix(number, name)
            if file.is_ternary(number, name):
                latent[name] = LatentMatrix(matrix.codes, matrix.scales, matrix.span, weights)
            else:
                fixed[name] = matrix.dense()
        vectors = {name: file.vector(number, name).copy() for name in self._model.norms()}
        return LatentLayer(latent, fixed, vectors)

    def _originals(self, number: int) -> dict[str, np.ndarray]:
        return {name: self._source.matrix(number, name) for name in self._model.matrices()}

    def _tensors(
        self, number: int, matrices: Mapping[str, TernaryMatrix], vectors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """A layer as its tensors' bytes."""
        tensors: dict[str, np.ndarray] = {}
        for name, matrix in matrices.items():
            tensors |= self._file.packed(number, name, matrix.codes, matrix.scales)
        return tensors | {f"blk.{number}.{name}.weight": each for name, each in vectors.items()}

    def _count(self, done: int) -> None:
        """Steps of one layer each."""
        if self._progress:
            options = self._options
            self._progress(done, self._model.layers * (options.steps + options.end_to_end))

    def _windows(self) -> np.ndarray:
        text = self._options.text or default_calibration()
        return calibration_windows(self._source, text, folder_of(self._path), TOKENS_MAX, "text")

    def _put_embedded(self, work: Work, windows: np.ndarray, shape: tuple[int, ...]) -> None:
        rows = work.new_rows(NEXT_ROWS, shape)
        for number, embedded in enumerate(self._source.embedded(windows)):
            rows[:, number] = embedded
        work.put_rows(0, rows, NEXT_ROWS)

    def _settings(self) -> str:
        """What the result depends on."""
        options = asdict(self._options)
        options["text"] = hashlib.sha256((self._options.text or "").encode()).hexdigest()
        stat = self._path.stat()
        ours = [str(self._path.resolve()), stat.st_size, stat.st_mtime_ns]
        return json.dumps(["distill", WORK_FORMAT, ours, self._source.identity(), options])

    def _require_memory(self) -> None:
        """Of one layer, or of all of them.

        Raises:
            DoesNotFit: it is too little.
        """
        weights, what = sum(rows * cols for rows, cols in self._model.matrices().values()), "a layer"
        if self._options.end_to_end:
            weights, what = weights * self._model.layers, "all layers together"
        need = PROGRAM_BYTES + WEIGHT_BYTES * weights
        if need > self._options.memory_bytes:
            raise DoesNotFit(
                f"Training {what} of {self._source.name} takes {need / 1e9:.1f} GB of memory, and "
                f"{self._options.memory_bytes / 1e9:.1f} GB may be used: allow more with --memory."
            )
