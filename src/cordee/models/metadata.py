"""The metadata of a model file, read by type: a value that is not what its key promises is refused by name.

Files are untrusted, and the format lets any key have a value of any type. So nothing in the package takes a
value as it comes: it asks for a text, a count, a number or a flag, and gets one, or an error that names the
model, the key and what is there instead.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from gguf import GGUFValueType

from cordee.errors import BadModelFile
from cordee.system.disk import pread

FETCH_AGAIN = "fetch the file again"
CONVERT_AGAIN = "convert the model again with a current program"

# Counts, lengths and positions have 32 bits in libllama, and are signed where it computes with them.
COUNT_LIMIT = (1 << 31) - 1
# Of what is there instead of what was expected, in a message.
SHOWN_CHARS_MAX = 40

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
_U64 = SCALARS[GGUFValueType.UINT64]

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
                data = pread(file.fileno(), self.nbytes, self.offset)
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


@dataclass(frozen=True)
class Metadata:
    """Typed access to the metadata of one file.

    `name` is what people call the model, or the file's path. Everywhere a key that begins with '.' gets the
    architecture's prefix. Without a default a key must be there.
    """

    name: str
    architecture: str
    metadata: Mapping[str, Value]

    def key(self, key: str) -> str:
        """The whole name of a key."""
        return self.architecture + key if key.startswith(".") else key

    def get(self, key: str, default: object = None) -> object:
        """The value of whatever type the file gives it, an array as a list: to be shown, not to be used."""
        value = self.metadata.get(self.key(key), default)
        return value.values() if isinstance(value, Array) else value

    def text(self, key: str, default: str | None = None) -> str:
        """A text.

        Raises:
            BadModelFile: it is missing, or something else.
        """
        value = self._found(key, default)
        if not isinstance(value, str):
            self.refuse(key, value, "a text")
        return value

    def count(self, key: str, default: int | None = None, *, limit: int = COUNT_LIMIT) -> int:
        """A whole number from 0 to `limit`.

        Raises:
            BadModelFile: it is missing, or something else.
        """
        return self._checked(key, self._found(key, default), limit)

    def count_of_layer(
        self, key: str, layer: int = 0, default: int | None = None, *, limit: int = COUNT_LIMIT
    ) -> int:
        """A count, from 0 to `limit`, for which a file may give a list with an item for each layer.

        Raises:
            BadModelFile: it is missing, or something else, also in the list.
        """
        value = self._found(key, default)
        if not isinstance(value, Array):
            return self._checked(key, value, limit)
        values = value.values()
        if layer >= len(values):
            raise BadModelFile(
                f"{self.name}: {self.key(key)} has {len(values)} items, none for layer {layer}: "
                f"{CONVERT_AGAIN}."
            )
        return self._checked(key, values[layer], limit)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, with or without a fraction.

        Raises:
            BadModelFile: it is missing, or something else.
        """
        value = self._found(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(key, value, "a number")
        return value

    def refuse(self, key: str, value: object, wanted: str) -> NoReturn:
        """Raise BadModelFile: a key has this value, and `wanted` is what it should have."""
        raise BadModelFile(f"{self.name}: {self.key(key)} is {_shown(value)}, not {wanted}: {CONVERT_AGAIN}.")

    def _found(self, key: str, default: Scalar | None) -> Value:
        value = self.metadata.get(self.key(key), default)
        if value is None:
            raise BadModelFile(f"{self.name} has no {self.key(key)}: {CONVERT_AGAIN}.")
        return value

    def _checked(self, key: str, value: Value, limit: int) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            self.refuse(key, value, f"a whole number from 0 to {limit}")
        return value


def _shown(value: object) -> str:
    """A value as a message shows it; a text may be a whole file."""
    if isinstance(value, Array):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:SHOWN_CHARS_MAX]!r}"
    return str(value)
