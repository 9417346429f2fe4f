"""A `Stage` on the ternary engine (native/): rows in, rows or logits out, for models of -1, 0, +1.

A row's bits never depend on the rest of its batch or on the number of threads: every stage is
batch-invariant, and nothing needs to be measured at load as with the llama engine. The functions are those
of native/include/ternary.h.
"""

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path

import numpy as np

from cordee.engine.stage import Batch, StageConfig, StageDescription
from cordee.errors import BadModelFile, CordeeError, SetupNeeded, StageFailed, UnsupportedModel
from cordee.system import libraries, processes

BUILD = "ternary-3"  # the native code's version, on which exported states and equal tokens depend

_u32, _u64, _pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p


class _Error(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * 256),)


class _File(ctypes.Structure):
    _fields_ = (("bytes", _pointer), ("nbytes", ctypes.c_size_t))


class _Shape(ctypes.Structure):
    _fields_ = (
        ("architecture", ctypes.c_char * 64),
        *((name, _u32) for name in ("layers", "n_embd", "n_ff", "n_vocab", "heads", "kv_heads", "head_dim")),
        *((name, _u32) for name in ("trained_context", "has_embedding", "has_head")),
        ("weights_bytes", _u64),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, _u32) for name in ("context", "sequences", "batch_rows", "threads", "logits")),
        ("kernels", ctypes.c_char_p),
        ("cache", ctypes.c_char_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", _u32),
        *((name, _pointer) for name in ("tokens", "embeddings", "positions", "sequences", "outputs")),
    )


_FUNCTIONS = {
    "ternary_file_map": (ctypes.c_int, ctypes.c_char_p, _pointer, _pointer),
    "ternary_file_unmap": (None, _pointer),
    "ternary_model_bytes": (ctypes.c_size_t, _pointer),
    "ternary_model_make": (ctypes.c_int, _pointer, _pointer, _pointer, _pointer),
    "ternary_model_shape": (None, _pointer, _pointer),
    "ternary_session_bytes": (ctypes.c_size_t, _pointer, _pointer, _pointer),
    "ternary_session_make": (ctypes.c_int, _pointer, _pointer, _pointer, _pointer, _pointer),
    "ternary_session_end": (None, _pointer),
    "ternary_decode": (ctypes.c_int, _pointer, _pointer, _pointer, _pointer),
    "ternary_sequence_length": (_u32, _pointer, _u32),
    "ternary_sequence_trim": (ctypes.c_int, _pointer, _u32, _u32, _pointer),
    "ternary_sequence_copy": (ctypes.c_int, _pointer, _u32, _u32, _u32, _pointer),
    "ternary_sequence_bytes": (ctypes.c_size_t, _pointer, _u32),
    "ternary_sequence_export": (ctypes.c_int, _pointer, _u32, _pointer, _pointer),
    "ternary_sequence_import": (ctypes.c_int, _pointer, _u32, ctypes.c_char_p, ctypes.c_size_t, _pointer),
    "ternary_turn": (ctypes.c_int, _pointer, _u32, _u32, _u32, _pointer, _u32, _pointer),
    "ternary_memory_read": (_u64, _pointer, ctypes.c_size_t),
    "ternary_kernels_name": (ctypes.c_char_p, _u32),
    "ternary_kernels_dot": (
        ctypes.c_int,
        *(ctypes.c_char_p, ctypes.c_char_p, _pointer, _u32, _u32, _pointer, _u32, _pointer, _pointer),
    ),
}
# enum ternary_status: the error that each becomes.
_FAILURES: dict[int, type[CordeeError]] = {
    1: BadModelFile,
    2: UnsupportedModel,
    3: StageFailed,
    4: StageFailed,
}


@cache
def library() -> ctypes.CDLL:
    """The native library, with its functions' types declared.

    Raises:
        SetupNeeded: it was not built, or does not load.
    """
    path = Path(__file__).with_name("_ternary")
    try:
        loaded = libraries.load(path)
    except OSError as error:
        raise SetupNeeded(f"The ternary engine does not load ({error}): run `make native`") from error
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def kernels() -> list[str]:
    """Names of the kernels that this CPU runs, best first."""
    names = iter(lambda: library().ternary_kernels_name(_u32(len(found))), None)
    found: list[str] = []
    for name in names:
        found.append(name.decode())
    return found


