"""Model files mangled by a seed: headers damaged byte by byte, keys of other types, absurd numbers, and
vocabularies as `Original.mangled` changes them."""

from pathlib import Path
from random import Random

from gguf import GGMLQuantizationType, GGUFValueType

from model_files import ODD_FIELDS, Field, Original
from tiny import make_tiny

NUMBERS = (0, 1, 2, 7, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def make_originals(folder: Path) -> list[Original]:
    """Sound files of several architectures."""
    kind = GGMLQuantizationType.Q8_0
    names = ("llama", "gpt-oss", "gemma3", "deepseek2")
    return [
        Original(make_tiny(name, folder / f"{name}.gguf", layers=3, quantization=kind, tokenizer="bytes"))
        for name in names
    ]


def damage(random: Random, path: Path) -> None:
    """Change one to four places of a file's header, or cut the file."""
    data, end = bytearray(path.read_bytes()), 6000
    for _ in range(random.randint(1, 4)):
        at = random.randrange(end)
        match random.choice(["flip", "flip", "number", "insert", "delete", "cut"]):
            case "flip" if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case "number":
                data[at : at + 8] = random.choice(NUMBERS).to_bytes(8, "little")
            case "insert":
                data[at:at] = random.randbytes(random.randint(1, 9))
            case "delete":
                del data[at : at + random.randint(1, 9)]
            case "cut" if random.random() < 0.2:
                del data[at:]
    path.write_bytes(data)


def mangled(seed: int, originals: list[Original], path: Path) -> None:
    """Write the file of a seed."""
    random = Random(seed)
    original = random.choice(originals)
    keys = [*original.fields, "split.count", "split.no", "general.alignment", "cordee.ternary.version"]
    match random.choice(["type", "number", "missing", "bytes", "bytes", "vocabulary"]):
        case "type":
            original.write(path, {random.choice(keys): random.choice(ODD_FIELDS)})
        case "number":
            changes = {
                key: Field(GGUFValueType.UINT32, random.choice(NUMBERS)) for key in random.sample(keys, 2)
            }
            original.write(path, changes)
        case "missing":
            original.write(path, dict.fromkeys(random.sample(list(original.fields), 2)))
        case "bytes":
            original.write(path, {})
            damage(random, path)
        case _:
            original.write(path, original.mangled(seed))
