"""The C tokenizer for tests: built by the machine's C compiler, called through ctypes.

`Source` is what a caller takes from a GGUF's metadata; `Tokenizer` is native/include/tokenizer.h in Python.
"""

import ctypes
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-pedantic")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
OK, BAD_FILE, UNSUPPORTED, REFUSED, NO_ROOM = range(5)  # tokenizer_status
CONTROL_FLAG, ENDS_FLAG = 1, 2
UNSET = -1


def sources() -> list[str]:
    """The tokenizer's C files."""
    return sorted(map(str, (NATIVE / "src" / "tokenizer").glob("*.c")))


def compile_c(arguments: list[str], output: Path) -> Path:
    """Compile with every warning an error. The compiler is `cc`, or what CC says."""
    compiler = os.environ.get("CC", "cc")
    assert shutil.which(compiler), f"{compiler} is missing; the tests need a C compiler"
    command = [compiler, *WARNINGS, f"-I{NATIVE / 'include'}", *arguments, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def strings(array: list[bytes]) -> bytes:
    """An array of strings as a GGUF file holds it."""
    return b"".join(struct.pack("<Q", len(each)) + each for each in array)


@dataclass
class Source:
    """The keys of tokenizer.ggml.*; None where a file has none."""

    model: str
    tokens: list[bytes]
    pre: str | None = None
    scores: list[float] | None = None
    types: list[int] | None = None
    merges: list[bytes] = field(default_factory=list)
    bos: int = UNSET
    eos: int = UNSET
    unknown: int = UNSET
    add_bos: int = UNSET
    add_eos: int = UNSET
    add_space_prefix: int = UNSET
    normalises: bool = False


class Refusal(Exception):
    """A status other than OK; `text` is the library's sentence, if it gave one."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


class _Strings(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char_p), ("nbytes", ctypes.c_size_t), ("count", ctypes.c_uint32))


class _Source(ctypes.Structure):
    _fields_ = (
        ("model", ctypes.c_char_p),
        ("pre", ctypes.c_char_p),
        ("tokens", _Strings),
        ("scores", ctypes.c_char_p),
        ("types", ctypes.c_char_p),
        ("merges", _Strings),
        *((name, ctypes.c_int32) for name in ("bos", "eos", "unknown", "add_bos", "add_eos", "prefix")),
        ("normalises", ctypes.c_bool),
    )


class _Error(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * 256),)


def load(path: Path) -> ctypes.CDLL:
    """The library, with the functions' types."""
    library = ctypes.CDLL(str(path))
    size, void = ctypes.c_size_t, ctypes.c_void_p
    for name, result, *arguments in (
        ("bytes", size, void),
        ("make", ctypes.c_int, void, size, void, void, void),
        ("scratch_bytes", size, void, size),
        ("tokens_max", size, void, size),
        ("encode", ctypes.c_int, void, ctypes.c_char_p, size, ctypes.c_uint, void, size, void, size, void),
        ("decode", ctypes.c_int, void, void, size, ctypes.c_uint, void, void, size, void),
        ("count", ctypes.c_uint32, void),
        ("bos", ctypes.c_int32, void),
        ("eos", ctypes.c_int32, void),
        ("is_control", ctypes.c_bool, void, ctypes.c_int32),
        ("named", ctypes.c_int32, void, ctypes.c_char_p, size),
    ):
        function = getattr(library, f"tokenizer_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Tokenizer:
    """A tokenizer of the library, with the memory it lives in. Raises Refusal."""

    def __init__(self, library: ctypes.CDLL, source: Source) -> None:
        self.library = library
        tokens, merges = strings(source.tokens), strings(source.merges)
        scores, types = source.scores, source.types
        self._source = _Source(
            source.model.encode(),
            source.pre.encode() if source.pre is not None else None,
            _Strings(tokens, len(tokens), len(source.tokens)),
            struct.pack(f"<{len(scores)}f", *scores) if scores is not None else None,
            struct.pack(f"<{len(types)}i", *types) if types is not None else None,
            _Strings(merges, len(merges), len(source.merges)),
            source.bos,
            source.eos,
            source.unknown,
            source.add_bos,
            source.add_eos,
            source.add_space_prefix,
            source.normalises,
        )
        self.nbytes = library.tokenizer_bytes(ctypes.byref(self._source))
        self._memory = (ctypes.c_uint64 * (self.nbytes // 8 + 1))()
        self._it = ctypes.c_void_p()
        error = _Error()
        status = library.tokenizer_make(
            self._memory, self.nbytes, ctypes.byref(self._source), ctypes.byref(self._it), ctypes.byref(error)
        )
        if status != OK:
            raise Refusal(status, error.text.decode())

    def encode(self, text: str | bytes, flags: int = 0, scratch_bytes: int | None = None) -> list[int]:
        """The ids of a text."""
        data = text.encode() if isinstance(text, str) else text
        if scratch_bytes is None:
            scratch_bytes = self.library.tokenizer_scratch_bytes(self._it, len(data))
        scratch = (ctypes.c_uint64 * (scratch_bytes // 8 + 1))()
        room = self.library.tokenizer_tokens_max(self._it, len(data))
        tokens = (ctypes.c_int32 * room)()
        count = ctypes.c_size_t()
        status = self.library.tokenizer_encode(
            self._it, data, len(data), flags, scratch, scratch_bytes, tokens, room, ctypes.byref(count)
        )
        if status != OK:
            raise Refusal(status)
        return tokens[: count.value]

    def decode(self, tokens: list[int], flags: int = 0, at_start: ctypes.c_bool | None = None) -> bytes:
        """The bytes of tokens; `at_start` is read and written."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        start = ctypes.byref(at_start) if at_start is not None else None
        count = ctypes.c_size_t()
        arguments = (self._it, ids, len(tokens), flags, start)
        room = 16 * len(tokens)
        for _ in range(2):
            data = ctypes.create_string_buffer(max(room, 1))
            status = self.library.tokenizer_decode(*arguments, data, room, ctypes.byref(count))
            if status == OK:
                return data.raw[: count.value]
            room = count.value
        raise Refusal(status)

    def text(self, tokens: list[int]) -> bytes:
        """The bytes of tokens that are a whole text."""
        return self.decode(tokens, at_start=ctypes.c_bool(True))

    def named(self, text: str) -> int:
        """The special token of that text, or -1."""
        return self.library.tokenizer_named(self._it, text.encode(), len(text.encode()))

    def is_control(self, token: int) -> bool:
        return self.library.tokenizer_is_control(self._it, token)

    @property
    def ends(self) -> tuple[int, int, int]:
        """(tokens of the vocabulary, BOS, EOS)."""
        return tuple(getattr(self.library, f"tokenizer_{name}")(self._it) for name in ("count", "bos", "eos"))


def words(library: ctypes.CDLL, split: str, text: bytes) -> list[bytes]:
    """A text cut by one of the library's inner pre-tokenizers, such as `word_of_gpt2`."""
    word_end = library[split]
    word_end.restype, word_end.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p)
    buffer = ctypes.create_string_buffer(text, len(text))
    at = start = ctypes.addressof(buffer)
    cut = []
    while at < start + len(text):
        stop = word_end(at, start + len(text))
        cut.append(text[at - start : stop - start])
        at = stop
    return cut


def case(source: Source, text: bytes) -> bytes:
    """A vocabulary and a text as tests/native/tokenizer_fuzz.c reads them."""
    parts = (
        source.model.encode() + b"\0",
        (source.pre or "").encode() + b"\0",
        strings(source.tokens),
        struct.pack(f"<{len(source.scores)}f", *source.scores) if source.scores else b"",
        struct.pack(f"<{len(source.types)}i", *source.types) if source.types else b"",
        strings(source.merges),
        text,
    )
    counts = struct.pack("<II", len(source.tokens), len(source.merges))
    return counts + b"".join(struct.pack("<I", len(part)) + part for part in parts)
