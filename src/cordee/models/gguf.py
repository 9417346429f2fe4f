"""Reading the header of a GGUF file: strict, bounded, and without touching the weights.

A model file is untrusted input. Every count is checked against the bytes that are really there before
anything is allocated, every tensor must lie inside its file and overlap no other, and arrays (a vocabulary
has hundreds of thousands of entries) are skipped and not decoded until someone asks for them.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, NoReturn

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from cordee.errors import BadModelFile, UnsupportedModel
from cordee.models.metadata import CONVERT_AGAIN, FETCH_AGAIN, SCALARS, Array, Metadata, Value
from cordee.system.disk import pread

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
# A version or a type of tensors beyond the known ones, up to here, is newer than this program; ggml numbered
# 40 types in three years. Higher numbers are damage.
NEWER_LIMIT = 256

UPDATE = "update cordee"

# The presence of this key makes a file one for the ternary engine (native/FORMAT.md).
TERNARY_KEY, TERNARY_VERSION = "cordee.ternary.version", 3

# The keys of a rotated basis begin so; see `convert/rotation.py`.
PRISM = "prism."

_U32, _U64 = SCALARS[GGUFValueType.UINT32], SCALARS[GGUFValueType.UINT64]
# Names of tensors of a layer; they have at most 63 bytes, so the number stays small.
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class BitnetType(IntEnum):
    """Types that bitnet.cpp added to ggml's; libllama loads none of them. See `convert/gguf_source.py`."""

    I2_S = 36


class BlockType(IntEnum):
    """Types of one or two bits with a scale for each block, which the `gguf` package lacks or cannot decode.

    libllama loads the first two. See `blocks.py`.
    """

    Q1_0 = 41
    Q2_0 = 42
    PQ2_0 = 142
    PTQ1_0 = 143
    # No number of a file, which says 42: the makers of Ternary-Bonsai used that before llama.cpp did.
    Q2_0_OF_128 = 1042

    @property
    def block(self) -> int:
        """Weights of a block."""
        return 64 if self is BlockType.Q2_0 else 128

    @property
    def block_bytes(self) -> int:
        return {41: 18, 42: 18, 143: 28}.get(self, 34)


OF_LIBLLAMA = (BlockType.Q1_0, BlockType.Q2_0)
TensorType = GGMLQuantizationType | BitnetType | BlockType

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
class Header(Metadata):
    """All of a model file (or a set of shards) but the weights; its metadata is read as `Metadata` says.

    `layers` counts the layers that a token passes. `extra_layers` counts those for multi-token prediction,
    which libllama keeps after them and does not run in plain generation.
    """

    path: Path
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


