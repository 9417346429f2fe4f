"""What a model is, for clients that ask before they use it: what its file says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from cordee.errors import CordeeError
from cordee.models.fit import parameter_count
from cordee.models.gguf import Header, read_header
from cordee.models.metadata import Array

HEADERS_MAX = 64  # that are remembered; a node serves a handful of models
TEXT_CHARS_MAX = 1000  # of a metadata's text; longer ones are templates and whole tokenizers
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True)
class FileFacts:
    """What a model's file says. `parameters` is 0 where the weights are on other machines."""

    parameters: int = 0
    quantization: str = ""
    license: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@lru_cache(HEADERS_MAX)
def file_facts(path: Path, digest: str) -> FileFacts:
    """The facts of the file with that digest; none if it cannot be read. It takes some milliseconds."""
    try:
        header = read_header(path, weights=False)
        return FileFacts(
            parameter_count(header) if header.tensors else 0,
            _quantization(header),
            header.text("general.license", ""),
            {key: value for key, value in header.metadata.items() if _is_short(value)},
        )
    except (CordeeError, OSError):
        return FileFacts()


def short_count(count: int) -> str:
    """A number of parameters as people write it: 134.5M."""
    for unit, letter in UNITS:
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def _quantization(header: Header) -> str:
    number = header.count("general.file_type", LlamaFileType.GUESSED.value)
    known = {kind.value: kind.name for kind in LlamaFileType if kind is not LlamaFileType.GUESSED}
    return known.get(number, "unknown").removeprefix("MOSTLY_").removeprefix("ALL_")


def _is_short(value: object) -> bool:
    return not isinstance(value, Array) and not (isinstance(value, str) and len(value) > TEXT_CHARS_MAX)
