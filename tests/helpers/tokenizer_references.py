"""The families of tokenizers, each as a C `Source` and as the library that is right by definition.

Small vocabularies are trained here, with the published regular expressions and settings; that of SmolLM2 is
the real one, out of the starter model.
"""

import io
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import sentencepiece
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, decoders, normalizers, trainers
from tokenizers import Tokenizer as Reference
from tokenizers import models as models_of
from tokenizers import pre_tokenizers as splits

from native_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Source
from tokenizer_texts import documents

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TRAINING_SEED, TRAINING_CHARACTERS = 7, 200_000
CHARACTERS = 400  # that a SentencePiece vocabulary knows; the others are bytes or unknown
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_|>"]
USER = ["<think>", " @@", "<|im_start|>user"]


def byte_level(*before: splits.PreTokenizer, regex: bool) -> splits.PreTokenizer:
    """Pre-tokenizers, then GPT-2's byte alphabet, with its regular expression or without."""
    return splits.Sequence([*before, splits.ByteLevel(add_prefix_space=False, use_regex=regex)])


SPLITS = {
    "llama-bpe": byte_level(splits.Split(Regex(LLAMA3), "isolated"), regex=False),
    "gpt-2": byte_level(regex=True),
    "smollm": byte_level(splits.Digits(individual_digits=True), regex=True),
}


@cache
def training_texts() -> tuple[str, ...]:
    """What the small vocabularies are trained on."""
    return tuple(documents(TRAINING_SEED, TRAINING_CHARACTERS))


def _with_specials(reference: Reference) -> Reference:
    reference.add_special_tokens(SPECIALS)
    reference.add_tokens([AddedToken(text, normalized=False) for text in USER])
    return reference


def _special_types(count: int) -> list[int]:
    return [NORMAL] * count + [CONTROL] * len(SPECIALS) + [USER_DEFINED] * len(USER)


@cache
def trained_bytes(pre: str) -> tuple[Source, Reference]:
    """Byte-level BPE of 3,000 tokens; for Llama 3 also some words that no merges lead to."""
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        max_token_length=24,
        initial_alphabet=splits.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner = Reference(models_of.BPE())
    learner.pre_tokenizer = SPLITS[pre]
    learner.train_from_iterator(training_texts(), trainer)
    vocabulary = learner.get_vocab()
    merges = _merges_of(learner)
    whole_words = pre == "llama-bpe"
    if whole_words:
        words = {word for text in training_texts() for word, _ in SPLITS[pre].pre_tokenize_str(text)}
        for word in sorted(word for word in words if len(word) > 3)[::40]:
            vocabulary.setdefault(word, len(vocabulary))
    reference = Reference(models_of.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    reference.pre_tokenizer, reference.decoder = SPLITS[pre], decoders.ByteLevel()
    tokens = [*sorted(vocabulary, key=vocabulary.get), *SPECIALS, *USER]
    source = Source(
        "gpt2",
        [token.encode() for token in tokens],
        pre,
        types=_special_types(len(vocabulary)),
        merges=[" ".join(merge).encode() for merge in merges],
    )
    return source, _with_specials(reference)


def _merges_of(learner: Reference) -> list[tuple[str, str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]


def starter(path: Path) -> tuple[Source, Reference]:
    """SmolLM2's vocabulary, out of its GGUF, as its tokenizer.json has it."""
    keys = GGUFReader(path).fields
    tokens, types, merges = (
        keys[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    model = models_of.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
    )
    reference = Reference(model)
    reference.pre_tokenizer, reference.decoder = SPLITS["smollm"], decoders.ByteLevel()
    reference.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    names = [token.encode() for token in tokens]
    source = Source("gpt2", names, "smollm", types=types, merges=[merge.encode() for merge in merges])
    return source, reference


@cache
def trained_pieces(
    kind: str, byte_fallback: bool = True
) -> tuple[Source, sentencepiece.SentencePieceProcessor]:
    """A SentencePiece vocabulary, "bpe" or "unigram", with Llama's settings."""
    trained = io.BytesIO()
    common = {character for character, _ in Counter("".join(training_texts())).most_common(CHARACTERS)} - {
        "\0"
    }
    known = ["".join(filter(common.__contains__, text)) for text in training_texts()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in known for line in text.split("\n") if line),
        model_writer=trained,
        model_type=kind,
        vocab_size=2500,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    return pieces_source(processor, {"bpe": "llama", "unigram": "t5"}[kind]), processor


def pieces_source(processor: sentencepiece.SentencePieceProcessor, model: str) -> Source:
    """What a converter to GGUF writes of a SentencePiece model, with SPECIALS and USER appended."""
    ids = range(processor.get_piece_size())

    def type_of(token: int) -> int:
        if processor.is_unknown(token):
            return UNKNOWN
        return CONTROL if processor.is_control(token) else BYTE if processor.is_byte(token) else NORMAL

    extra = [*SPECIALS, *USER]
    return Source(
        model,
        [*(processor.id_to_piece(i).encode() for i in ids), *(text.encode() for text in extra)],
        scores=[*map(processor.get_score, ids), *(0.0 for _ in extra)],
        types=[*map(type_of, ids), *_special_types(0)],
        bos=processor.bos_id(),
        eos=processor.eos_id(),
        unknown=processor.unk_id(),
    )


def pieces_reference(source: Source) -> Reference:
    """The `tokenizers` form of a SentencePiece vocabulary, as its converters make it."""
    count = len(source.tokens) - len(SPECIALS) - len(USER)
    names = [token.decode() for token in source.tokens[:count]]
    byte_fallback = BYTE in source.types
    if source.model == "t5":
        scores = list(zip(names, source.scores, strict=False))
        model = models_of.Unigram(scores, unk_id=source.unknown, byte_fallback=byte_fallback)
    else:
        model = models_of.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=scored_merges(names, source.scores, source.types),
            unk_token=names[source.unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    reference = Reference(model)
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    reference.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    reference.add_special_tokens([names[source.unknown], names[source.bos], names[source.eos]])
    return _with_specials(reference)


def scored_merges(names: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best score first, of equals the longer left part."""
    plain = {name: i for i, name in enumerate(names) if types[i] == NORMAL}
    pairs = [
        (scores[token], len(name[:cut]), name[:cut], name[cut:])
        for name, token in plain.items()
        for cut in range(1, len(name))
        if name[:cut] in plain and name[cut:] in plain
    ]
    pairs.sort(key=lambda pair: pair[:2], reverse=True)
    return [pair[2:] for pair in pairs]


FAMILIES: dict[str, Callable[[], tuple[Source, Reference]]] = {
    "llama-bpe": lambda: trained_bytes("llama-bpe"),
    "gpt-2": lambda: trained_bytes("gpt-2"),
    "smollm": lambda: trained_bytes("smollm"),
    "llama": lambda: (trained_pieces("bpe")[0], pieces_reference(trained_pieces("bpe")[0])),
    "t5": lambda: (trained_pieces("unigram")[0], pieces_reference(trained_pieces("unigram")[0])),
}
