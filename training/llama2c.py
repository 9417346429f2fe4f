"""Teachers in llama2.c's version-0 format, and their vocabularies.

A model: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32
tensors in the order of `tensors`. A vocabulary: an int32 (the longest piece), then for each piece a
float32 score, an int32 length, its bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.teacher import Teacher, TeacherShape

BOS, EOS = 1, 2  # in all these vocabularies; there is a BOS between two stories
FIRST_BYTE, BYTES = 3, 256  # one piece for each byte follows the special ones


def tensors(shape: TeacherShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the file's order."""
    narrow = shape.kv_heads * shape.head_dim
    square, dim, layers = (shape.layers, shape.dim, shape.dim), shape.dim, shape.layers
    return {
        "token_embd": (shape.vocab, dim),
        "attn_norm": (layers, dim),
        "attn_q": square,
        "attn_k": (layers, narrow, dim),
        "attn_v": (layers, narrow, dim),
        "attn_output": square,
        "ffn_norm": (layers, dim),
        "ffn_gate": (layers, shape.hidden, dim),
        "ffn_down": (layers, dim, shape.hidden),
        "ffn_up": (layers, shape.hidden, dim),
        "output_norm": (dim,),
    }


def read_model(path: Path) -> Teacher:
    """The teacher in a file.

    Raises:
        ValueError: its head is not its embedding.
    """
    raw = path.read_bytes()
    shape = TeacherShape(*np.frombuffer(raw, "<i4", 7).tolist())
    if shape.vocab <= 0:
        raise ValueError(f"{path} has a head of its own, which is not supported: give a tied model")
    at, weights = 28, {}
    for name, size in tensors(shape).items():
        count = int(np.prod(size))
        weights[name] = torch.from_numpy(np.frombuffer(raw, "<f4", count, at).copy()).view(size)
        at += 4 * count
    return Teacher(shape, weights)


@dataclass(frozen=True)
class Piece:
    """A token of such a vocabulary; special tokens have decorated text."""

    text: bytes
    score: float


def read_pieces(path: Path, count: int) -> list[Piece]:
    """The vocabulary in a file."""
    raw, at, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        score = float(np.frombuffer(raw, "<f4", 1, at)[0])
        nbytes = int(np.frombuffer(raw, "<i4", 1, at + 4)[0])
        pieces.append(Piece(raw[at + 8 : at + 8 + nbytes], score))
        at += 8 + nbytes
    return pieces


def story_texts(pieces: list[Piece], ids: np.ndarray) -> list[str]:
    """The stories in a window of ids; the last may be cut off."""
    first_text = FIRST_BYTE + BYTES

    def spelled(token: int) -> bytes:
        if token < FIRST_BYTE:
            return b"\0"
        return bytes([token - FIRST_BYTE]) if token < first_text else pieces[token].text

    text = b"".join(spelled(token) for token in ids.tolist()).decode(errors="ignore")
    return [story.strip() for story in text.split("\0") if story.strip()]
