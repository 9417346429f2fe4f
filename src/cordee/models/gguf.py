"""Reading the header of a GGUF file: strict, bounded, and without touching the weights.

A model file is untrusted input. Every count is checked against the bytes that are really there before
anything is allocated, every tensor must lie inside its file and overlap no other, and arrays (a vocabulary
has hundreds of thousands of entries) are skipped and not decoded until someone asks for them.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from cordee.errors import BadModelFile, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# A header is read through a window of this many bytes, so its size does not matter for memory.
WINDOW_BYTES = 1 << 20
# Real models have 20 to 80 keys and up to a few thousand tensors (experts stored one by one).
KEYS_LIMIT = 4096
TENSORS_LIMIT = 65_536
# The format allows keys of 65,535 bytes; ggml keeps tensor names in 64 bytes with the terminating zero.
KEY_BYTES_LIMIT = 65_535
NAME_BYTES_LIMIT = 63
# The longest strings met are whole tokenizer files in JSON (33 MB for a vocabulary of 262,144 tokens).
STRING_BYTES_LIMIT = 64 << 20
# All plain strings of a header together: they stay in memory.
STRINGS_BYTES_LIMIT = 128 << 20
# Twenty times the largest vocabulary met; the merges of a tokenizer are fewer than 600,000.
ARRAY_ITEMS_LIMIT = 5_000_000
# libllama's own limit (LLAMA_MAX_LAYERS).
LAYERS_LIMIT = 512
# The largest alignment that makes sense is a huge page.
ALIGNMENT_LIMIT = 2 << 20
DIMENSIONS_LIMIT = 4  # GGML_MAX_DIMS
BYTES_LIMIT = 1 << 63  # sizes and offsets must fit a signed 64-bit integer
# A set of this many files of 50 GB each is beyond any published model.
SHARDS_LIMIT = 1000

SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_U32, _U64 = SCALARS[GGUFValueType.UINT32], SCALARS[GGUFValueType.UINT64]
# Names of tensors of a layer; they have at most 63 bytes, so the number stays small.
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

FETCH_AGAIN = "fetch the file again"
CONVERT_AGAIN = "convert the model again with a current program"

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Array:
    """An array in the metadata, still in the file: `count` items of `type` in `nbytes` bytes at `offset`."""

    type: GGUFValueType
    count: int
    path: Path
    offset: int
    nbytes: int

    def __len__(self) -> int:
        return self.count

    def raw(self) -> bytes:
        """The bytes of the items, as they are in the file."""
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), self.nbytes, self.offset)
        except OSError as error:
            raise BadModelFile(f"{self.path} cannot be read ({error.strerror}).") from error
        if len(data) != self.nbytes:
            raise BadModelFile(f"{self.path} became shorter while it was in use: {FETCH_AGAIN}.")
        return data

    def values(self) -> list[Scalar]:
        """The items as plain values.

        Raises:
            BadModelFile: the file changed or went away, or a string is not UTF-8.
        """
        data = self.raw()
        if self.type is not GGUFValueType.STRING:
            return np.frombuffer(data, dtype="<" + SCALARS[self.type].format[1:]).tolist()
        items: list[Scalar] = []
        at = 0
        try:
            for _ in range(self.count):
                end = at + 8 + _U64.unpack_from(data, at)[0]
                items.append(data[at + 8 : end].decode())
                at = end
        except (UnicodeDecodeError, struct.error) as error:
            raise BadModelFile(f"{self.path}: a string of an array is not UTF-8: {CONVERT_AGAIN}.") from error
        return items


Value = Scalar | Array


class BitnetType(IntEnum):
    """Types that bitnet.cpp added to ggml's; libllama loads none of them. See `convert/gguf_source.py`."""

    I2_S = 36


TensorType = GGMLQuantizationType | BitnetType

# I2_S packs weights in blocks of I2_BLOCK; after the last block come I2_TAIL_BYTES with the scale.
I2_BLOCK, I2_TAIL_BYTES = 128, 32


