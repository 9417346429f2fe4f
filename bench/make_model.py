"""Writes a model of random ternary weights in a known shape, for measuring speed and memory.

    python bench/make_model.py --shape 2b4t -o FILE [--layout trit5] [--head int6] [--vocab N] [--layers N]
    python bench/make_model.py --shape bonsai-8b -o FILE [--layout trit5]   # ternary embedding and head, too

The first layer is drawn at random and the others have the same weights, rotated by rows: the engine reads
every layer's bytes all the same, and a model of two billion weights is made in seconds.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from cordee.convert.pentium2 import LAYOUT, write_pentium2
from cordee.convert.ternary_file import TernaryModel, write


def bonsai(
    layers: int, n_embd: int, n_ff: int, heads: int, kv_heads: int, *, context: int, tied: bool
) -> TernaryModel:
    """A Ternary-Bonsai: Qwen3 with ternary weights everywhere and a scale for each 128 columns."""
    return TernaryModel(
        architecture="qwen3",
        layers=layers,
        n_embd=n_embd,
        n_ff=n_ff,
        n_vocab=151_936,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        context=context,
        rope_base=1_000_000.0,
        epsilon=1e-6,
        rope="neox",
        head_norms=True,
        scale_columns=128,
        embedding="codes",
        head="trit2",
        head_planes=1,
        tied=tied,
    )


SHAPES = {
    "2b4t": TernaryModel(
        architecture="bitnet",
        layers=30,
        n_embd=2560,
        n_ff=6912,
        n_vocab=128_256,
        heads=20,
        kv_heads=5,
        head_dim=128,
        context=4096,
        rope_base=500_000.0,
        activation="relu2",
        rope="neox",
        sub_norms=True,
    ),
    "7b": TernaryModel("llama", 32, 4096, 11_008, 32_000, 32, 32, 128, 4096, 10_000.0),
    "8b": TernaryModel("llama", 32, 4096, 14_336, 128_256, 32, 8, 128, 8192, 500_000.0),
    "bonsai-8b": bonsai(36, 4096, 12_288, 32, 8, context=65_536, tied=False),
    "bonsai-4b": bonsai(36, 2560, 9728, 32, 8, context=32_768, tied=True),
    "bonsai-1.7b": bonsai(28, 2048, 6144, 16, 8, context=32_768, tied=True),
    "maple": TernaryModel(
        architecture="maple",
        layers=24,
        n_embd=2048,
        n_ff=512,
        n_vocab=151_936,
        heads=16,
        kv_heads=4,
        head_dim=128,
        context=131_072,
        rope_base=10_000.0,
        epsilon=1e-6,
        rope="neox",
        head_norms=True,
        planes=2,
        experts=256,
        experts_used=8,
        window=512,
        windowed=(True, True, True, False) * 6,
        rope_dims=64,
        rope_layers="windowed",
        gate_limit=7.0,
    ),
    "falcon-e-1b": TernaryModel("llama", 24, 2048, 8192, 32_768, 16, 4, 128, 32_768, 1_000_042.0),
    "110m": TernaryModel("llama", 12, 768, 2048, 32_000, 12, 12, 64, 1024, 10_000.0),
    "42m": TernaryModel("llama", 8, 512, 1376, 32_000, 8, 8, 64, 1024, 10_000.0),
    "15m": TernaryModel("llama", 6, 288, 768, 32_000, 6, 6, 48, 256, 10_000.0),
    "260k": TernaryModel("llama", 5, 64, 172, 512, 8, 4, 8, 512, 10_000.0),
}


TABLES = ("token_embd.weight", "output.weight")


class RandomWeights:
    """Seeded random weights, as a WeightSource of `cordee.convert.ternary_file`: same seed, same bytes."""

    def __init__(self, model: TernaryModel, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._drawn: dict[str, np.ndarray] = {}

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """See `WeightSource.rows`."""
        if name in TABLES:
            draw = np.random.default_rng((self._seed, first))  # tied: the same for both
            if self._model.embedding == "codes":
                return draw.integers(-1, 2, (last - first, self._model.n_embd), dtype=np.int8)
            if self._model.layout == LAYOUT:
                return draw.integers(-1, 2, (last - first, self._model.n_embd)).astype(np.float32)
            return draw.standard_normal((last - first, self._model.n_embd), dtype=np.float32)
        _, layer, matrix, _ = name.split(".")
        weights = self._matrix(matrix)
        return np.take(weights, range(first + int(layer), last + int(layer)), axis=0, mode="wrap")

    def scales(self, name: str) -> np.ndarray:
        """See `WeightSource.scales`: a matrix keeps its input's magnitude."""
        table = self._model.n_vocab, self._model.n_embd
        rows, cols = table if name in TABLES else self._model.matrices()[name.split(".")[2]]
        columns = self._model.scale_columns
        scale = 1 if name in TABLES else np.sqrt(1.5 / cols)
        return np.full((rows, -(-cols // columns)) if columns else 1, scale, dtype=np.float32)

    def vector(self, name: str) -> np.ndarray:
        """See `WeightSource.vector`."""
        if name.endswith("ffn_gate_inp.weight"):
            draw = np.random.default_rng((self._seed, int(name.split(".")[1])))
            shape = self._model.experts, self._model.n_embd
            return draw.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[1]))
        length = (
            self._model.n_embd if name == "output_norm.weight" else self._model.norms()[name.split(".")[2]]
        )
        return np.ones(length, dtype=np.float32)

    def _matrix(self, matrix: str) -> np.ndarray:
        if matrix not in self._drawn:
            draw = np.random.default_rng((self._seed, len(self._drawn)))
            shape = self._model.matrices()[matrix]
            self._drawn[matrix] = draw.integers(-1, 2, shape, dtype=np.int8)
        return self._drawn[matrix]


def add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """A tokenizer like SentencePiece's with `size` (512 at least) tokens: bytes, letters, made-up words."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    made_up = [f"▁{a}{b}{c}" for a in letters for b in letters for c in letters]
    made_up += [f"{word}{letter}" for word in made_up for letter in letters]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*special, "▁", *letters, *made_up][:size]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types(kinds + [TokenType.NORMAL] * (size - len(kinds)))


def make_model(path: Path, model: TernaryModel, seed: int = 0) -> None:
    """Write the model to `path`.

    In the layout `pentium2` its embedding and head are ternary, too, and it has a tokenizer: the program for
    that machine reads text.
    """
    if model.layout != LAYOUT:
        return write(path, model, RandomWeights(model, seed))
    return write_pentium2(
        path, model, RandomWeights(model, seed), describe=lambda writer: add_vocabulary(writer, model.n_vocab)
    )


def with_layers(model: TernaryModel, layers: int | None) -> TernaryModel:
    """A shape with another number of layers."""
    layers = layers or model.layers
    return replace(model, layers=layers, windowed=model.windowed[:layers])


def laid_out(model: TernaryModel, layout: str, head: str = "int8") -> TernaryModel:
    """A shape in that layout. Where embedding and head are ternary, too, they are as the layers."""
    own = {"layout": layout}
    if model.embedding == "codes":
        return replace(model, **own, head=layout)
    rows_of = GGMLQuantizationType.Q8_0 if model.n_embd % 32 == 0 else GGMLQuantizationType.F16
    return replace(model, **own, head=head, embedding=rows_of)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("-o", dest="path", type=Path, required=True, metavar="FILE")
    parser.add_argument("--layout", choices=("trit2", "trit5", LAYOUT), default="trit2")
    parser.add_argument("--head", choices=("int8", "int6", "int4", "trit2", "trit5"), default="int8")
    parser.add_argument("--vocab", type=int, help="another size of the vocabulary")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = with_layers(SHAPES[options.shape], options.layers)
    model = replace(model, n_vocab=options.vocab or model.n_vocab)
    model = laid_out(model, options.layout, options.head)
    make_model(options.path, model, options.seed)


if __name__ == "__main__":
    main()
