"""A `Stage` on stock libllama: a slice with its KV cache; hidden rows in, hidden rows or logits out.

How a slice becomes a stage (each point was found by experiment; the golden tests check it):

- Hidden rows enter through `llama_batch.embd` and leave through the graph's evaluation callback
  (native/capture.c), which asks for the tensor `l_out-<last layer>` only and ends the graph there, before the
  final norm and the head. `l_out` is a convention of the model graphs, not an API: `_require_capture` checks
  it.
- Every row of a stage before the last is marked as an output: otherwise libllama drops the others in its
  last layer.
- A decode call must be one micro-batch inside libllama, or rows come out in several captures. With a KV
  cache per sequence libllama takes rows of consecutive sequence numbers with equally many rows each in one
  micro-batch, so `_groups` splits a batch accordingly. A cache per sequence keeps a sequence's cells in order
  of position whatever other sequences do, which a shared cache does not, and sums depend on that order.

What makes a row's bits independent of its batch (`StageConfig.batch_invariant`), on the CPU:

- Flash attention on, K in f16 and V in bf16. With equal types ggml computes 64 and more query rows by
  tiles and a single one over 512 cells split by threads, each with other roundings; with unequal types
  every row takes the plain path. That path also accumulates in f32, where f16 V accumulates in f16.
- `GGML_CPU_TILED_MM=0` (set by the parent process) keeps K-quants off a kernel for 8 and more rows.
- Types that take llamafile's kernels (f32, f16, bf16, Q4_0 with some shapes) can still differ: the service
  measures each model once (serving/batch_invariance.py).
"""

import ctypes
from pathlib import Path

import numpy as np

from cordee.engine.llama import libllama
from cordee.engine.llama.batch import NativeBatch
from cordee.engine.llama.capture import Capture
from cordee.engine.stage import Batch, StageConfig, StageDescription
from cordee.errors import StageFailed, UnsupportedModel

TYPE_F16, TYPE_BF16 = 1, 30  # enum ggml_type
FLASH_ATTENTION_ON = 1  # enum llama_flash_attn_type
NO_MEMORY_SLOT = 1  # llama_decode: no room in the KV cache