@dataclass(frozen=True)
class Tensor:
    """A tensor and where its bytes are. `shape` is in ggml's order, fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    path: Path
    offset: int  # absolute in `path`
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All of a model file (or a set of shards) but the weights.

    `layers` counts the layers that a token passes. `extra_layers` counts those for multi-token prediction,
    which libllama keeps after them and does not run in plain generation.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Value]
    types: Mapping[str, GGUFValueType]
    tensors: tuple[Tensor, ...]
    layers: int
    extra_layers: int
    alignment: int
    nbytes: int  # of the header itself, in the first file, without the padding after it
    _by_name: Mapping[str, Tensor] = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tied(self) -> bool:
        """Whether the head uses the token embedding's weights."""
        return "output.weight" not in self._by_name

    def tensor(self, name: str) -> Tensor | None:
        return self._by_name.get(name)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key, of whatever type the file gives it.

        A key that starts with '.' gets the architecture's prefix.
        """
        value = self.metadata.get(self.architecture + key if key.startswith(".") else key, default)
        return value.values() if isinstance(value, Array) else value


def read_header(path: Path, *, weights: bool = True) -> Header:
    """Read the header of a GGUF file; of a sharded set when `path` is its first shard.

    Memory stays below a few MiB plus the plain strings of the header. With `weights` off the files may end
    anywhere after their headers: the tensors then say where they are in the whole file.

    Raises:
        BadModelFile: no such file, not GGUF, damaged, or its sizes are wrong; names file and fault.
    """
    path = Path(path)
    first = _read_shard(path, weights)
    shards = [first, *_other_shards(path, first.metadata, weights)]
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors):
        raise BadModelFile(f"{path}: two shards hold the same tensor: {FETCH_AGAIN}.")
    expected = first.metadata.get("split.tensors.count")
    if len(shards) > 1 and expected is not None and expected != len(tensors):
        raise BadModelFile(f"{path}: the shards hold {len(tensors)} tensors, not {expected}: {FETCH_AGAIN}.")
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadModelFile(f"{path} does not say its architecture (general.architecture): {CONVERT_AGAIN}.")
    blocks, extra = _layer_counts(path, architecture, first.metadata)
    for tensor in tensors:
        block = BLOCK.match(tensor.name)
        if block and int(block[1]) >= blocks:
            raise BadModelFile(f"{path} has {blocks} layers, but holds {tensor.name}: {CONVERT_AGAIN}.")
    return Header(
        path,
        architecture,
        MappingProxyType(first.metadata),
        MappingProxyType(first.types),
        tensors,
        blocks - extra,
        extra,
        first.alignment,
        first.nbytes,
        by_name,
    )


def engine_of(header: Header) -> Literal["llama", "ternary"]:
    """The engine that a model's file is made for.

    Raises:
        UnsupportedModel: the file is in bitnet.cpp's own format.
    """
    if any(isinstance(tensor.type, BitnetType) for tensor in header.tensors):
        raise UnsupportedModel(
            f"{header.path.name} is in bitnet.cpp's I2_S, which no engine here runs as it is: `cordee pull` "
            "converts it for the ternary engine."
        )
    return "ternary" if "cordee.ternary.version" in header.metadata else "llama"


def has_header(path: Path) -> bool:
    """Whether a file, which may be one of a set of shards, begins with a complete and valid header."""
    try:
        _read_shard(path, weights=False)
    except BadModelFile:
        return False
    return True


def _layer_counts(path: Path, architecture: str, metadata: Mapping[str, Value]) -> tuple[int, int]:
    """Number of layers, and how many of them at the end are for multi-token prediction."""
    key = f"{architecture}.block_count"
    blocks = metadata.get(key)
    if blocks is None:
        raise BadModelFile(f"{path} has no {key}: it is no language model; choose the model's main file.")
    extra = metadata.get(f"{architecture}.nextn_predict_layers", 0)
    if type(blocks) is not int or not 1 <= blocks <= LAYERS_LIMIT:
        raise BadModelFile(f"{path}: {key} is {blocks}, not 1 to {LAYERS_LIMIT}: {CONVERT_AGAIN}.")
    if type(extra) is not int or not 0 <= extra < blocks:
        raise BadModelFile(f"{path}: nextn_predict_layers is {extra} of {blocks} layers: {CONVERT_AGAIN}.")
    return blocks, extra


def _other_shards(path: Path, metadata: Mapping[str, Value], weights: bool) -> list["_Shard"]:
    """Shards 2 to N of the set whose first shard is `path`."""
    count = metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return []
    match = _SHARD_NAME.fullmatch(path.name)
    if count > SHARDS_LIMIT or not match or int(match["count"]) != count:
        raise BadModelFile(f"{path} is one of {count} shards but is not named like one: restore its name.")
    if metadata.get("split.no", 0) != 0 or int(match["number"]) != 1:
        raise BadModelFile(f"{path} is not the first of its {count} shards: give {match['stem']}-00001-of-….")
    names = (f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(2, count + 1))
    return [_read_shard(path.with_name(name), weights) for name in names]


@dataclass(frozen=True)
class _Shard:
    """The header of one file; a model that is not sharded has one."""

    metadata: dict[str, Value]
    types: dict[str, GGUFValueType]
    tensors: list[Tensor]
    alignment: int
    nbytes: int


def _read_shard(path: Path, weights: bool) -> _Shard:
    try:
        with path.open("rb", buffering=0) as file:
            return _parse(_Reader(path, file), weights)
    except OSError as error:
        raise BadModelFile(
            f"{path} cannot be read ({error.strerror}): check its name and permissions."
        ) from error


def _parse(reader: "_Reader", weights: bool) -> _Shard:
    keys, tensors = _preamble(reader)
    metadata: dict[str, Value] = {}
    types: dict[str, GGUFValueType] = {}
    for _ in range(keys):
        key = reader.string("key", KEY_BYTES_LIMIT)
        if not key:
            reader.fail("has a key without a name")
        if key in metadata:
            reader.fail(f"has the key {key!r} twice", CONVERT_AGAIN)
        types[key] = reader.value_type(key)
        metadata[key] = reader.value(key, types[key])
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= ALIGNMENT_LIMIT or alignment & (alignment - 1):
        reader.fail(f"has the alignment {alignment}, not a power of two", CONVERT_AGAIN)
    listed = [_tensor_info(reader) for _ in range(tensors)]
    nbytes = reader.position
    start = -(-nbytes // alignment) * alignment
    end = reader.size if weights else BYTES_LIMIT
    return _Shard(metadata, types, _placed(reader, listed, start, end, alignment), alignment, nbytes)


def _preamble(reader: "_Reader") -> tuple[int, int]:
    """Magic, version and the two counts: (keys, tensors)."""
    if reader.size == 0:
        reader.fail("is empty")
    if reader.size < 24 or reader.take(4) != MAGIC:
        reader.fail("is not a GGUF model file", "choose a file that ends in .gguf, or fetch it again")
    version = reader.u32()
    if version and version & 0xFFFF == 0:
        reader.fail("is stored big endian", "fetch or convert a little-endian one")
    if version not in VERSIONS:
        reader.fail(f"has GGUF version {version}; versions 2 and 3 are known", CONVERT_AGAIN)
    tensors, keys = reader.u64(), reader.u64()
    # The shortest tensor entry takes 33 bytes, the shortest key 14.
    if tensors > TENSORS_LIMIT or keys > KEYS_LIMIT or tensors * 33 + keys * 14 > reader.size:
        reader.fail(f"claims {tensors} tensors and {keys} keys, more than it can hold")
    return keys, tensors


@dataclass(frozen=True)
class _Listed:
    """A tensor as the header lists it: `offset` counts from the end of the header."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


