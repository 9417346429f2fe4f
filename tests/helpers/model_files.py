"""Model files whose metadata is changed on purpose: one key at a time, or a vocabulary at random, seeded."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from gguf import GGUFValueType, TokenType

from cordee.models.gguf import read_header
from cordee.models.metadata import SCALARS, Array

TOKENS, SCORES, TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
PARTS = (TOKENS, SCORES, TYPES)


@dataclass(frozen=True)
class Field:
    """A value with its type in the file; of an array also the type of its items."""

    kind: GGUFValueType
    value: object
    items: GGUFValueType | None = None

    def encoded(self) -> bytes:
        if self.kind is not GGUFValueType.ARRAY:
            return struct.pack("<I", self.kind) + _packed(self.kind, self.value)
        head = struct.pack("<IIQ", self.kind, self.items, len(self.value))
        return head + b"".join(_packed(self.items, item) for item in self.value)


Fields = dict[str, Field]


def _packed(kind: GGUFValueType, value: object) -> bytes:
    if kind is not GGUFValueType.STRING:
        return SCALARS[kind].pack(value)
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


class Original:
    """A sound model file, and copies of it with other metadata."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.header = header
        self.fields: Fields = {
            key: Field(header.types[key], value.values(), value.type)
            if isinstance(value, Array)
            else Field(header.types[key], value)
            for key, value in header.metadata.items()
        }
        self._weights = path.read_bytes()[min(tensor.offset for tensor in header.tensors) :]

    def write(self, path: Path, changes: Mapping[str, Field | None]) -> Path:
        """A copy with some fields changed, added, or (None) left out."""
        fields = {key: field for key, field in (self.fields | dict(changes)).items() if field is not None}
        first = min(tensor.offset for tensor in self.header.tensors)
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.header.tensors), len(fields))
        out += b"".join(_packed(GGUFValueType.STRING, key) + field.encoded() for key, field in fields.items())
        for tensor in self.header.tensors:
            out += _packed(GGUFValueType.STRING, tensor.name)
            out += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            out += struct.pack("<IQ", tensor.type, tensor.offset - first)
        path.write_bytes(out.ljust(-(-len(out) // 32) * 32, b"\0") + self._weights)
        return path

    def texts(self) -> list[str]:
        """The tokens of its vocabulary."""
        return list(self.fields[TOKENS].value)

    def with_tokens(self, change: Callable[[list[str]], None]) -> dict[str, Field]:
        """The change of metadata that changes the list of tokens so."""
        texts = self.texts()
        change(texts)
        return {TOKENS: Field(GGUFValueType.ARRAY, texts, GGUFValueType.STRING)}

    def without_bytes(self) -> dict[str, Field]:
        """Its vocabulary without the tokens that stand for bytes: they are named otherwise."""
        return self.with_tokens(_name_bytes_otherwise)

    def mangled(self, seed: int) -> dict[str, Field | None]:
        """One to four random changes to the vocabulary."""
        random = Random(seed)
        changed: dict[str, Field | None] = {}
        for _ in range(random.randint(1, 4)):
            random.choice(CHANGES)(random, self.fields | changed, changed)
        return changed


def _name_bytes_otherwise(texts: list[str]) -> None:
    for place, text in enumerate(texts):
        if text.startswith("<0x"):
            texts[place] = f"no byte {text}"


def _list(fields: Fields, key: str) -> list:
    field = fields.get(key)
    return list(field.value) if field is not None and isinstance(field.value, list) else []


def _put(changed: dict[str, Field | None], fields: Fields, key: str, values: list) -> None:
    field = fields.get(key)
    if field is not None and field.items is not None:
        changed[key] = Field(GGUFValueType.ARRAY, values, field.items)


def _texts(random: Random, fields: Fields, changed: dict) -> None:
    """Some tokens become equal, empty, long, or bytes that are no text."""
    texts = _list(fields, TOKENS)
    odd = ["", "\0", "\xff\xfe", "<0x", "<0xZZ>", "a" * 5000, "\ufffd", " ", "Ġ", "▁", "<s>", "e"]
    for _ in range(random.choice([1, 1, 2, 20, len(texts)])):
        if texts:
            texts[random.randrange(len(texts))] = random.choice([random.choice(odd), random.choice(texts)])
    _put(changed, fields, TOKENS, texts)


def _bytes(random: Random, fields: Fields, changed: dict) -> None:
    """Some or all of the tokens for bytes are named otherwise."""
    texts, share = _list(fields, TOKENS), random.choice([0.01, 0.5, 1.0])
    _put(
        changed,
        fields,
        TOKENS,
        [f"x{text}" if text.startswith("<0x") and random.random() < share else text for text in texts],
    )


def _kinds(random: Random, fields: Fields, changed: dict) -> None:
    """Types of tokens, among them some that do not exist."""
    kinds, wanted = _list(fields, TYPES), [*map(int, TokenType), 0, 7, 99, -1]
    for _ in range(random.choice([1, 5, len(kinds)])):
        if kinds:
            kinds[random.randrange(len(kinds))] = random.choice(wanted)
    _put(changed, fields, TYPES, kinds)


def _length(random: Random, fields: Fields, changed: dict) -> None:
    """One of the lists is shorter, longer, empty, or gone."""
    key = random.choice(PARTS)
    values = _list(fields, key)
    new = random.choice([values[:-1], values + values[-1:], [], values[: len(values) // 2], None])
    if new is None:
        changed[key] = None
    else:
        _put(changed, fields, key, new)


def _number(random: Random, fields: Fields, changed: dict) -> None:
    """A special token's number is another, perhaps outside the vocabulary."""
    name = random.choice(["bos", "eos", "unknown", "padding", "eot", "separator", "fim_pre", "newline"])
    value = random.choice([0, 1, 5, len(_list(fields, TOKENS)), 2**31 - 1, 2**31, 2**32 - 1])
    changed[f"tokenizer.ggml.{name}_token_id"] = Field(GGUFValueType.UINT32, value)


def _algorithm(random: Random, fields: Fields, changed: dict) -> None:
    """Another kind of tokenizer, or of its rules."""
    text = GGUFValueType.STRING
    kind = random.choice(["gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "none", "no_vocab", "", "x" * 300])
    changed["tokenizer.ggml.model"] = Field(text, kind)
    pre = random.choice(["default", "llama-bpe", "gpt-4o", "tekken", "smollm", "nothing", ""])
    changed["tokenizer.ggml.pre"] = Field(text, pre)
    texts = _list(fields, TOKENS) or ["a"]
    pairs = [f"{random.choice(texts)} {random.choice(texts)}" for _ in range(random.choice([0, 3, 50]))]
    odd = random.choice([[], ["no-blank"], [" "], [""]])
    changed["tokenizer.ggml.merges"] = Field(GGUFValueType.ARRAY, pairs + odd, text)


def _flag(random: Random, fields: Fields, changed: dict) -> None:
    name = random.choice(["add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"])
    changed[f"tokenizer.ggml.{name}"] = Field(GGUFValueType.BOOL, random.random() < 0.5)


def _template(random: Random, fields: Fields, changed: dict) -> None:
    text = random.choice(
        ["", "{{", "{% for x in", "(" * 3000, "{{ " + "(" * 500, "{{ 1 // 0 }}", "a" * 70_000]
    )
    changed["tokenizer.chat_template"] = Field(GGUFValueType.STRING, text)


def _type(random: Random, fields: Fields, changed: dict) -> None:
    """A key of the tokenizer has a value of another type."""
    keys = [key for key in fields if key.startswith("tokenizer.") and fields[key] is not None]
    if keys:
        changed[random.choice(keys)] = random.choice(ODD_FIELDS)


ODD_FIELDS = (
    Field(GGUFValueType.STRING, "odd"),
    Field(GGUFValueType.UINT32, 3),
    Field(GGUFValueType.UINT64, 2**64 - 1),
    Field(GGUFValueType.INT32, -1),
    Field(GGUFValueType.FLOAT32, float("nan")),
    Field(GGUFValueType.FLOAT64, 1.5),
    Field(GGUFValueType.BOOL, True),
    Field(GGUFValueType.ARRAY, [], GGUFValueType.UINT32),
    Field(GGUFValueType.ARRAY, [1, 2, 3], GGUFValueType.INT32),
    Field(GGUFValueType.ARRAY, ["a", "b"], GGUFValueType.STRING),
    Field(GGUFValueType.ARRAY, [0.5], GGUFValueType.FLOAT32),
)
CHANGES = (_texts, _texts, _bytes, _kinds, _length, _number, _algorithm, _flag, _template, _type)