class LlamaStage:
    """A loaded slice; see `cordee.engine.stage.Stage`. With `is_last` off it gives hidden rows.

    `extra_buffers` allows AMX and repacked weights; None allows them if the stage need not be batch-invariant
    and a probe shows that they work. `name` is what messages call the model, by default its file's name.

    Raises:
        BadModelFile: libllama does not load the file.
        UnsupportedModel: libllama does not know this kind of model yet, the model has no KV cache per
            position, or its graph does not show a layer's output.
        StageFailed: the context could not be created, nearly always for lack of memory.
    """

    def __init__(
        self,
        path: Path,
        config: StageConfig,
        *,
        is_last: bool = True,
        extra_buffers: bool | None = None,
        name: str | None = None,
    ) -> None:
        self._name = name or path.name
        if config.kv_cache != "f16":
            raise StageFailed(f"{self._name}: the llama engine keeps its cache as f16, not {config.kv_cache}")
        if extra_buffers is None:
            extra_buffers = not config.batch_invariant and libllama.survives_extra_buffers()
        self._library = libllama.load()
        self._config = config
        self._is_last = is_last
        self._capture: Capture | None = None
        self._context = None
        self._devices = _chosen_devices(config.devices)
        self._model = self._load_model(path, extra_buffers)
        try:
            self._layers = self._library.llama_model_n_layer(self._model)
            self._n_embd = self._library.llama_model_n_embd(self._model)
            vocabulary = self._library.llama_model_get_vocab(self._model)
            self._n_vocab = self._library.llama_vocab_n_tokens(vocabulary)
            self._logits_type = ctypes.c_float * self._n_vocab
            if not is_last:
                self._capture = Capture(b"l_out-%d" % (self._layers - 1), config.batch_rows, self._n_embd)
            self._context = self._make_context()
            self._batch = NativeBatch(self._library, config.batch_rows, self._n_embd)
            self._memory = self._library.llama_get_memory(self._context)
            if not self._memory:
                raise UnsupportedModel(
                    f"{self._name} keeps no state between tokens: it does not generate text"
                )
            self.description = self._describe()
            if not is_last:
                self._require_capture()
        except BaseException:
            self.close()
            raise

    def decode(self, batch: Batch) -> np.ndarray:
        """See `Stage.decode`.

        Raises:
            StageFailed: libllama refused the batch; the rows' positions are removed from the KV cache.
        """
        groups = _groups(batch, self._config.batch_rows)
        try:
            if groups is None:
                return self._decode_group(batch)
            results = [self._decode_group(_picked(batch, rows)) for rows in groups]
        except StageFailed:
            self._undo(batch)
            raise
        selected = np.flatnonzero(batch.outputs) if self._is_last else np.arange(len(batch))
        joined = np.empty((len(selected), results[0].shape[1]), dtype=np.float32)
        for rows, result in zip(groups, results, strict=True):
            given = rows[batch.outputs[rows]] if self._is_last else rows
            joined[np.searchsorted(selected, given)] = result
        return joined

    def trim(self, sequence: int, length: int) -> None:
        """See `Stage.trim`."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            self._library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            raise StageFailed(
                f"this model cannot shorten a sequence to {length} tokens; the sequence was forgotten"
            )

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Stage.copy`.

        libllama copies between caches of two sequences only whole, cell by cell at the same places, and when
        the next rows are decoded. That is a matter of memory bandwidth: the whole of a cache costs as much as
        computing a hundredth of it. Where a sequence ends beyond `length` the rest is removed at once.
        """
        if source == target or self._length(source) < length:
            raise StageFailed(f"sequence {source} has no {length} positions that {target} could get")
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.trim(target, length)

    def clear(self) -> None:
        """See `Stage.clear`."""
        self._library.llama_memory_clear(self._memory, False)  # cells without a sequence are never read

    def export_sequence(self, sequence: int) -> bytes:
        """See `Stage.export_sequence`."""
        size = self._library.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._library.llama_state_seq_get_data(self._context, buffer, size, sequence)
        if written == 0:
            raise StageFailed(f"libllama gave no state of sequence {sequence}")
        return bytes(memoryview(buffer)[:written])

    def import_sequence(self, sequence: int, state: bytes) -> None:
        """See `Stage.import_sequence`.

        Raises:
            StageFailed: the state is not of this slice, or does not fit.
        """
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._library.llama_state_seq_set_data(self._context, buffer, len(state), sequence):
            self.trim(sequence, 0)
            raise StageFailed(f"the state for sequence {sequence} is of another slice, or does not fit")

    def close(self) -> None:
        """See `Stage.close`; closing twice is harmless."""
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = None

    def _load_model(self, path: Path, extra_buffers: bool) -> int:
        params = self._library.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        params.n_gpu_layers = -1 if self._config.devices else 0
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        return libllama.load_model(path, params, self._name)

    def _make_context(self) -> int:
        config = self._config
        params = self._library.llama_context_default_params()
        params.n_ctx = config.context * config.sequences
        params.n_seq_max = config.sequences
        params.n_batch = params.n_ubatch = config.batch_rows
        params.n_outputs_max = config.batch_rows if not self._is_last else config.output_rows
        params.n_threads = params.n_threads_batch = config.threads or libllama.usable_cores()
        params.kv_unified = False
        params.swa_full = True
        params.no_perf = True
        params.op_offload = bool(config.devices)
        params.flash_attn_type = FLASH_ATTENTION_ON
        params.type_k = TYPE_F16
        if self._capture is not None:
            params.cb_eval = self._library.ggml_backend_sched_eval_callback(self._capture.callback)
            params.cb_eval_user_data = self._capture.user_data
        # Models with compressed attention (MLA) keep K and V in one tensor and refuse unequal types.
        for params.type_v in (
            (TYPE_BF16, TYPE_F16) if config.batch_invariant and not config.devices else (TYPE_F16,)
        ):
            context = self._library.llama_init_from_model(self._model, params)
            if context:
                return context
        raise StageFailed(
            f"no context of {config.sequences} x {config.context} tokens for {self._name} "
            f"({libllama.reason()}): choose a smaller --context"
        )

    def _describe(self) -> StageDescription:
        log = libllama.log
        buffer = ctypes.create_string_buffer(128)
        self._library.llama_model_meta_val_str(self._model, b"general.architecture", buffer, len(buffer))
        return StageDescription(
            architecture=buffer.value.decode(),
            layers=self._layers,
            is_last=self._is_last,
            n_embd=self._n_embd,
            n_vocab=self._n_vocab,
            build=libllama.build(),
            weights_bytes=log.buffer_bytes("model"),
            kv_bytes=log.buffer_bytes("KV"),
            scratch_bytes=log.buffer_bytes("compute") + log.buffer_bytes("output"),
            threads=self._config.threads or libllama.usable_cores(),
            devices=self._config.devices or ("CPU",),
            can_trim=not (
                self._library.llama_model_is_recurrent(self._model)
                or self._library.llama_model_is_hybrid(self._model)
            ),
        )

    def _require_capture(self) -> None:
        one = np.zeros(1, dtype=np.int32)
        row = np.zeros((1, self._n_embd), dtype=np.float32)
        try:
            self.decode(Batch(row, one, one, np.ones(1, dtype=bool)))
        except StageFailed as error:
            raise UnsupportedModel(
                f"{self._name}: this libllama does not show where a layer of {self.description.architecture} "
                f"ends ({error}), so the model runs only uncut"
            ) from error
        self.clear()

    def _decode_group(self, batch: Batch) -> np.ndarray:
        native = self._batch.fill(batch, all_outputs=not self._is_last)
        if self._capture is not None:
            self._capture.reset()
        libllama.log.clear()
        status = self._library.llama_decode(self._context, native)
        if status != 0:
            raise StageFailed(self._reason(status))
        if self._capture is None:
            return self._logits(batch.outputs.tolist())
        captured = self._capture.copy_rows(len(batch))
        if captured is None:
            raise StageFailed(f"libllama did not give {len(batch)} hidden rows at once")
        return captured

    def _logits(self, outputs: list[bool]) -> np.ndarray:
        """A copy of the logits of the rows that are outputs.

        The weights have just filled the CPU's caches, so all Python between two tokens is cold: each call of
        numpy costs 10 to 40 µs here; a token of a small model takes 8,000 µs.
        """
        rows: list[np.ndarray] = []
        for row, wanted in enumerate(outputs):
            if wanted:
                found = self._library.llama_get_logits_ith(self._context, row)
                if not found:
                    raise StageFailed(f"libllama has no logits of row {row}: {libllama.reason()}")
                address = ctypes.addressof(found.contents)
                rows.append(np.frombuffer(self._logits_type.from_address(address), np.float32))
        return np.array(rows, dtype=np.float32).reshape(-1, self._n_vocab)

    def _length(self, sequence: int) -> int:
        return self._library.llama_memory_seq_pos_max(self._memory, sequence) + 1

    def _undo(self, batch: Batch) -> None:
        for sequence in np.unique(batch.sequences):
            first = int(batch.positions[batch.sequences == sequence].min())
            self._library.llama_memory_seq_rm(self._memory, int(sequence), first, -1)

    def _reason(self, status: int) -> str:
        if status == NO_MEMORY_SLOT:
            return f"a sequence is longer than the context of {self._config.context} tokens"
        return f"libllama refused the batch with {status}: {libllama.reason()}"