def turn(rows: np.ndarray, signs: np.ndarray, block: int, *, back: bool = False) -> np.ndarray:
    """(n, width) float32 rows -> the same in a rotated basis, or out of it; native/FORMAT.md, "The rotation".

    The matrices of such a model, and its embedding, are their own rows in that basis: H is symmetric.

    Raises:
        StageFailed: `block` is no power of two from 16 on that divides the width.
    """
    turned = np.array(rows, dtype=np.float32, order="C")
    vector = np.ascontiguousarray(signs, dtype=np.float32)
    if turned.ndim != 2 or vector.shape != turned.shape[1:]:
        raise StageFailed(f"{vector.shape} signs do not fit rows of {turned.shape}.")
    error = _Error()
    count, width = turned.shape
    addresses = turned.ctypes.data, vector.ctypes.data
    if library().ternary_turn(addresses[0], count, width, block, addresses[1], back, ctypes.byref(error)):
        raise StageFailed(f"{error.text.decode()}.")
    return turned


class TernaryStage:
    """A loaded slice; see `cordee.engine.stage.Stage`. With `is_last` off it gives hidden rows.

    `kernels` chooses kernels by name; None means the best of this CPU. `name` is what messages call the
    model, by default its file's name.

    Raises:
        BadModelFile: the file is damaged.
        UnsupportedModel: the file is not made for this engine.
        StageFailed: the system gives no memory or no thread.
    """

    def __init__(
        self,
        path: Path,
        config: StageConfig,
        *,
        is_last: bool = True,
        kernels: str | None = None,
        name: str | None = None,
    ) -> None:
        self._library = library()
        self._name = name or path.name
        self._config = config
        self._is_last = is_last
        self._file = _File()
        self._session = _pointer()
        self._memories: list[_Memory] = []  # of the model and of the session
        # A stage that nobody closes must not leave threads that use memory after it is freed.
        self._release = weakref.finalize(self, _release, self._file, self._session, self._memories)
        try:
            self._call("ternary_file_map", os.fsencode(path), ctypes.byref(self._file))
            self._model = self._make_model()
            self._shape = _Shape()
            self._library.ternary_model_shape(self._model, ctypes.byref(self._shape))
            self._threads = config.threads or processes.cores()
            self.description = self._make_session(kernels)
        except BaseException:
            self.close()
            raise

    def decode(self, batch: Batch) -> np.ndarray:
        """See `Stage.decode`."""
        positions = np.ascontiguousarray(batch.positions, dtype=np.int32)
        sequences = np.ascontiguousarray(batch.sequences, dtype=np.int32)
        outputs = np.ascontiguousarray(batch.outputs, dtype=np.uint8)
        inputs = np.ascontiguousarray(batch.inputs)
        if inputs.ndim == 2 and (inputs.dtype != np.float32 or inputs.shape[1] != self._shape.n_embd):
            raise StageFailed(
                f"rows are {inputs.shape[1]} x {inputs.dtype}, not {self._shape.n_embd} x float32"
            )
        width = self._shape.n_vocab if self._is_last else self._shape.n_embd
        result = np.empty((int(outputs.sum()) if self._is_last else len(batch), width), dtype=np.float32)
        lengths = {int(s): self._library.ternary_sequence_length(self._session, s) for s in set(sequences)}
        done = 0
        try:
            for first in range(0, len(batch), self._config.batch_rows):
                rows = slice(first, first + self._config.batch_rows)
                count = int(outputs[rows].sum()) if self._is_last else len(positions[rows])
                group = Batch(inputs[rows], positions[rows], sequences[rows], outputs[rows])
                self._decode_rows(group, result[done : done + count])
                done += count
        except StageFailed:
            for sequence, length in lengths.items():
                self._library.ternary_sequence_trim(self._session, sequence, length, None)
            raise
        return result

    def trim(self, sequence: int, length: int) -> None:
        """See `Stage.trim`."""
        self._call("ternary_sequence_trim", self._session, sequence, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Stage.copy`."""
        self._call("ternary_sequence_copy", self._session, source, target, length)

    def clear(self) -> None:
        """See `Stage.clear`."""
        for sequence in range(self._config.sequences):
            self.trim(sequence, 0)

    def export_sequence(self, sequence: int) -> bytes:
        """See `Stage.export_sequence`."""
        state = ctypes.create_string_buffer(
            self._library.ternary_sequence_bytes(self._session, sequence) or 1
        )
        self._call("ternary_sequence_export", self._session, sequence, state)
        return state.raw

    def import_sequence(self, sequence: int, state: bytes) -> None:
        """See `Stage.import_sequence`.

        Raises:
            StageFailed: the state is not of this slice, or does not fit; the sequence is as before.
        """
        self._call("ternary_sequence_import", self._session, sequence, state, len(state))

    def close(self) -> None:
        """See `Stage.close`; closing twice is harmless."""
        self._release()

    def _make_model(self) -> ctypes.c_void_p:
        file, model = ctypes.byref(self._file), _pointer()
        memory = _Memory(self._library.ternary_model_bytes(file))
        self._memories.append(memory)
        self._call("ternary_model_make", memory.address, file, ctypes.byref(model))
        return model

    def _make_session(self, kernels: str | None) -> StageDescription:
        config = self._config
        native = _Config(
            context=config.context,
            sequences=config.sequences,
            batch_rows=config.batch_rows,
            threads=self._threads,
            logits=self._is_last,
            kernels=kernels and kernels.encode(),
            cache=config.kv_cache.encode(),
        )
        kv_bytes = ctypes.c_size_t()
        nbytes = self._library.ternary_session_bytes(
            self._model, ctypes.byref(native), ctypes.byref(kv_bytes)
        )
        memory = _Memory(nbytes)
        self._memories.append(memory)
        self._call(
            "ternary_session_make",
            *(memory.address, self._model, ctypes.byref(native), ctypes.byref(self._session)),
        )
        return StageDescription(
            architecture=self._shape.architecture.decode(),
            layers=self._shape.layers,
            is_last=self._is_last,
            n_embd=self._shape.n_embd,
            n_vocab=self._shape.n_vocab,
            build=BUILD,
            weights_bytes=self._shape.weights_bytes,
            kv_bytes=kv_bytes.value,
            scratch_bytes=nbytes - kv_bytes.value,
            threads=self._threads,
            devices=("CPU",),
        )

    def _decode_rows(self, batch: Batch, result: np.ndarray) -> None:
        """Decode at most `batch_rows` rows, contiguous and of native's types, into `result`."""
        native = _Batch(
            rows=len(batch),
            positions=batch.positions.ctypes.data,
            sequences=batch.sequences.ctypes.data,
            outputs=batch.outputs.ctypes.data,
        )
        inputs = batch.inputs
        if inputs.ndim == 2:
            native.embeddings = inputs.ctypes.data
        else:
            inputs = np.ascontiguousarray(inputs, dtype=np.int32)
            native.tokens = inputs.ctypes.data
        self._call("ternary_decode", self._session, ctypes.byref(native), result.ctypes.data)

    def _call(self, name: str, *arguments: object) -> None:
        error = _Error()
        status = getattr(self._library, name)(*arguments, ctypes.byref(error))
        if status != 0:
            raise _FAILURES[status](f"{self._name}: {error.text.decode(errors='replace')}.")


def _release(file: _File, session: ctypes.c_void_p, memories: list["_Memory"]) -> None:
    """End the session, then free what its threads used."""
    if session:
        library().ternary_session_end(session)
    memories.clear()
    library().ternary_file_unmap(ctypes.byref(file))


class _Memory:
    """`nbytes` bytes at an aligned address. Pages that are never touched cost nothing.

    Huge pages would make a token after 4,000 others 6 % faster, but then a cache that is little used would
    take all of its memory.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
