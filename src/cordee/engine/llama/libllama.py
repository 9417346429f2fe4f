"""libllama through the version-matched bindings of llama-cpp-python: loaded once, checked, and quiet.

The package's low-level module brings every struct and `llama_*` function; only the few `ggml_*` functions
that it does not wrap are declared here. Struct layouts change between builds, so `load` compares the
library's defaults with the known ones before anything is run.
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cordee import children
from cordee.errors import BadModelFile, CordeeError, SetupNeeded, UnsupportedModel
from cordee.system import processes

if TYPE_CHECKING:
    from _ctypes import CFuncPtr

PACKAGE = "llama_cpp"
REINSTALL = "run `make clean setup`, or reinstall llama-cpp-python in this environment"
LOG_LINES_MAX = 100  # kept: problems, and a few buffer sizes for each device
PROBE_SECONDS = 30.0  # a healthy child answers within a second, even on a slow machine
DEVICE_KINDS = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type
WARN, ERROR = 3, 4  # enum ggml_log_level
REASON_CHARS_MAX = 400  # of libllama's own words in a message
# What libllama says of a file that is whole, but newer than itself (llama-model.cpp, llama-vocab.cpp).
LOAD_REASON = re.compile(r"error loading model: (.+?)(?:; |$)")
NEWER = re.compile(r"unknown (?:model architecture|pre-tokenizer type|tokenizer)\b")
BUFFER_LINE = re.compile(r"\b(model|KV|compute|output) buffer size = +([0-9.]+) MiB")

# Defaults as llama_model_default_params and llama_context_default_params of llama.cpp set them: if the layout
# of a struct has changed, some field shows another value.
MODEL_DEFAULTS = {
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}


@dataclass(frozen=True)
class LlamaDevice:
    """A device that the installed libllama can compute on; bytes as its driver reports them."""

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    handle: int


class Log:
    """The relevant lines of libllama's log since `clear`: problems and buffer sizes."""

    def __init__(self) -> None:
        self._problems: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._buffers: deque[tuple[str, int]] = deque(maxlen=LOG_LINES_MAX)
        self._partial = ""

    def write(self, level: int, text: str) -> None:
        """Take text of a level as libllama gives it: parts of lines, or several lines."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if level in (WARN, ERROR):
                self._problems.append(line.strip())
            elif match := BUFFER_LINE.search(line):
                self._buffers.append((match[1], round(float(match[2]) * 2**20)))

    def clear(self) -> None:
        """Forget what was written so far."""
        self._problems.clear()
        self._buffers.clear()

    def problems(self) -> str:
        """The warnings and errors, each once, in one line."""
        return "; ".join(dict.fromkeys(self._problems))

    def buffer_bytes(self, kind: str) -> int:
        """The bytes of all buffers of a kind: model, KV, compute or output."""
        return sum(nbytes for name, nbytes in self._buffers if name == kind)


log = Log()
_callbacks: list[object] = []  # ctypes keeps no reference to a callback


@cache
def load() -> ModuleType:
    """Load libllama, route its log into `log`, check the bindings; gives the bindings' low-level module.

    Raises:
        SetupNeeded: the library is missing, does not load, or does not match the bindings.
    """
    try:
        library = _low_level()
    except (ImportError, OSError, RuntimeError) as error:
        raise SetupNeeded(f"libllama does not load ({error}): {REINSTALL}") from error

    @library.llama_log_callback
    def write(level: int, text: bytes, _: object) -> None:
        log.write(level, text.decode("utf-8", "replace"))

    _callbacks.append(write)
    library.llama_log_set(write, ctypes.c_void_p())
    _check_defaults(library)
    _load_backends(library)
    library.llama_backend_init()
    return library


def _load_backends(library: ModuleType) -> None:
    """Where ggml was built with backends of their own (GGML_BACKEND_DL): the best for this CPU, and GPUs."""
    from llama_cpp._ctypes_extensions import load_shared_library

    registry = load_shared_library("ggml", library._base_path)
    if not registry.ggml_backend_reg_count():
        registry.ggml_backend_load_all_from_path(os.fsencode(library._base_path))


def _low_level() -> ModuleType:
    """The package's low-level module without the package's own start.

    That imports an engine and a server of its own: 0.1 s and 23 MB in each process, none of it used here.
    """
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None:
            raise ImportError("llama-cpp-python is not installed")
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)  # and not executed
    return importlib.import_module(f"{PACKAGE}.llama_cpp")


def reason() -> str:
    """Why something failed, in libllama's words."""
    return log.problems()[:REASON_CHARS_MAX] or "libllama gives no reason"


def load_model(path: Path, params: "ctypes.Structure", name: str) -> int:
    """A model's handle, to be freed by `llama_model_free`; `name` is what people call it.

    Raises:
        BadModelFile: libllama does not load the file.
        UnsupportedModel: it does not know this kind of model yet.
    """
    log.clear()
    model = load().llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise load_error(name)
    return model