def _chosen_devices(names: tuple[str, ...]) -> ctypes.Array[ctypes.c_void_p]:
    """A NULL-terminated list of device handles; an empty list keeps everything on the CPU.

    Raises:
        StageFailed: the installed library has no device of that name.
    """
    known = {device.name: device.handle for device in libllama.devices()} if names else {}
    missing = [name for name in names if name not in known]
    if missing:
        raise StageFailed(f"no device {missing[0]} here; this libllama has {', '.join(known)}")
    return (ctypes.c_void_p * (len(names) + 1))(*(known[name] for name in names), None)


def _picked(batch: Batch, rows: np.ndarray) -> Batch:
    return Batch(batch.inputs[rows], batch.positions[rows], batch.sequences[rows], batch.outputs[rows])


def _groups(batch: Batch, batch_rows: int) -> list[np.ndarray] | None:
    """Row indices of the decode calls that a batch takes, each one micro-batch inside libllama.

    A call has consecutive sequence numbers with equally many rows each, at most `batch_rows` in all; more
    rows of one sequence are split. None means that one call takes the batch as it is.
    """
    if len(batch) == 1:
        return None
    steps = np.diff(batch.sequences)
    if len(batch) <= batch_rows and (not steps.any() or (steps == 1).all()):
        return None
    order = np.argsort(batch.sequences, kind="stable")
    numbers, starts = np.unique(batch.sequences[order], return_index=True)
    groups: list[list[np.ndarray]] = []
    previous = None
    for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
        pieces = [rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]
        fits = groups and len(rows) * (len(groups[-1]) + 1) <= batch_rows
        if fits and number - 1 == previous and len(groups[-1][-1]) == len(rows):
            groups[-1] += pieces
        else:
            groups += [[piece] for piece in pieces]
        previous = number
    return [np.concatenate(group) for group in groups]
