"""No key twice in an object of a JSON answer: what llguidance's grammars leave open.

They know the names that a schema lists. Where any name may come (JSON mode, a map), a small model writes the
same one again and again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

QUOTE, BACKSLASH, COMMA = b'"\\,'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_ARRAY, CLOSE_ARRAY = b"{}[]"
ARRAY = 0  # the number of every array; objects are numbered from 1


class QuotedTokens:
    """The tokens with quotes in them, of a vocabulary given by its pieces in the order of ids."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = {token: piece for token, piece in enumerate(pieces) if QUOTE in piece}
        self.every = np.fromiter(self.pieces, np.int64)
        self.several = np.array(
            [token for token in self.pieces if self.pieces[token].count(b'"') > 1], np.int64
        )
        closing: dict[bytes, list[int]] = {}
        for token, piece in self.pieces.items():
            closing.setdefault(piece[: piece.index(b'"')], []).append(token)
        self.closing: Mapping[bytes, Sequence[int]] = closing  # by what stands before the first quote


class _Place(NamedTuple):
    """Where in a JSON text we are. `key` is what there is of the key that is being written."""

    containers: tuple[int, ...] = ()  # from the outside
    objects: int = 0  # so far
    in_string: bool = False
    escaped: bool = False
    awaits_key: bool = False
    key: bytes | None = None


class WrittenKeys:
    """The keys of a JSON text, as far as it has come. `tokens` are those that may complete one."""

    def __init__(self, tokens: QuotedTokens) -> None:
        self._tokens = tokens
        self._place = _Place()
        self._keys: dict[int, set[bytes]] = {}

    def copy(self) -> "WrittenKeys":
        """Another that goes on from here."""
        other = WrittenKeys(self._tokens)
        other._place = self._place
        other._keys = {number: set(keys) for number, keys in self._keys.items()}
        return other

    def push(self, piece: bytes) -> None:
        """Go on by a piece of the text."""
        self._place, written = _read(self._place, piece)
        for number, key in written:
            self._keys.setdefault(number, set()).add(key)

    def repeats(self, allowed: np.ndarray) -> list[int]:
        """The tokens, of those that are `allowed` (n_vocab,), that would complete a key that is there."""
        if not self._keys:
            return []
        tokens, place, found = self._tokens, self._place, set[int]()
        looked_at = tokens.several
        if place.escaped:
            looked_at = tokens.every
        elif place.key is not None:
            begun = place.key
            for key in self._keys.get(place.containers[-1], ()):
                if key.startswith(begun):
                    found.update(tokens.closing.get(key[len(begun) :], ()))
        possible: list[int] = looked_at[allowed[looked_at]].tolist()
        return [*found, *filter(self._completes_again, possible)]

    def _completes_again(self, token: int) -> bool:
        _, written = _read(self._place, self._tokens.pieces[token])
        return len(set(written)) < len(written) or any(
            key in self._keys.get(number, ()) for number, key in written
        )


def _read(place: _Place, piece: bytes) -> tuple[_Place, list[tuple[int, bytes]]]:
    """Where a piece leads to, and the keys that it completes, each with its object's number."""
    containers, objects, in_string, escaped, awaits_key, key = place
    written: list[tuple[int, bytes]] = []
    for byte in piece:
        if in_string:
            if byte == QUOTE and not escaped:
                in_string = False
                if key is not None:
                    written.append((containers[-1], key))
                    key = None
                continue
            escaped = byte == BACKSLASH and not escaped
            key = None if key is None else key + bytes((byte,))
        elif byte == QUOTE:
            in_string, key, awaits_key = True, b"" if awaits_key else None, False
        elif byte == OPEN_OBJECT:
            objects += 1
            containers, awaits_key = (*containers, objects), True
        elif byte == OPEN_ARRAY:
            containers, awaits_key = (*containers, ARRAY), False
        elif byte in (CLOSE_OBJECT, CLOSE_ARRAY):
            containers, awaits_key = containers[:-1], False
        elif byte == COMMA:
            awaits_key = bool(containers) and containers[-1] != ARRAY
    return _Place(containers, objects, in_string, escaped, awaits_key, key), written
