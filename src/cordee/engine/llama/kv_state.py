"""The KV state of a sequence, as engines export it, split and joined by layers.

A stage of another placement has other layers, so what it takes over from its predecessors is ranges of their
layers. Formats (all words little-endian):

- libllama (`llama_state_seq_get_data`; llama.cpp, src/llama-kv-cache.cpp): two words of preamble, then one
  cache, or for a model with sliding windows two, that of the layers without a window first. A cache is the
  number of streams and, for each, its cells (position, sequences), whether V is transposed, the number of
  layers, then K of every layer and V of every layer, each with its type and the bytes of a row.
- ternary ("CTKV"; native/src/engine/cache_state.c): six words, the third the number of layers, and equally
  many bytes for each layer.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cordee.errors import StageFailed

_TERNARY = b"CTKV"
_TERNARY_WORDS = struct.Struct("<4s5I")
_PREAMBLE_BYTES = 8
_TENSOR = struct.Struct("<iQ")  # type, bytes of a row
STREAMS_MAX = 1 << 16  # sequences of a stage; no stage has more

_Words = tuple[Any, ...]  # as _TERNARY_WORDS unpacks them


def pick_layers(state: bytes, windowed: Sequence[bool], first: int, last: int) -> bytes:
    """The part of a state that is of layers `first` to `last - 1`.

    `windowed` says for each of the stage's layers whether it has a sliding window.

    Raises:
        StageFailed: the state is in an unknown format, or of another number of layers.
    """
    if not 0 <= first < last <= len(windowed):
        raise StageFailed(f"a state of {len(windowed)} layers has no layers {first} to {last - 1}")
    if state.startswith(_TERNARY):
        words, layers = _ternary_layers(state)
        if len(layers) != len(windowed):
            raise StageFailed(f"the state has {len(layers)} layers, not {len(windowed)}")
        return _ternary_state(words, layers[first:last])
    preamble, caches = _caches(state)
    kinds = (False, True) if len(caches) == 2 else (None,)
    picked: list[_Cache] = []
    for kind, cache in zip(kinds, caches, strict=True):
        own = [layer for layer, has in enumerate(windowed) if kind in (None, has)]
        if len(own) != len(cache.keys):
            raise StageFailed(f"a cache of the state has {len(cache.keys)} layers, not {len(own)}")
        chosen = [place for place, layer in enumerate(own) if first <= layer < last]
        picked.append(cache.of(chosen))
    return _state(preamble, picked)


def join_layers(parts: Sequence[bytes]) -> bytes:
    """One state from states of consecutive ranges of layers; a single one is returned as it is.

    Raises:
        StageFailed: a part is in an unknown format, or they are of different positions.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].startswith(_TERNARY):
        read = [_ternary_layers(part) for part in parts]
        if len({(*words[:2], *words[3:]) for words, _ in read}) != 1:
            raise StageFailed("the parts of a sequence's state do not belong together")
        return _ternary_state(read[0][0], [layer for _, layers in read for layer in layers])
    preamble, joined = _caches(parts[0])
    for part in parts[1:]:
        _, caches = _caches(part)
        if len(caches) != len(joined):
            raise StageFailed("the parts of a sequence's state have different caches")
        joined = [left.followed_by(right) for left, right in zip(joined, caches, strict=True)]
    return _state(preamble, joined)


@dataclass(frozen=True)
class _Cache:
    """A libllama cache with the cells of one sequence; `keys` and `values` are whole tensors, with heads."""

    streams: int
    stream: int  # the one that has the cells
    cells: bytes
    count: int
    transposed: int
    keys: tuple[bytes, ...]
    values: tuple[bytes, ...]  # empty where K and V are one tensor

    def of(self, places: Sequence[int]) -> "_Cache":
        values = tuple(self.values[place] for place in places) if self.values else ()
        return replace(self, keys=tuple(self.keys[place] for place in places), values=values)

    def followed_by(self, other: "_Cache") -> "_Cache":
        same = (self.streams, self.cells, self.transposed) == (other.streams, other.cells, other.transposed)
        if not same:
            raise StageFailed("the parts of a sequence's state are of different positions")
        return replace(self, keys=self.keys + other.keys, values=self.values + other.values)

    def written(self) -> bytes:
        parts = [struct.pack("<I", self.streams)]
        for stream in range(self.streams):
            if stream != self.stream:
                parts.append(bytes(4))
                continue
            parts += [struct.pack("<I", self.count), self.cells]
            parts += [struct.pack("<II", self.transposed, len(self.keys)), *self.keys, *self.values]
        return b"".join(parts)


class _Reader:
    """Reads bytes from front to end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise StageFailed("the state of a sequence ends too soon")
        self._at += count
        return self._data[self._at - count : self._at]

    def word(self) -> int:
        return int.from_bytes(self.take(4), "little")


def _caches(state: bytes) -> tuple[bytes, list[_Cache]]:
    reader = _Reader(state)
    preamble = reader.take(_PREAMBLE_BYTES)
    caches: list[_Cache] = []
    while reader.left and len(caches) < 2:
        caches.append(_cache(reader))
    if reader.left or not caches:
        raise StageFailed("the state of a sequence is in an unknown format")
    return preamble, caches


def _cache(reader: _Reader) -> _Cache:
    streams = reader.word()
    if not 0 < streams <= STREAMS_MAX:
        raise StageFailed("the state of a sequence is in an unknown format")
    found = None
    for stream in range(streams):
        count = reader.word()
        if count:
            cells = b"".join(_cell(reader) for _ in range(count))
            transposed, layers = reader.word(), reader.word()
            if found is not None or transposed:
                raise StageFailed("the state of a sequence is in an unknown format")
            keys = tuple(_tensor(reader, count) for _ in range(layers))
            # Without values only the counts of the other streams follow.
            has_values = reader.left > 4 * (streams - stream - 1)
            values = tuple(_tensor(reader, count) for _ in range(layers)) if has_values else ()
            found = _Cache(streams, stream, cells, count, transposed, keys, values)
    if found is None:
        raise StageFailed("the state of a sequence is empty")
    return found


def _cell(reader: _Reader) -> bytes:
    """A cell's position and its one sequence, numbered 0: the number is only valid in the exporting stage."""
    position, sequences, _ = reader.take(4), reader.word(), reader.take(4)
    if sequences != 1:
        raise StageFailed("the state of a sequence is in an unknown format")
    return position + struct.pack("<II", 1, 0)


def _tensor(reader: _Reader, rows: int) -> bytes:
    head = reader.take(_TENSOR.size)
    _, row_bytes = _TENSOR.unpack(head)
    return head + reader.take(rows * row_bytes)


def _state(preamble: bytes, caches: Sequence[_Cache]) -> bytes:
    return preamble + b"".join(cache.written() for cache in caches)


def _ternary_layers(state: bytes) -> tuple[_Words, list[bytes]]:
    """The words before the layers, and the layers."""
    if len(state) < _TERNARY_WORDS.size:
        raise StageFailed("the state of a sequence ends too soon")
    words = _TERNARY_WORDS.unpack_from(state)
    count, nbytes = words[2], len(state) - _TERNARY_WORDS.size
    if not 0 < count <= STREAMS_MAX or nbytes % count:
        raise StageFailed("the state of a sequence is in an unknown format")
    each = nbytes // count
    starts = range(_TERNARY_WORDS.size, len(state), each) if each else ()
    return words, [state[start : start + each] for start in starts]


def _ternary_state(words: _Words, layers: Sequence[bytes]) -> bytes:
    return _TERNARY_WORDS.pack(*words[:2], len(layers), *words[3:]) + b"".join(layers)