def read_header(path: Path, *, weights: bool = True, name: str | None = None) -> Header:
    """Read the header of a GGUF file; of a sharded set when `path` is its first shard.

    Memory stays below a few MiB plus the plain strings of the header. With `weights` off the files may end
    anywhere after their headers: the tensors then say where they are in the whole file. `name` is what
    messages call the model; without one they give the file's path.

    Raises:
        BadModelFile: no such file, not GGUF, damaged, or its sizes are wrong; names file and fault.
        UnsupportedModel: it is in a form that was not known yet when this program was made.
    """
    path = Path(path)
    first = _read_shard(path, weights, name)
    shards = [first, *_other_shards(path, first, weights)]
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors):
        raise BadModelFile(f"{first.name}: two shards hold the same tensor: {FETCH_AGAIN}.")
    expected = first.count("split.tensors.count", len(tensors))
    if len(shards) > 1 and expected != len(tensors):
        raise BadModelFile(
            f"{first.name}: the shards hold {len(tensors)} tensors, not {expected}: {FETCH_AGAIN}."
        )
    if not first.architecture:
        raise BadModelFile(
            f"{first.name} does not say its architecture (general.architecture): {CONVERT_AGAIN}."
        )
    blocks, extra = _layer_counts(first)
    for tensor in tensors:
        block = BLOCK.match(tensor.name)
        if block and int(block[1]) >= blocks:
            raise BadModelFile(f"{first.name} has {blocks} layers, but holds {tensor.name}: {CONVERT_AGAIN}.")
    return Header(
        first.name,
        first.architecture,
        MappingProxyType(first.metadata),
        path,
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
        UnsupportedModel: the file is in bitnet.cpp's own format, or newer than the ternary engine.
        BadModelFile: the version of its layout is no number.
    """
    if alien := _alien(header):
        raise UnsupportedModel(
            f"{header.name} is in {alien}, which no engine here runs as it is: `cordee pull` "
            "converts it for the ternary engine."
        )
    if TERNARY_KEY not in header.metadata:
        return "llama"
    if (version := header.count(TERNARY_KEY)) > TERNARY_VERSION:
        raise UnsupportedModel(f"{header.name} has version {version} of the ternary layout: {UPDATE}.")
    return "ternary"


def _alien(header: Header) -> str | None:
    """What of a file's form is known to none of the engines."""
    if any(key.startswith(PRISM) for key in header.metadata):
        return f"a rotated basis ({PRISM}hadamard)"
    for tensor in header.tensors:
        if isinstance(tensor.type, BitnetType):
            return f"bitnet.cpp's {tensor.type.name}"
        if isinstance(tensor.type, BlockType) and tensor.type not in OF_LIBLLAMA:
            return f"the type {tensor.type.name.replace('_OF_', ' with blocks of ')}"
    return None


def has_header(path: Path, name: str) -> bool:
    """Whether a file called `name`, which may be one of a set of shards, begins with a complete header.

    Raises:
        UnsupportedModel: as `read_header` does.
    """
    try:
        _read_shard(path, False, name)
    except BadModelFile:
        return False
    return True


@dataclass(frozen=True)
class _Shard(Metadata):
    """The header of one file; a model that is not sharded has one."""

    metadata: dict[str, Value]
    types: dict[str, GGUFValueType]
    tensors: list[Tensor]
    alignment: int
    nbytes: int


def _layer_counts(shard: _Shard) -> tuple[int, int]:
    """Number of layers, and how many of them at the end are for multi-token prediction."""
    key = f"{shard.architecture}.block_count"
    blocks, extra = shard.metadata.get(key), shard.metadata.get(shard.key(".nextn_predict_layers"), 0)
    if blocks is None:
        raise BadModelFile(
            f"{shard.name} has no {key}: it is no language model; choose the model's main file."
        )
    if type(blocks) is not int or not 1 <= blocks <= LAYERS_LIMIT:
        shard.refuse(key, blocks, f"1 to {LAYERS_LIMIT}")
    if type(extra) is not int or not 0 <= extra < blocks:
        shard.refuse(".nextn_predict_layers", extra, f"0 to {blocks - 1}, of {blocks} layers")
    return blocks, extra


def _other_shards(path: Path, first: _Shard, weights: bool) -> list[_Shard]:
    """Shards 2 to N of the set whose first shard is `path`."""
    count, place = first.count("split.count", 1), first.count("split.no", 0)
    if count <= 1:
        return []
    match = _SHARD_NAME.fullmatch(path.name)
    if count > SHARDS_LIMIT or not match or int(match["count"]) != count:
        raise BadModelFile(f"{path} is one of {count} shards but is not named like one: restore its name.")
    if place != 0 or int(match["number"]) != 1:
        raise BadModelFile(f"{path} is not the first of its {count} shards: give {match['stem']}-00001-of-….")
    names = (f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(2, count + 1))
    return [_read_shard(path.with_name(name), weights, None) for name in names]


def _read_shard(path: Path, weights: bool, name: str | None) -> _Shard:
    try:
        with path.open("rb", buffering=0) as file:
            return _parse(_Reader(path, file, name), weights)
    except OSError as error:
        raise BadModelFile(
            f"{name or path} cannot be read ({error.strerror}): check its name and permissions."
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
    found = Metadata(reader.name, "", metadata)
    alignment = found.count("general.alignment", GGUF_DEFAULT_ALIGNMENT, limit=ALIGNMENT_LIMIT)
    if not alignment or alignment & (alignment - 1):
        reader.fail(f"has the alignment {alignment}, not a power of two", CONVERT_AGAIN)
    listed = [_tensor_info(reader) for _ in range(tensors)]
    nbytes = reader.position
    start = -(-nbytes // alignment) * alignment
    end = reader.size if weights else BYTES_LIMIT
    listed = _with_true_blocks(listed, end - start if weights else None, alignment)
    placed = _placed(reader, listed, start, end, alignment)
    architecture = found.text("general.architecture", "")
    return _Shard(reader.name, architecture, metadata, types, placed, alignment, nbytes)


def _preamble(reader: "_Reader") -> tuple[int, int]:
    """Magic, version and the two counts: (keys, tensors)."""
    if reader.size == 0:
        reader.fail("is empty")
    if reader.size < 24 or reader.take(4) != MAGIC:
        reader.fail("is not a GGUF model file", "choose a file that ends in .gguf, or fetch it again")
    version = reader.u32()
    if version and version & 0xFFFF == 0:
        reader.fail("is stored big endian", "fetch or convert a little-endian one")
    if max(VERSIONS) < version < NEWER_LIMIT:
        raise UnsupportedModel(
            f"{reader.name} has GGUF version {version}, newer than this program, which knows {VERSIONS[0]} "
            f"to {VERSIONS[-1]}: {UPDATE}."
        )
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
    if number in set(BlockType) - {BlockType.Q2_0_OF_128}:
        return _blocks_info(reader, name, shape, BlockType(number), offset)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        if not max(GGMLQuantizationType) < number < NEWER_LIMIT:  # damage, or one that ggml gave up
            reader.fail(f"stores {name!r} as type {number}, which is unknown", "choose another quantization")
        raise UnsupportedModel(
            f"{reader.name} stores {name!r} as type {number}, which this program does not know: {UPDATE}, or "
            "choose another quantization."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[0] % block:
        reader.fail(f"stores {name!r} as {kind.name} in rows of {shape[0]}, not a multiple of {block}")
    return _Listed(name, shape, kind, offset, prod(shape) // block * block_bytes)


def _blocks_info(
    reader: "_Reader", name: str, shape: tuple[int, ...], kind: BlockType, offset: int
) -> _Listed:
    if shape[0] % kind.block:
        reader.fail(f"stores {name!r} as {kind.name} in rows of {shape[0]}, not a multiple of {kind.block}")
    return _Listed(name, shape, kind, offset, prod(shape) // kind.block * kind.block_bytes)


def _with_true_blocks(listed: list[_Listed], end: int | None, alignment: int) -> list[_Listed]:
    """Q2_0 as it is: of blocks of 128, as older files had, if those fill what tensors have and 64 do not fit.

    `end` is where the last tensor must end, as offsets count; None if that is unknown.
    """
    old = {tensor.name: _as_old(tensor) for tensor in listed if tensor.type is BlockType.Q2_0}
    following = dict(pairwise(sorted(tensor.offset for tensor in listed) + ([] if end is None else [end])))
    gaps = {
        tensor.name: following[tensor.offset] - tensor.offset
        for tensor in listed
        if tensor.name in old and tensor.offset in following
    }
    if all(tensor.nbytes <= gaps[tensor.name] for tensor in listed if tensor.name in gaps):
        return listed
    if any(not old[name].nbytes <= gap < old[name].nbytes + alignment for name, gap in gaps.items()):
        return listed
    return [old.get(tensor.name, tensor) for tensor in listed]


def _as_old(tensor: _Listed) -> _Listed:
    kind = BlockType.Q2_0_OF_128
    return replace(tensor, type=kind, nbytes=-(-prod(tensor.shape) // kind.block) * kind.block_bytes)


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

    def __init__(self, path: Path, file: BinaryIO, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
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
        raise BadModelFile(f"{self.name} {fault}: {remedy}.")

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
        self._window = pread(self._file.fileno(), wanted, position)
        self._window_at, self._at = position, 0
        if len(self._window) < count:
            self.fail("became shorter while it was read")
