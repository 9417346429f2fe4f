"""Writes native/src/tokenizer/unicode.c: which characters are letters, numbers and white space.

Models' tokenizers split text by \\p{L}, \\p{N} and \\s of Oniguruma; the Unicode version below is that of the
`tokenizers` package that the tests compare with. Python's own `unicodedata` is of another version in most
Pythons, so this takes `unicodedata2`: `pip install unicodedata2==16.0.0`.
"""

import sys
from pathlib import Path

import unicodedata2

VERSION = "16.0.0"
TARGET = Path(__file__).resolve().parents[1] / "native" / "src" / "tokenizer" / "unicode.c"
BLOCK = 128  # UNICODE_BLOCK of parts.h: the smallest whose blocks a byte can number; 8 kB in all
LETTER, NUMBER, SPACE = 1, 2, 3  # enum character_class
# The property White_Space, which `unicodedata2` does not tell: separators and these control characters.
CONTROL_SPACES = {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x85}

HEAD = f"""\
/* Letters (L), numbers (N) and white space (White_Space) of Unicode {VERSION}.
 * Written by scripts/unicode_table.py; not to be edited. */
#include "parts.h"

"""


def class_of(code: int) -> int:
    """The class of a code point, as in enum character_class."""
    category = unicodedata2.category(chr(code))
    if code in CONTROL_SPACES or category[0] == "Z":
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(category[0], 0)


def packed(classes: list[int]) -> tuple[int, ...]:
    """Four classes to a byte, the first in the lowest bits."""
    return tuple(sum(classes[at + i] << 2 * i for i in range(4)) for at in range(0, len(classes), 4))


def rows(numbers: list[int]) -> str:
    """Numbers as the inside of a C array, wrapped."""
    lines = [numbers[at : at + 24] for at in range(0, len(numbers), 24)]
    return "".join(f"    {', '.join(map(str, line))},\n" for line in lines)


def source() -> str:
    """The C file."""
    classes = [class_of(code) for code in range(sys.maxunicode + 1)]
    used = max(code for code, kind in enumerate(classes) if kind) + 1
    end = -(-used // BLOCK) * BLOCK
    blocks = [packed(classes[at : at + BLOCK]) for at in range(0, end, BLOCK)]
    distinct = list(dict.fromkeys(blocks))
    assert len(distinct) <= 256, "a block's number no longer fits a byte"
    tables = "".join(f"    {{{', '.join(map(str, block))}}},\n" for block in distinct)
    return (
        HEAD
        + f"const uint32_t unicode_end = 0x{end:X};\n\n"
        + f"const uint8_t unicode_block_of[] = {{\n{rows([distinct.index(block) for block in blocks])}}};\n\n"
        + f"const uint8_t unicode_classes[][UNICODE_BLOCK / 4] = {{\n{tables}}};\n"
    )


if __name__ == "__main__":
    if unicodedata2.unidata_version != VERSION:
        sys.exit(
            f"unicodedata2 is of Unicode {unicodedata2.unidata_version}; install unicodedata2=={VERSION}"
        )
    TARGET.write_text(source(), encoding="utf-8")
    print(f"wrote {TARGET}", file=sys.stderr)
