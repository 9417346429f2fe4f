"""A vocabulary cut to what stories need: a subset of byte-level BPE that still tokenizes any text.

It keeps an end token (id 0), the single bytes, and the tokens that a text uses most, each with all tokens
that merge into it. So a kept token is reached by the same merges as in the whole vocabulary.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

END_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Cut:
    """A cut vocabulary; `kept` maps new ids to those of the whole vocabulary.

    `tokens`, `merges` and `pre` (the pre-tokenizer's name) are as GGUF writes them.
    """

    kept: list[int]
    tokens: list[str]
    merges: list[str]
    pre: str


def cut_of(model: Path, counts: Counter[int], size: int) -> Cut:
    """The vocabulary of a GGUF file, cut to `size` tokens; the end of its turns becomes the end token.

    Raises:
        ValueError: the text does not use that many tokens.
    """
    fields = {name: field.contents for name, field in GGUFReader(model).fields.items() if "tokenizer" in name}
    tokens, merges = fields["tokenizer.ggml.tokens"](), fields["tokenizer.ggml.merges"]()
    kept, fitting = cut(tokens, merges, counts, fields["tokenizer.ggml.eos_token_id"](), size)
    texts = [END_TEXT, *(tokens[number] for number in kept[1:])]
    return Cut(kept, texts, fitting, fields["tokenizer.ggml.pre"]())


def cut(
    tokens: list[str], merges: list[str], counts: Counter[int], end: int, size: int
) -> tuple[list[int], list[str]]:
    """The ids of the `size` tokens that stay, `end` first, and the merges among them.

    Raises:
        ValueError: the text does not use that many tokens.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    parents = {}
    for merge in merges:
        left, right = merge.split(" ")
        parents.setdefault(ids[left + right], (ids[left], ids[right]))
    # Single characters that no merge yields stand for the bytes.
    kept = {end} | {number for token, number in ids.items() if len(token) == 1 and number not in parents}
    for number, _ in counts.most_common():
        wanted = _with_parents(number, parents) - kept
        if len(kept) + len(wanted) <= size:
            kept |= wanted
    if len(kept) < size:
        raise ValueError(f"only {len(kept)} tokens are in use: have more written, or ask for fewer")
    words = {tokens[number] for number in kept}
    fitting = [merge for merge in merges if {*merge.split(" "), merge.replace(" ", "")} <= words]
    return [end, *sorted(kept - {end})], fitting


def _with_parents(number: int, parents: dict[int, tuple[int, int]]) -> set[int]:
    found = {number}
    for parent in parents.get(number, ()):
        found |= _with_parents(parent, parents)
    return found
