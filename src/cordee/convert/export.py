"""A folder for an old machine: programs, model, a read-me in two languages, checksums.

The folder is to be copied, most likely by CD, to a machine that has neither network nor Cordée. It is written
completely or not at all. Its texts have the line ends and the encoding of Windows 98, which Linux can read,
too.
"""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import cordee
from cordee.convert.pentium2 import LAYOUT
from cordee.errors import BadRequest, SetupNeeded, UnsupportedModel
from cordee.files import atomic_folder
from cordee.models.gguf import Header

# What `make tiny` leaves in the build folder, by the name it gets in the exported folder.
PROGRAMS = {"cordee-tiny": "pentium2/cordee-tiny", "cordee-tiny.exe": "windows/cordee-tiny.exe"}
MODEL = "model.gguf"
TEXTS = ("README.TXT", "LISEZMOI.TXT")
TEXT_ENCODING = "cp1252"
CHECKSUMS, LIST = "SHA256SUMS", "FILES.TXT"
# A CD of 74 minutes: 333,000 sectors; a thousand of them are for its own tables.
SECTOR_BYTES = 2048
CD_BYTES = (333_000 - 1000) * SECTOR_BYTES
CHUNK_BYTES = 1 << 20
PROMPT = "Once upon a time"
TITLE_CHARS_MAX = 40  # a line of the texts

Progress = Callable[[int, int], None]


def build_folder() -> Path:
    """Where `make tiny` leaves the programs: `build` in the folder of Cordée's sources."""
    return Path(cordee.__file__).parents[2] / "build"


def export(
    header: Header,
    folder: Path,
    *,
    title: str | None = None,
    programs: Path | None = None,
    limit_bytes: int | None = CD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Write the folder, which must be new or empty; returns the bytes that its files take on a CD.

    `title` names the model if its file does not. `programs` is a build folder, by default `build_folder()`.
    `limit_bytes` is the most that the folder may take. `progress(done_bytes, total_bytes)` is called as it
    grows.

    Raises:
        UnsupportedModel: the model is not in the layout of a Pentium II.
        SetupNeeded: the programs have not been built.
        BadRequest: the folder is not empty, or would be too large.
        StorageFailed: it cannot be written.
    """
    if header.text("cordee.ternary.layout", "") != LAYOUT:
        raise UnsupportedModel(
            f"{header.name} is not a file for a Pentium II. Convert a ternary model: "
            f"cordee convert --target {LAYOUT} {header.path} -o FILE"
        )
    folder = folder.resolve()
    _check_place(folder)
    sources = _programs(programs or build_folder()) | {MODEL: header.path}
    nbytes = sum(_on_cd(path.stat().st_size) for path in sources.values())
    if limit_bytes is not None and nbytes > limit_bytes:
        raise BadRequest(
            f"The folder would take {nbytes / 1e6:.0f} MB and a CD holds {limit_bytes / 1e6:.0f} MB: "
            "take a smaller model, or add --any-size if it is not copied by CD.",
            "MODEL",
        )
    with atomic_folder(folder) as partial:
        _copy(sources, partial, progress)
        _write_texts(header, title or header.path.stem, partial)
        _write_lists(partial)
    return sum(_on_cd(path.stat().st_size) for path in folder.iterdir())


def _check_place(folder: Path) -> None:
    if not folder.parent.is_dir():
        raise BadRequest(f"There is no folder {folder.parent}: create it, or name another place.", "FOLDER")
    if folder.is_mount():
        raise BadRequest(f"{folder} is a whole disk: name a new folder on it.", "FOLDER")
    if folder.exists() and any(folder.iterdir()):
        raise BadRequest(f"{folder} exists and is not empty: name a new folder.", "FOLDER")


def _on_cd(nbytes: int) -> int:
    return -(-nbytes // SECTOR_BYTES) * SECTOR_BYTES


def _programs(folder: Path) -> dict[str, Path]:
    found = {name: folder / place for name, place in PROGRAMS.items()}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise SetupNeeded(
            f"The old machine's programs have not been built ({', '.join(missing)}). In Cordée's sources: "
            "apt-get install -y gcc-12-multilib libc6-dev-i386 gcc-mingw-w64-i686 && make tiny; "
            "if this program does not run from those sources, add --programs SOURCES/build."
        )
    return found


def _copy(sources: dict[str, Path], folder: Path, progress: Progress | None) -> None:
    done, total = 0, sum(path.stat().st_size for path in sources.values())
    for name, path in sources.items():
        with path.open("rb") as source, (folder / name).open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
        (folder / name).chmod(0o755 if name in PROGRAMS else 0o644)


def _write_texts(header: Header, title: str, folder: Path) -> None:
    facts = {
        "title": _title(header, title),
        "megabytes": f"{header.path.stat().st_size / 1e6:.1f}",
        "prompt": PROMPT,
    }
    for name in TEXTS:
        text = (files("cordee.convert") / "export_texts" / name).read_text(encoding="utf-8").format(**facts)
        _write(folder / name, text.replace("\n", "\r\n").encode(TEXT_ENCODING, errors="replace"))


def _title(header: Header, title: str) -> str:
    """The first line of what the file calls its model, or else of `title`."""
    lines = (header.text("general.name", "").strip() or title).splitlines()
    return lines[0][:TITLE_CHARS_MAX]


def _write_lists(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    rows = [f"{(folder / name).stat().st_size:>12}  {name}\r\n" for name in names]
    _write(folder / LIST, "".join(rows).encode("ascii"))
    sums = [f"{_sha256(folder / name)}  {name}\n" for name in sorted([*names, LIST])]
    _write(folder / CHECKSUMS, "".join(sums).encode("ascii"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)
