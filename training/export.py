"""From a trained student to a model file for the ternary engine, with the teacher's vocabulary."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from torch import Tensor

from cordee.convert.pentium2 import write_pentium2
from cordee.convert.ternary_file import EMBEDDING, HEAD, OUTPUT_NORM, TernaryModel, write
from training.chat import END
from training.cut import Cut
from training.layers import EPSILON, ROPE_BASE
from training.llama2c import BOS, BYTES, EOS, FIRST_BYTE, Piece
from training.recipe import Recipe
from training.student import Student, ternary

SPACE = "\u2581"  # as SentencePiece writes it
SPECIALS = ("<unk>", "<s>", "</s>")
# A story has no turns: the message is its beginning.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

Layout = Literal["trit5", "pentium2"]


def export(
    student: Student, vocabulary: Sequence[Piece] | Cut, recipe: Recipe, path: Path, layout: Layout
) -> None:
    """Write the model file. `trit5` is for machines with vector instructions, `pentium2` runs everywhere.

    Its logits are the student's times the recipe's temperature.

    Raises:
        StorageFailed: no room on disk.
    """
    shape = student.shape
    model = TernaryModel(
        architecture="llama",
        layers=shape.layers,
        n_embd=shape.dim,
        n_ff=shape.hidden,
        n_vocab=shape.vocab,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.head_dim,
        context=shape.context,
        rope_base=ROPE_BASE,
        epsilon=EPSILON,
        activation="relu2",
        rope="interleaved",
        sub_norms=True,
        layout="trit5",
        planes=1,
        head="trit5",
        head_planes=1,
        embedding=GGMLQuantizationType.F32,
    )
    source = _Weights(student, recipe.temperature)

    def describe(writer: GGUFWriter) -> None:
        writer.add_name(recipe.title)
        (_add_cut if isinstance(vocabulary, Cut) else _add_pieces)(writer, vocabulary)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)

    (write_pentium2 if layout == "pentium2" else write)(path, model, source, describe=describe)


class _Weights:
    """A student as a `cordee.convert.ternary_file.WeightSource`; embedding and head are the same."""

    def __init__(self, student: Student, temperature: float) -> None:
        self._tensors: dict[str, Tensor] = {OUTPUT_NORM: student.output_norm.detach() * temperature}
        for index, layer in enumerate(student.layers):
            for name, tensor in (*layer.matrices.items(), *layer.norms.items()):
                self._tensors[f"blk.{index}.{name}.weight"] = tensor.detach()
        t, scale = ternary(student.embedding.detach())
        self._embedding = (t * scale).numpy()

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        if name in (EMBEDDING, HEAD):
            return self._embedding[first:last]
        return ternary(self._tensors[name])[0][first:last].to(torch.int8).numpy()

    def scales(self, name: str) -> np.ndarray:
        return ternary(self._tensors[name])[1].reshape(1).numpy()

    def vector(self, name: str) -> np.ndarray:
        return self._tensors[name].numpy()


def _add_pieces(writer: GGUFWriter, pieces: Sequence[Piece]) -> None:
    """BOS ends generation: a story ends where the next would begin."""
    texts = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(BYTES))]
    texts += [piece.text.decode().replace(" ", SPACE) for piece in pieces[FIRST_BYTE + BYTES :]]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * BYTES
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types(kinds + [TokenType.NORMAL] * (len(pieces) - len(kinds)))
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(BOS)
    writer.add_eot_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(True)


def _add_cut(writer: GGUFWriter, cut: Cut) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut.pre)
    writer.add_token_list(cut.tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(cut.tokens) - 1))
    writer.add_token_merges(cut.merges)
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_add_space_prefix(False)
