"""`cordee compress`: an ordinary model becomes a ternary one, a layer at a time, in bounded memory.

A layer's matrices are made by one of three methods and kept in a folder beside the output (work.py); when all
are there, they are written as a file for the ternary engine (convert/ternary_file.py) in one go. Embedding
and head stay at 8 bits, or what `head` says.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from cordee.compress.budget import chosen, measured_losses, memory_bytes, room_in
from cordee.compress.calibration import calibration_windows, default_calibration
from cordee.compress.decoder import Decoder
from cordee.compress.evaluate import WEIGHTS_KEY
from cordee.compress.fitter import CompressOptions, Fitter
from cordee.compress.layerwise import LayerCompressor, LayerWeights
from cordee.compress.sizes import disk_bytes, layer_bytes, window_bytes
from cordee.compress.source import Progress, Source
from cordee.compress.stored import StoredWeights, stored
from cordee.compress.trits import TernaryMatrix
from cordee.compress.work import Work, folder_of, work_folder
from cordee.convert.convert import convert
from cordee.convert.ternary_file import file_bytes, write
from cordee.errors import BadRequest, DoesNotFit, StorageFailed, UnsupportedModel
from cordee.files import atomic_file
from cordee.models.gguf import TERNARY_KEY, read_header

WORK_FORMAT = 1  # of the folder: another one is begun anew
COPY_BYTES = 4 << 20
# Most windows that are computed at a time: more gain nothing.
WINDOWS_AT_ONCE = 8
NEXT_ROWS, INNER_ROWS = "next.f32", "inner.f32"


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
    source = Source(path, called, options.head, pre)
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
        self._fit_with(options)
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
            if self._options.size_bytes:
                self._keep_by_size(work, self._options.size_bytes)
            self._done = self._total * begun // self._model.layers
            if needs_rows:
                self._by_gptq(work, begun, at_once)
            else:
                for layer in range(begun, self._model.layers):
                    made = {name: self._plain(layer, name) for name in self._model.matrices()}
                    work.put_layer(layer, stored(made))
            self._say("writing the file")
            weights = StoredWeights(self._source, self._model, work, self._fitter.signs)
            write(self._out, self._model, weights, describe=self._describe)

    def _fit_with(self, options: CompressOptions) -> None:
        self._fitter = Fitter(self._source.model, options)
        self._model = self._fitter.model

    def _keep_by_size(self, work: Work, size_bytes: int) -> None:
        """Leave matrices at 8 bits up to a file of that size."""
        kept = work.kept()
        if kept is None:
            kept = self._chosen(work, size_bytes)
            work.put_kept(kept)
        self._say(f"{len(kept)} of {len(self._source.matrices)} matrices stay at 8 bits")
        self._fit_with(replace(self._options, keep=(*self._options.keep, *kept)))

    def _chosen(self, work: Work, size_bytes: int) -> tuple[str, ...]:
        weights = StoredWeights(self._source, self._model, work, self._fitter.signs)
        least = file_bytes(self._model, weights, describe=self._describe)
        room = room_in(size_bytes, least, self._source.name)
        need = memory_bytes(self._model, window_bytes(self._model))
        if need > self._options.memory_bytes:
            raise self._too_little(need, "to measure which matrices matter")
        self._say("measuring which matrices matter")
        losses = measured_losses(self._source, self._fitter, self._windows())
        free = {name: loss for name, loss in losses.items() if f"{name}.weight" not in self._model.kept}
        return chosen(free, self._model, room)

    def _windows(self) -> np.ndarray:
        text = self._options.calibration or default_calibration()
        return calibration_windows(self._source, text, folder_of(self._out))

    def _by_gptq(self, work: Work, begun: int, at_once: int) -> None:
        windows = self._windows()
        shape = (2, *windows.shape, self._model.n_embd)
        if not work.has_rows(begun):
            self._put_embedded(work, windows, shape)
        inner_shape = (*shape[:3], self._model.heads * self._model.head_dim)
        inner = work.new_rows(INNER_ROWS, inner_shape)
        decoder = Decoder(self._model, windows.shape[1], self._source.divisors())
        for layer in range(begun, self._model.layers):
            following = work.new_rows(NEXT_ROWS, shape)
            made = LayerCompressor(
                decoder,
                LayerWeights(partial(self._source.matrix, layer), self._source.vectors(layer)),
                partial(self._fit, layer),
                hidden=work.rows(layer, shape),
                following=following,
                inner=inner,
                windows_at_once=at_once,
            ).run()
            work.put_layer(layer, stored(made))
            work.put_rows(layer + 1, following, NEXT_ROWS)

    def _fit(self, layer: int, name: str, weights: np.ndarray, hessian: np.ndarray) -> TernaryMatrix:
        found = self._fitter.by_inputs(layer, name, weights, hessian)
        self._count(weights)
        return found

    def _plain(self, layer: int, name: str) -> TernaryMatrix:
        weights = self._source.matrix(layer, name)
        found = self._fitter.by_itself(layer, name, weights)
        self._count(weights)
        return found

    def _count(self, weights: np.ndarray) -> None:
        self._done += 2 * weights.size
        if self._progress:
            self._progress(self._done, self._total)

    def _put_embedded(self, work: Work, windows: np.ndarray, shape: tuple[int, ...]) -> None:
        rows = work.new_rows(NEXT_ROWS, shape)
        for number, embedded in enumerate(self._source.embedded(windows)):
            rows[:, number] = embedded
        work.put_rows(0, rows, NEXT_ROWS)

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
            raise self._too_little(fixed + window, "for its widest matrix")
        return int(min(count, WINDOWS_AT_ONCE))

    def _too_little(self, need: int, what: str) -> DoesNotFit:
        return DoesNotFit(
            f"{self._source.name} needs {need / 1e9:.1f} GB of memory {what}, and "
            f"{self._options.memory_bytes / 1e9:.1f} GB may be used: allow more with --memory, or take "
            f"--method fit{' without --size' if self._options.size_bytes else ''}."
        )

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