def load_error(name: str) -> CordeeError:
    """The error for a model of that name that libllama has just refused to load: too new, or damaged."""
    found = LOAD_REASON.search(log.problems())
    why = found[1][:REASON_CHARS_MAX] if found else reason()
    if NEWER.search(why):
        return UnsupportedModel(
            f"{name} is of a kind that this program does not know yet ({why}): update cordee, or choose "
            "another model"
        )
    return BadModelFile(f"libllama cannot load {name} ({why}): fetch the file again, or update cordee")


def _check_defaults(library: ModuleType) -> None:
    found = (
        (library.llama_model_default_params(), MODEL_DEFAULTS),
        (library.llama_context_default_params(), CONTEXT_DEFAULTS),
    )
    for params, expected in found:
        for name, value in expected.items():
            if getattr(params, name, None) != value:
                raise SetupNeeded(
                    f"libllama's default {name} is {getattr(params, name, 'missing')}, not {value}: "
                    f"the bindings do not match the library; {REINSTALL}"
                )


class Ggml:
    """The `ggml_*` functions that the package does not wrap, with their argument types."""

    def __init__(self, library: ModuleType) -> None:
        from llama_cpp._ctypes_extensions import load_shared_library

        base, registry = (load_shared_library(name, library._base_path) for name in ("ggml-base", "ggml"))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        sizes = ctypes.POINTER(size)
        self.tensor_name = _declared(base, "ggml_get_name", ctypes.c_char_p, pointer)
        self.tensor_nbytes = _declared(base, "ggml_nbytes", size, pointer)
        self.tensor_get = _declared(base, "ggml_backend_tensor_get", None, pointer, pointer, size, size)
        self.device_count = _declared(registry, "ggml_backend_dev_count", size)
        self.device_get = _declared(registry, "ggml_backend_dev_get", pointer, size)
        self.device_name = _declared(base, "ggml_backend_dev_name", ctypes.c_char_p, pointer)
        self.device_description = _declared(base, "ggml_backend_dev_description", ctypes.c_char_p, pointer)
        self.device_type = _declared(base, "ggml_backend_dev_type", ctypes.c_int, pointer)
        self.device_memory = _declared(base, "ggml_backend_dev_memory", None, pointer, sizes, sizes)


def _declared(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> "CFuncPtr":
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


@cache
def ggml() -> Ggml:
    """The declared `ggml_*` functions.

    Raises:
        SetupNeeded: as `load`, or a function is missing from the library.
    """
    try:
        return Ggml(load())
    except (AttributeError, OSError, FileNotFoundError) as error:
        raise SetupNeeded(
            f"this libllama lacks a function that stages need ({error}): {REINSTALL}"
        ) from error


def devices() -> list[LlamaDevice]:
    """Every device that the installed library can compute on, including the CPU, with its memory."""
    functions = ggml()
    found: list[LlamaDevice] = []
    for index in range(functions.device_count()):
        handle = functions.device_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        functions.device_memory(handle, ctypes.byref(free), ctypes.byref(total))
        kind: int = functions.device_type(handle)
        found.append(
            LlamaDevice(
                name=functions.device_name(handle).decode(),
                description=functions.device_description(handle).decode(),
                kind=DEVICE_KINDS[kind] if kind < len(DEVICE_KINDS) else "OTHER",
                free_bytes=free.value,
                total_bytes=total.value,
                handle=handle,
            )
        )
    return found


def build() -> str:
    """This build: the bindings' version and instruction sets. Stages of equal builds give equal bits."""
    features = load().llama_print_system_info().decode()
    version = importlib.metadata.version("llama-cpp-python")
    return f"llama-cpp-python {version}: {' '.join(features.replace('|', ' ').split())}"


@cache
def survives_extra_buffers() -> bool:
    """Whether this machine can use libllama's extra buffer types (AMX and repacked weights).

    Some virtual machines advertise AMX and refuse it: a native build dies there with SIGSEGV or SIGILL at its
    first tile instruction. So a child process tries it.
    """
    command = children.command("cordee.engine.llama.probe")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its cgroups' CPU quotas; at least 1."""
    return max(1, round(min(processes.cores(), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """The CPU time, in cores, that our control groups (containers) grant; infinity without a limit.

    The kernel's files: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
    https://docs.kernel.org/scheduler/sched-bwc.html. `root` is where /proc and /sys are found.
    """
    least = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, kinds, path = line.split(":", 2)
        if "cpu" in kinds.split(","):
            top, names = root / "sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        elif number == "0":
            top, names = root / "sys/fs/cgroup", ("cpu.max",)
        else:
            continue
        # Inside a container the path may be the one outside of it: then only the top folder is there.
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            quota, period, *_ = (*" ".join(_read(folder / name) for name in names).split(), "", "")
            if quota.isdigit() and period.isdigit():
                least = min(least, int(quota) / int(period))
            if folder == top:
                break
    return least


def _read(path: Path) -> str:
    """The text of a small system file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