def _tensor_info(reader: "_Reader") -> _Listed:
    name = reader.string("tensor name", NAME_BYTES_LIMIT)
    dimensions = reader.u32()
    if not name or not 1 <= dimensions <= DIMENSIONS_LIMIT:
        reader.fail(f"has a tensor {name!r} of {dimensions} dimensions")
    shape = tuple(reader.u64() for _ in range(dimensions))
    number, offset = reader.u32(), reader.u64()
    if 0 in shape or prod(shape) >= BYTES_LIMIT:
        reader.fail(f"claims an impossible shape {shape} for {name!r}")
    if number == BitnetType.I2_S:
        if prod(shape) % I2_BLOCK:
            reader.fail(
                f"stores {name!r} as I2_S, but its {prod(shape)} weights do not fill blocks of {I2_BLOCK}"
            )
        return _Listed(name, shape, BitnetType.I2_S, offset, prod(shape) // 4 + I2_TAIL_BYTES)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        reader.fail(f"stores {name!r} as type {number}, which is unknown", "choose another quantization")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[0] % block:
        reader.fail(f"stores {name!r} as {kind.name} in rows of {shape[0]}, not a multiple of {block}")
    return _Listed(name, shape, kind, offset, prod(shape) // block * block_bytes)


def _placed(reader: "_Reader", listed: list[_Listed], start: int, end: int, alignment: int) -> list[Tensor]:
    """Check that names are unique and that every tensor is aligned, ends by `end` and overlaps no other."""
    if len({tensor.name for tensor in listed}) != len(listed):
        reader.fail("holds two tensors of one name", CONVERT_AGAIN)
    for tensor in listed:
        if tensor.offset % alignment:
            reader.fail(f"places {tensor.name!r} at {tensor.offset}, not aligned to {alignment}")
        if (wanted := start + tensor.offset + tensor.nbytes) > end:
            reader.fail(
                f"has {reader.size:,} bytes, but {tensor.name!r} would end at {wanted:,}: it is cut short"
            )
    for one, other in pairwise(sorted(listed, key=lambda tensor: tensor.offset)):
        if one.offset + one.nbytes > other.offset:
            reader.fail(f"places {one.name!r} and {other.name!r} on the same bytes")
    return [Tensor(t.name, t.shape, t.type, reader.path, start + t.offset, t.nbytes) for t in listed]


class _Reader:
    """A window that slides over the file; it knows what is left and names the file in its errors."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._window = b""
        self._window_at = 0  # where in the file the window starts
        self._at = 0  # where in the window the next byte is
        self._strings_bytes = 0

    @property
    def position(self) -> int:
        return self._window_at + self._at

    def fail(self, fault: str, remedy: str = FETCH_AGAIN) -> NoReturn:
        raise BadModelFile(f"{self.path} {fault}: {remedy}.")

    def take(self, count: int) -> bytes:
        """The next `count` bytes, which the caller has bounded; fails at the end of the file."""
        if self._at + count > len(self._window):
            self._slide(count)
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def skip(self, count: int) -> None:
        if count > self.size - self.position:
            self.fail("ends in the middle of its header")
        self._at += count

    def u32(self) -> int:
        return _U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        return _U64.unpack(self.take(8))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.u64()
        if length > limit:
            self.fail(f"has a {what} of {length:,} bytes, more than {limit:,}")
        self._strings_bytes += length
        if self._strings_bytes > STRINGS_BYTES_LIMIT:
            self.fail(f"has more than {STRINGS_BYTES_LIMIT:,} bytes of text in its header")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail(f"has a {what} that is not UTF-8 text")

    def value_type(self, key: str) -> GGUFValueType:
        number = self.u32()
        try:
            return GGUFValueType(number)
        except ValueError:
            self.fail(f"stores {key!r} as value type {number}, which does not exist")

    def value(self, key: str, kind: GGUFValueType) -> Value:
        if kind is GGUFValueType.STRING:
            return self.string(f"text for {key!r}", STRING_BYTES_LIMIT)
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        scalar = SCALARS[kind]
        return scalar.unpack(self.take(scalar.size))[0]

    def _array(self, key: str) -> Array:
        kind, count = self.value_type(key), self.u64()
        if kind is GGUFValueType.ARRAY:
            self.fail(f"stores {key!r} as an array of arrays, which no known model has")
        item_bytes = 8 if kind is GGUFValueType.STRING else SCALARS[kind].size
        if count > ARRAY_ITEMS_LIMIT or count * item_bytes > self.size - self.position:
            self.fail(f"claims {count:,} items in {key!r}, more than it can hold")
        offset = self.position
        if kind is GGUFValueType.STRING:
            self._skip_strings(count)
        else:
            self.skip(count * item_bytes)
        return Array(kind, count, self.path, offset, self.position - offset)

    def _skip_strings(self, count: int) -> None:
        """Skip length-prefixed strings. A tight loop: a header has up to a million of them."""
        unpack = _U64.unpack_from
        window, at, safe = self._window, self._at, len(self._window) - 8
        for _ in range(count):
            if at > safe:
                self._at = at
                self._slide(8)
                window, at, safe = self._window, self._at, len(self._window) - 8
            at += 8 + unpack(window, at)[0]
        self._at = at
        if self.position > self.size:
            self.fail("ends in the middle of its header")

    def _slide(self, count: int) -> None:
        """Move the window to the next byte; it then holds at least `count` bytes."""
        position = self.position
        if count > self.size - position:
            self.fail("ends in the middle of its header")
        wanted = min(max(count, WINDOW_BYTES), self.size - position)
        self._window = os.pread(self._file.fileno(), wanted, position)
        self._window_at, self._at = position, 0
        if len(self._window) < count:
            self.fail("became shorter while it was read")
