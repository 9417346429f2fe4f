"""Mixed text for tokenizer tests: made from a seed and from Python's own documentation and sources."""

import argparse
import inspect
import random
import textwrap
from collections.abc import Callable, Sequence
from pydoc_data import topics

MANUAL = "\n".join(topics.topics[name] for name in sorted(topics.topics))
CODE = inspect.getsource(argparse) + inspect.getsource(textwrap) + inspect.getsource(random)

FRENCH = """
L'hiver, quand la neige couvre le glacier, les guides attendent que la trace gèle ; personne n'ose, avant
l'aube, s'engager sur l'arête. « Qu'est-ce que c'est ? » demanda-t-il. Aujourd'hui, c'était peut-être
l'œuvre d'un naïf : où donc était passée la corde ? Ils l'ont d'abord cherchée près du refuge, puis au-delà
du col, jusqu'à 3 842 mètres. Dès qu'il fut là-haut, Noël s'aperçut que l'été s'achevait ; le cœur léger, il
prit 12,50 € et s'en alla. Ça va ? Bien sûr que non ! N'empêche, d'après l'aïeul, le maïs ne mûrit guère à
cette altitude — n'est-ce pas ?
"""
CONTRACTIONS = "it's IT'S we'll WE'LL 'Ll they've THEY'VE I'm I'd d'Re o'ſa ‘s 't' '' 'sſ x'Sy n'l l'L a'"
LOOKALIKES = (
    "<s> </s> <unk> <|im_start|> <|im_end|> <|endoftext|> <0x41> <0xE2> ▁a ▁▁ [PAD] <|im_ <think> @@ "
    "<|im_start|>user"
)
SPACES = (
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    " \n ",
    "   \t",
    "\u00a0",
    "\u2003\u2003",
    "\u3000",
    "\v",
    "\x85",
)
EMOJI = "🧗🏽‍♀️ 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 🇨🇭🇮🇹 ❤️‍🔥 ☕ 😀😀😀 👍🏿 1️⃣ ©️ ™"
RANGES = {
    "cjk": ((0x4E00, 0x9FFF), (0x3041, 0x30FF), (0x3000, 0x301F), (0xAC00, 0xD7A3), (0xFF01, 0xFF5E)),
    "arabic": ((0x0621, 0x064A), (0x064B, 0x0652), (0x0660, 0x0669), (0x20, 0x20), (0x05D0, 0x05EA)),
    "indic": ((0x0905, 0x094D), (0x0966, 0x096F), (0x0E01, 0x0E5B), (0x20, 0x20)),
    "numbers": ((0x30, 0x39), (0x30, 0x39), (0x2150, 0x2189), (0xB2, 0xB3), (0x20, 0x20), (0x1D7CE, 0x1D7FF)),
    "symbols": ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x2190, 0x22FF), (0x0A, 0x0A), (0x20, 0x20)),
    "any": ((0x00, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x10FFFF)),
}
# Numbers of Unicode 17. In the `tokenizers` package regular expressions are of Unicode 16, Digits of 17.
YOUNG_DIGITS = (range(0x11DE0, 0x11DEA), range(0x16FF4, 0x16FF7))
Maker = Callable[[random.Random, int], str]


def _slice_of(text: str) -> Maker:
    def make(rng: random.Random, length: int) -> str:
        start = rng.randrange(len(text))
        return text[start : start + length]

    return make


def _words_of(text: str, between: Sequence[str]) -> Maker:
    words = text.split()

    def make(rng: random.Random, length: int) -> str:
        return "".join(rng.choice(words) + rng.choice(between) for _ in range(length // 5))

    return make


def _characters_of(name: str) -> Maker:
    def make(rng: random.Random, length: int) -> str:
        codes = (rng.randint(*rng.choice(RANGES[name])) for _ in range(length))
        return "".join(chr(code) for code in codes if not any(code in block for block in YOUNG_DIGITS))

    return make


def _combining(rng: random.Random, length: int) -> str:
    """Letters under piles of marks, and marks with nothing below."""
    marks = [chr(code) for code in range(0x300, 0x370)]
    return "".join(
        rng.choice("aeioun ñǅ'\n") + "".join(rng.choices(marks, k=rng.randrange(4)))
        for _ in range(length // 3)
    )


def _replaced(rng: random.Random, length: int) -> str:
    """Bytes that are no UTF-8 as a program that only takes text would see them."""
    return bytes(rng.choice((rng.randrange(256), rng.randrange(32, 127))) for _ in range(length)).decode(
        "utf-8", "replace"
    )


def _run(rng: random.Random, length: int) -> str:
    """One thing over and over."""
    return rng.choice(["a", "ab", " ", "\n", "é", "=", "7", "漢", "🧗", "\u0301", "'s", " \n"]) * (
        length // 2
    )


MAKERS: tuple[tuple[int, Maker], ...] = (
    (6, _slice_of(MANUAL)),
    (5, _slice_of(CODE)),
    (5, _words_of(FRENCH, (*[" "] * 8, "\n", "\u00a0", "  "))),
    (2, _words_of(CONTRACTIONS, ["", " ", "\n"])),
    (1, _words_of(LOOKALIKES, ["", " "])),
    (2, _words_of(EMOJI, ["", " "])),
    (2, _words_of("a Mot 12 ! é 漢", SPACES)),
    *((2, _characters_of(name)) for name in RANGES),
    (2, _combining),
    (2, _replaced),
    (1, _run),
)


def documents(seed: int, characters: int) -> list[str]:
    """Texts of mixed kinds and lengths (0 to some 20,000), at least that many characters in all."""
    rng = random.Random(seed)
    weights, makers = zip(*MAKERS, strict=True)
    texts = ["", " ", "  ", "\n", "a", "'", "\ufffd", "\u2581", "é" * 3000]
    total = sum(map(len, texts))
    while total < characters:
        parts = rng.choices(makers, weights, k=rng.choice((1, 1, 2, 5, 40)))
        texts.append("".join(make(rng, rng.randrange(4, 1000)) for make in parts))
        total += len(texts[-1])
    return texts


def damaged(rng: random.Random, text: str) -> bytes:
    """A text's bytes with a few overwritten, cut out or doubled: hardly ever UTF-8."""
    data = bytearray(text.encode())
    for _ in range(1 + len(data) // 40):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = bytes(rng.choices((0x80, 0xBF, 0xC0, 0xE2, 0xED, 0xF4, 0xFF), k=1))
    return bytes(data)
