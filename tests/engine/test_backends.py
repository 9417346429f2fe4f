"""Which CPU backend of a libllama with several is taken; these libraries are small ones of its interface."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from cordee.engine.llama import backends
from cordee.errors import BadRequest

# Scores as ggml gives them: 0 where the processor lacks something.
SCORES = {"x64": 1, "haswell": 64, "zen4": 400, "sapphirerapids": 0}
REGISTRY = """
static int count;
unsigned long ggml_backend_reg_count(void) { return count; }
void *ggml_backend_load(const char *path) { count++; return count ? &count : 0; }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries."""
    place = tmp_path_factory.mktemp("libraries")
    compiler = shutil.which("cc")
    assert compiler is not None, "set-up needs one, too"

    def build(name: str, text: str) -> None:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(place / name)]
        subprocess.run(command, input=text.encode(), check=True)

    for variant, score in SCORES.items():
        build(f"libggml-cpu-{variant}.so", f"int ggml_backend_score(void) {{ return {score}; }}")
    build("libggml.so", REGISTRY)
    build("libllama.so", "int llama;")
    build("libggml-base.so", "int base;")
    return place


def loaded(folder: Path, tmp_path: Path) -> backends.Backends:
    """The backends, with a registry that nothing was loaded into yet."""
    registry = tmp_path / "fresh.so"
    shutil.copy(folder / "libggml.so", registry)
    return backends.load(folder, ctypes.CDLL(str(registry)))


def test_the_best_that_the_machine_can_run(folder: Path, tmp_path: Path) -> None:
    used = loaded(folder, tmp_path)
    assert (used.cpu_variant, used.cpu_variants) == ("zen4", ("zen4", "haswell", "x64"))
    assert {path.name for path in used.files} == {
        *("libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu-zen4.so")
    }


def test_one_that_was_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = loaded(folder, tmp_path)
    monkeypatch.setenv(backends.VARIABLE, "common")
    (tmp_path / "again").mkdir()
    common = loaded(folder, tmp_path / "again")
    assert common.cpu_variant == backends.COMMON
    assert common.digest() != best.digest()


@pytest.mark.parametrize("name", ["sapphirerapids", "zen9", "../zen4"])
def test_one_that_the_machine_cannot_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(backends.VARIABLE, name)
    with pytest.raises(BadRequest, match="it can run zen4, haswell, x64"):
        loaded(folder, tmp_path)


def test_what_was_compiled_here_has_one_variant(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "libggml.so", tmp_path / "native.so")
    registry = ctypes.CDLL(str(tmp_path / "native.so"))
    registry.ggml_backend_load(b"inside")
    assert backends.load(folder, registry).cpu_variant == backends.NATIVE
    monkeypatch.setenv(backends.VARIABLE, "haswell")
    with pytest.raises(BadRequest, match="compiled for this machine"):
        backends.load(folder, registry)
