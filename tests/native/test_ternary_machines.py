"""The ternary engine's kernels on machines that this one is not, and under sanitizers:
tests/native/kernels_check.c.

AVX-VNNI runs with the same instruction as AVX-512VL encodes it, AMX on a model of its tiles in C
(native/src/kernels/tiles.h), ARM under an emulator of whole programs. None of this measures speed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cordee.engine.ternary import kernels
from ternary_models import FAMILIES, make_ternary

NATIVE = Path(__file__).resolve().parents[2] / "native"
MODELS_OF_MACHINES = ("-DCORDEE_TILE_MODEL", "-DCORDEE_EVEX_FOR_VEX")
# What the library is built with: the bits of floating-point sums depend on it.
FLAGS = (
    *(
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-ffp-contract=off",
        "-fexcess-precision=fast",
    ),
    *("-fno-math-errno", "-pthread", f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'src'}"),
)


def build(compiler: str, output: Path, *flags: str) -> Path:
    """kernels_check with the whole engine."""
    sources = [path for path in (NATIVE / "src").rglob("*.c") if path.parent.name != "tokenizer"]
    check = Path(__file__).with_name("kernels_check.c")
    command = [compiler, *FLAGS, *flags, *map(str, sorted(sources)), str(check), "-o", str(output), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def run(*command: object) -> list[str]:
    """The words that the program prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "avx512vnni" not in kernels():
        pytest.skip("AVX-VNNI's arithmetic is tried with AVX-512, which this CPU has not")
    compiler = os.environ.get("CC", "cc")
    return build(compiler, tmp_path_factory.mktemp("check") / "check", "-O1", *MODELS_OF_MACHINES)


def test_what_this_cpu_has_not_is_never_chosen() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ("avxvnni" in kernels()) <= ("avx_vnni" in flags)
    assert ("amx" in kernels()) <= ("amx_int8" in flags)


@pytest.mark.long
@pytest.mark.parametrize("is_amd", [0, 1])
def test_what_is_chosen_for_either_maker_gives_the_same_bits(is_amd: int, tmp_path: Path) -> None:
    check = build(os.environ.get("CC", "cc"), tmp_path / "check", "-O1", f"-DCORDEE_IS_AMD={is_amd}")
    assert run(check, "dots", 5) == list(kernels())


@pytest.mark.slow
def test_kernels_of_newer_cpus_give_the_same_bits(modelled: Path, tmp_path: Path) -> None:
    expected = ["amx", "avx512vnni", "avxvnni", "avx2", "scalar"]
    assert run(modelled, "dots", 1) == expected
    for family in ("llama", "bonsai-rotated", "maple"):
        make_ternary(family, tmp_path / "model.gguf")
        assert run(modelled, "logits", tmp_path / "model.gguf", "f16")[1:] == expected


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_give_the_same_bits_there(family: str, modelled: Path, tmp_path: Path) -> None:
    make_ternary(family, tmp_path / "model.gguf")
    for cache in ("f16", "int8"):
        run(modelled, "logits", tmp_path / "model.gguf", cache)


@pytest.mark.long
def test_arm_gives_the_bits_of_x86(modelled: Path, tmp_path: Path) -> None:
    """With the dot product of bytes, and on an older ARM without it; logits are compared across the two."""
    found = sorted(Path("/usr/bin").glob("aarch64-linux-gnu-gcc*[0-9c]"))
    compilers = [
        path for path in found if path.name.removeprefix("aarch64-linux-gnu-gcc").strip("-0123456789") == ""
    ]
    emulator = shutil.which("qemu-aarch64")
    if not compilers or emulator is None:
        pytest.skip("needs gcc-12-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    check = build(str(compilers[0]), tmp_path / "check", "-O2", "-static")
    for cpu, names in (("max", ["neon", "scalar"]), ("cortex-a53", ["scalar"])):
        emulated = (emulator, "-cpu", cpu, check)
        assert run(*emulated, "dots", 2) == names
        for family in FAMILIES:
            make_ternary(family, tmp_path / "model.gguf")
            for cache in ("f16", "int8"):
                arguments = ("logits", tmp_path / "model.gguf", cache)
                there, here = run(*emulated, *arguments), run(modelled, *arguments)
                assert there[1:] == names
                assert there[0] == here[0], (family, cache)


@pytest.mark.long
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    checks = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    check = build(os.environ.get("CC", "cc"), tmp_path / "check", *checks, *MODELS_OF_MACHINES)
    run(check, "dots", 3)
    for family in FAMILIES:
        make_ternary(family, tmp_path / "model.gguf")
        for cache in ("f16", "int8"):
            run(check, "logits", tmp_path / "model.gguf", cache)
            run(check, "states", tmp_path / "model.gguf", cache, 4)
