"""The tokens by which GPTQ sees what enters each matrix."""

from contextlib import closing
from importlib.resources import files
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from cordee.compress.source import Source
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import BadRequest

WINDOW_TOKENS = 512
# More help less and less: the time of a run grows with them.
TOKENS_MAX = 8192
# With fewer a matrix follows the text by heart: its inputs have hundreds or thousands of dimensions.
WINDOWS_MIN = 4


def default_calibration() -> str:
    """The text that comes with the package; another one than `cordee eval` reads."""
    return (files("cordee.compress") / "texts" / "calibration.txt").read_text(encoding="utf-8")


def calibration_windows(
    source: Source, text: str, folder: Path, tokens_max: int = TOKENS_MAX, option: str = "calibration"
) -> np.ndarray:
    """(windows, length) int32 tokens of a text; `folder` is for the vocabulary of a checkpoint, `option` what
    the text was given by.

    Raises:
        BadRequest: the text is too short.
        BadModelFile, UnsupportedModel: the model has no tokenizer that libllama knows.
    """
    length = min(WINDOW_TOKENS, source.model.context)
    with closing(Vocabulary(_vocabulary_file(source, folder), source.name)) as vocabulary:
        tokens = vocabulary.tokenize(text, special=False, add_bos=True)
        bos = vocabulary.bos if vocabulary.wants_bos else None
    count = min(len(tokens), tokens_max) // length
    if count < WINDOWS_MIN:
        raise BadRequest(
            f"The text has {len(tokens)} tokens of {source.name}, and at least "
            f"{WINDOWS_MIN * length} are needed: give a longer one with --{option}.",
            option,
        )
    windows = np.array(tokens[: count * length], dtype=np.int32).reshape(count, length)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _vocabulary_file(source: Source, folder: Path) -> Path:
    """A GGUF with the model's tokenizer: its own file, or one without tensors that is made here."""
    if source.header is not None:
        return source.header.path
    path = folder / "vocabulary.gguf"
    writer = GGUFWriter(path, source.model.architecture)
    writer.add_block_count(source.model.layers)
    writer.add_vocab_size(source.model.n_vocab)
    source.describe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path
