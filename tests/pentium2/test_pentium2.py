"""`cordee-tiny` and the layout `pentium2`: no newer instructions, the same bits everywhere, plain errors.

test_pentium2_machine.py emulates the whole machine; here the program runs on an emulated CPU, or on this one.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.convert import pentium2
from cordee.convert.ternary_file import write
from cordee.engine.stage import Batch, StageConfig, batch_of_one
from cordee.engine.ternary import TernaryStage
from cordee.engine.vocabulary import Vocabulary
from cordee.errors import UnsupportedModel
from cordee.models.cards import cards
from make_model import SHAPES, RandomWeights, add_vocabulary, make_model
from pentium2_machine import ROOT, old_program
from ternary_models import FAMILIES, Weights

EXIT_FAILED, EXIT_USAGE = 1, 2
# Mnemonics of the Pentium Pro (i686) that gcc may use, and the MMX of a Pentium II that we use, as objdump
# spells them: Intel's manual of 1997 (order number 243191). FCMOVcc, CMOVcc, Jcc and SETcc are patterns.
INTEGER = """
adc add and bsf bsr bswap bt call cbtw clc cld cltd cmp cpuid cwtl dec div idiv imul inc jmp lea leave lods
mov movs movsbl movsbw movswl movzbl movzbw movzwl mul neg nop not or pop popf push pushf rcl rcr ret rol ror
sahf sar sbb scas shl shld shr shrd stos sub test xadd xchg xor rep repz repnz data16 cs
"""
CONDITIONAL = re.compile(r"(j|set|cmov|fcmov)n?(a|ae|b|be|c|e|g|ge|l|le|o|p|s|u|z)|jpo|jpe|jecxz")
X87 = re.compile(
    r"""
    f(add|sub|subr|mul|div|divr)(p|s|l)? | fi(add|sub|subr|mul|div|divr)(s|l) | fild(s|l|ll)?
    | fistp?(s|l|ll)? | f(ld|st|stp)(s|l|t)? | fld(1|z|cw|ln2) | fn?st(cw|sw)
    | fu?com(i|ip|p|pp|s|l|ps|pl)? | fxch | fchs | fabs | fsqrt | frndint | ftst | fxam
""",
    re.VERBOSE,
)
MMX = "emms movd movq pxor paddw paddd psubw pmullw pmaddwd punpcklbw punpckhbw punpcklwd punpckldq"
WITHOUT = "pshufw prefetcht0 movaps sfence movntq pmulhuw addss pextrw ud2 movnti lfence pause"


def is_of_a_pentium_2(mnemonic: str) -> bool:
    plain = {mnemonic, re.sub("[bwl]$", "", mnemonic)}
    known = {*INTEGER.split(), *MMX.split()}
    return bool(plain & known or CONDITIONAL.fullmatch(mnemonic) or X87.fullmatch(mnemonic))


def run(*command: str | Path, text: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def emulated(cpu: str) -> list[str]:
    if shutil.which("qemu-i386") is None:
        pytest.skip("no emulator: apt install qemu-user")
    return ["qemu-i386", "-cpu", cpu]


@pytest.fixture(scope="module")
def tiny() -> Path:
    """The program, built for this machine."""
    path = ROOT / "build" / "native" / "cordee-tiny"
    done = run("make", "-C", ROOT / "native", Path("..") / path.relative_to(ROOT))
    assert done.returncode == 0, done.stderr
    return path


class Restless(RandomWeights):
    """Random weights with a head of their own: with the embedding as its head, a model repeats its prompt."""

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        shift = 10**6 if name == "output.weight" else 0
        return super().rows(name, first + shift, last + shift)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of random weights: a shape that fills tiles and vectors, and one that does not."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {
        "stories": replace(SHAPES["15m"], layers=2, n_vocab=600),
        "ragged": replace(
            SHAPES["260k"], n_embd=84, n_ff=117, heads=7, kv_heads=7, head_dim=12, context=61, rope="neox"
        ),
    }
    for name, shape in shapes.items():
        model = replace(shape, layout=pentium2.LAYOUT)
        pentium2.write_pentium2(
            folder / f"{name}.gguf",
            model,
            Restless(model, 1),
            describe=lambda writer, model=model: add_vocabulary(writer, model.n_vocab),
        )
    return {path.stem: path for path in folder.iterdir()}


def mnemonics(folder: Path, objdump: str) -> set[str]:
    """The mnemonics in all objects of a build, prefixes included."""
    if shutil.which(objdump) is None:
        pytest.skip(f"no {objdump}: apt install binutils gcc-mingw-w64-i686")
    objects = sorted(folder.rglob("*.o"))
    assert len(objects) > 20, folder
    listing = run(objdump, "-d", "--no-show-raw-insn", *objects).stdout
    lines = re.findall(r"^ +[0-9a-f]+:\t(.+)$", listing, re.MULTILINE)
    words = set()
    for line in lines:
        first, *rest = line.split()
        words.add(first)
        if first.startswith(("rep", "lock", "data16", "cs")) and rest:
            words.add(rest[0])
    return words


@pytest.mark.parametrize(
    ("system", "objdump"),
    [
        ("pentium2", "objdump"),
        pytest.param("windows", "i686-w64-mingw32-objdump", marks=pytest.mark.slow),
    ],
)
def test_the_program_has_no_instruction_that_a_pentium_2_lacks(system: str, objdump: str) -> None:
    """Emulators run some that it lacks (pshufw, prefetch), so this reads the objects."""
    old_program(system)
    found = mnemonics(ROOT / "build" / system / "objects", objdump)
    assert {word for word in found if not is_of_a_pentium_2(word)} == set()
    assert {"pmaddwd", "fldcw", "cmp"} <= found  # these are the program's objects
    assert not any(map(is_of_a_pentium_2, WITHOUT.split()))


# What the program for Windows may import. The SDK's documentation says "Windows 95 or later" of each (of
# GetModuleHandleW Windows 98 has a stub that finds nothing). Of the C library it is what Visual C++ 4.2, the
# compiler of 1996, called from the start of a program on.
WINDOWS_98 = {
    "KERNEL32.dll": """
        CloseHandle CreateFileA CreateFileMappingA CreateThread DeleteCriticalSection EnterCriticalSection
        FreeLibrary GetFileSize GetLastError GetModuleHandleA GetModuleHandleW GetProcAddress GetStartupInfoA
        GetTickCount GlobalMemoryStatus InitializeCriticalSection IsDBCSLeadByteEx LeaveCriticalSection
        LoadLibraryA MapViewOfFile MultiByteToWideChar QueryPerformanceCounter QueryPerformanceFrequency
        SetConsoleOutputCP SetUnhandledExceptionFilter Sleep TlsGetValue UnmapViewOfFile VirtualProtect
        VirtualQuery WaitForSingleObject WideCharToMultiByte
    """,
    "msvcrt.dll": """
        __getmainargs __initenv __mb_cur_max __p__acmdln __p__commode __p__fmode __set_app_type
        __setusermatherr _amsg_exit _cexit _errno _initterm _iob _lock _onexit _unlock abort atoi calloc exit
        fflush fgets fprintf fputc fputs free fwrite localeconv malloc memchr memcmp memcpy memmove
        memset setlocale signal strchr strcmp strcspn strerror strlen strncmp strtol vfprintf wcslen
    """,
}


def test_windows_98_has_all_that_the_program_imports() -> None:
    program = old_program("windows")
    listing = run("i686-w64-mingw32-objdump", "-p", program).stdout
    tables = re.split(r"DLL Name: ", listing.partition("The Import Tables")[2])[1:]
    imported = {
        table.split()[0]: set(re.findall(r"^\t[0-9a-f]+\t +\d+ +(\w+)", table, re.MULTILINE))
        for table in tables
    }
    assert imported["KERNEL32.dll"] and imported.keys() == WINDOWS_98.keys()
    assert {dll: names - set(WINDOWS_98[dll].split()) for dll, names in imported.items()} == {
        dll: set() for dll in WINDOWS_98
    }
    assert re.search(r"MajorSubsystemVersion\s+4\n", listing)  # Windows 95 refuses programs that ask for more
    assert "(Windows CUI)" in listing


@pytest.mark.long
def test_our_own_code_can_be_built_for_a_386(models: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    """Instructions of later processors are only in the C library."""
    old_program()  # or skip
    program = tmp_path / "pentium2" / "cordee-tiny"
    done = run("make", "-C", ROOT / "native", f"build={tmp_path}", "old_cpu=i386", program)
    assert done.returncode == 0, done.stderr
    found = mnemonics(tmp_path / "pentium2" / "objects", "objdump")
    later = re.compile(r"f?cmov\w+|fu?comip?|bswap|xadd|cmpxchg\w*")
    assert "fldcw" in found and {word for word in found if later.fullmatch(word)} == set()
    words = (models["stories"], "once upon", "-n", "20", "--greedy")
    assert run(*emulated("pentium2,-mmx"), program, *words).stdout == run(tiny, *words).stdout


@pytest.mark.parametrize(("cpu", "kernels"), [("pentium2", "mmx"), ("pentium2,-mmx", "scalar")])
def test_the_self_test_chooses_the_kernels_of_the_processor_and_passes(cpu: str, kernels: str) -> None:
    done = run(*emulated(cpu), old_program(), "--selftest")
    assert done.returncode == 0, done.stdout
    assert f"by {kernels}: right" in done.stdout


@pytest.mark.parametrize("name", ["stories", "ragged"])
def test_every_machine_gives_the_same_text(models: dict[str, Path], tiny: Path, name: str) -> None:
    """With random sampling: the largest logit alone would hide small differences."""
    words = (models[name], "once upon a time", "-n", "40", "--seed", "5")
    here = run(tiny, *words)
    assert here.returncode == 0, here.stderr
    assert len(set(here.stdout)) > 10
    for cpu in ("pentium2", "pentium2,-mmx"):
        there = run(*emulated(cpu), old_program(), *words)
        assert (there.returncode, there.stdout) == (0, here.stdout)


@pytest.mark.parametrize("name", ["stories", "ragged"])
def test_the_ternary_engine_gives_the_text_of_the_program(
    models: dict[str, Path], tiny: Path, name: str
) -> None:
    beginning, count = "once upon a time", 30
    printed = run(tiny, models[name], beginning, "-n", str(count), "--greedy").stdout
    vocabulary = Vocabulary(models[name])
    stage = TernaryStage(models[name], StageConfig(context=61, sequences=1, batch_rows=64, threads=2))
    tokens = list(vocabulary.tokenize(beginning, add_bos=True))
    prompt = len(tokens)
    rows = stage.decode(batch_of_one(tokens, 0, 0))
    while len(tokens) < prompt + count:
        tokens.append(int(rows[-1].argmax()))
        rows = stage.decode(batch_of_one(tokens[-1:], len(tokens) - 1, 0))
    stage.close()
    assert len(set(tokens[prompt:])) > 5
    assert printed == beginning + vocabulary.detokenize(tokens[prompt:]).decode(errors="replace")


@pytest.mark.parametrize("key", ["eos_token_id", "eot_token_id"])
def test_a_text_ends_where_the_model_ends_it(
    tiny: Path, models: dict[str, Path], tmp_path: Path, key: str
) -> None:
    words = ("once upon a time", "-n", "12", "--greedy")
    whole = run(tiny, models["stories"], *words).stdout
    model = replace(SHAPES["15m"], layers=2, n_vocab=600, layout=pentium2.LAYOUT)
    last = Vocabulary(models["stories"]).tokenize(whole, add_bos=True)[-1]

    def describe(writer: GGUFWriter) -> None:
        add_vocabulary(writer, model.n_vocab)
        writer.kv_data[0][f"tokenizer.ggml.{key}"] = GGUFValue(last, GGUFValueType.UINT32)

    pentium2.write_pentium2(tmp_path / "x.gguf", model, Restless(model, 1), describe=describe)
    ended = run(tiny, tmp_path / "x.gguf", *words)
    assert ended.returncode == 0
    assert len(ended.stdout) < len(whole) and whole.startswith(ended.stdout)


def uniform(state: int) -> float:
    """splitmix64 (https://prng.di.unimi.it/splitmix64.c): its highest 24 bits, as a number below 1."""
    z = state
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> shift) * factor % 2**64
    return ((z ^ z >> 31) >> 40) / 2**24


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sampling_follows_its_rule(tiny: Path, seed: int) -> None:
    """Tokens at least a tenth as likely as the most likely one, at a temperature of 0.7: here by numpy."""
    model = cards()["story-small"].path
    beginning, count = "Once upon a time", 60
    vocabulary = Vocabulary(model)
    stage = TernaryStage(model, StageConfig(context=128, sequences=1, batch_rows=16))
    tokens = list(vocabulary.tokenize(beginning, add_bos=True))
    prompt, state, surprises = len(tokens), seed, 0
    row = stage.decode(batch_of_one(tokens, 0, 0))[-1]
    while len(tokens) < prompt + count:
        likely = np.argsort(-row, kind="stable")
        likely = likely[row[likely] >= row.max() + np.log(0.1)][:40]
        shares = np.exp((row[likely] - row.max()) / 0.7).cumsum()
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        place = int(np.searchsorted(shares, uniform(state) * shares[-1], side="right"))
        surprises += place > 0
        tokens.append(int(likely[place]))
        row = stage.decode(batch_of_one(tokens[-1:], len(tokens) - 1, 0))[-1]
    stage.close()
    printed = run(tiny, model, beginning, "-n", str(count), "--seed", str(seed)).stdout
    assert printed == vocabulary.detokenize(tokens[1:]).decode().lstrip()
    assert surprises > count // 10


def test_a_seed_gives_the_same_text_again_and_another_seed_another(
    models: dict[str, Path], tiny: Path
) -> None:
    texts = [run(tiny, models["stories"], "the", "-n", "30", "--seed", seed).stdout for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def logits_of(path: Path, tokens: np.ndarray, **config: int) -> np.ndarray:
    stage = TernaryStage(
        path, StageConfig(context=64, sequences=2, batch_rows=config.get("rows", 64), threads=2)
    )
    rows = Batch(tokens, np.arange(len(tokens)), np.ones(len(tokens), np.int32), np.ones(len(tokens), bool))
    logits = stage.decode(rows)
    state = stage.export_sequence(1)
    stage.import_sequence(0, state)
    assert stage.export_sequence(0) == state
    again = stage.decode(batch_of_one([3], len(tokens), 0))
    assert np.array_equal(again, stage.decode(batch_of_one([3], len(tokens), 1)))
    stage.close()
    return np.concatenate([logits, again])


@pytest.mark.parametrize("name", ["stories", "ragged"])
def test_a_row_is_the_same_in_any_batch_and_after_a_move(models: dict[str, Path], name: str) -> None:
    tokens = np.random.default_rng(2).integers(3, 500, 45).astype(np.int32)
    alone = logits_of(models[name], tokens, rows=1)
    for _ in range(20):  # threads that disturb each other do so only sometimes
        assert np.array_equal(alone, logits_of(models[name], tokens))


class TernaryTables(Weights):
    """A family's random weights, with embedding and head ternary, as this layout needs them."""

    def __init__(self, model, seed: int) -> None:
        super().__init__(model, seed)
        for name in ("token_embd.weight", "output.weight"):
            self.arrays[name] = np.sign(self.arrays[name]) * np.float32(0.3)


@pytest.mark.parametrize("family", ["llama", "bitnet", "bitnet-silu"])
def test_it_computes_what_the_other_layouts_compute(tmp_path: Path, family: str) -> None:
    """Up to the rounding of keys and values; the logits of another model would not correlate."""
    model = replace(FAMILIES[family], head="int8", head_planes=1)
    weights = TernaryTables(model, 3)
    write(tmp_path / "modern.gguf", replace(model, layout="trit2"), weights)
    pentium2.write_pentium2(tmp_path / "old.gguf", model, weights)
    tokens = np.random.default_rng(4).integers(0, model.n_vocab, 40).astype(np.int32)
    modern, old = (logits_of(tmp_path / f"{name}.gguf", tokens) for name in ("modern", "old"))
    for ours, theirs in zip(old, modern, strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 230), st.integers(0, 2**32 - 1))
def test_weights_come_out_of_the_layout_as_they_went_in(rows: int, cols: int, seed: int) -> None:
    weights = np.random.default_rng(seed).integers(-1, 2, (rows, cols)).astype(np.int8)
    packed = pentium2.pack_rows(weights)
    assert packed.shape == (rows, pentium2.row_bytes(cols))
    assert packed.max() < 252 and (packed % 28 < 27).all()  # the tables have no other sums
    payload = np.concatenate([tile.reshape(-1) for tile in pentium2.tiles(packed)])
    assert np.array_equal(pentium2.unpack(payload, rows, cols), weights)


def test_what_is_not_ternary_is_refused_by_name(tmp_path: Path) -> None:
    model = FAMILIES["llama"]
    with pytest.raises(UnsupportedModel, match=r"token_embd\.weight is not ternary"):
        pentium2.write_pentium2(tmp_path / "x.gguf", model, Weights(model, 1))
    with pytest.raises(UnsupportedModel, match="8 bits"):
        pentium2.write_pentium2(tmp_path / "x.gguf", FAMILIES["trilm"], TernaryTables(FAMILIES["trilm"], 1))
    assert not (tmp_path / "x.gguf").exists()


def test_15_million_weights_take_less_than_6_megabytes(tmp_path: Path) -> None:
    make_model(tmp_path / "15m.gguf", replace(SHAPES["15m"], layout=pentium2.LAYOUT))
    try:
        done = run(old_program(), tmp_path / "15m.gguf", "", "-n", "127", "--greedy")
    except OSError:
        pytest.skip("this kernel runs no programs of 32 bits")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"memory ([\d.]+) MB", done.stderr)[1]) <= 6.0


def complaint(tiny: Path, *words: str | Path) -> str:
    """Its error message: one line, and nothing on standard output."""
    done = run(tiny, *words)
    assert (done.returncode, done.stdout) == (EXIT_FAILED, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("cordee-tiny: ")
    return done.stderr


def test_files_that_are_no_models_are_refused_in_a_sentence(
    models: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    whole = models["stories"].read_bytes()
    file = tmp_path / "x.gguf"
    assert "cannot be opened" in complaint(tiny, file, "a")
    file.write_bytes(b"")
    assert "empty" in complaint(tiny, file, "a")
    file.write_text("This is a letter to somebody.\n" * 99)
    assert "no GGUF file" in complaint(tiny, file, "a")
    model = replace(SHAPES["260k"], layout=pentium2.LAYOUT)
    pentium2.write_pentium2(file, model, RandomWeights(model, 0))
    assert "no tokenizer" in complaint(tiny, file, "a")
    write(file, replace(SHAPES["260k"], layout="trit2"), RandomWeights(SHAPES["260k"], 0))
    assert "no tokenizer" in complaint(tiny, file, "a")
    for nbytes in (3, 30, 3000, len(whole) // 2, len(whole) - 20_000):
        file.write_bytes(whole[:nbytes])
        complaint(tiny, file, "a")


def test_a_wrong_command_line_shows_the_usage(models: dict[str, Path], tiny: Path) -> None:
    for words in ((), ("-n",), ("m", "-n", "x"), ("m", "--loud"), ("m", "a", "b"), ("m", "--seed", "-1")):
        done = run(tiny, *words)
        assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
        assert done.stderr.startswith("usage: cordee-tiny MODEL")
    shown = run(tiny, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Continue un texte" in shown.stdout


def test_a_text_that_does_not_fit_is_refused(models: dict[str, Path], tiny: Path) -> None:
    assert "1 to 61 would" in run(tiny, models["ragged"], "the " * 100, "-n", "3").stderr
    assert "longer than" in run(tiny, models["stories"], "x" * 9000, "-n", "3").stderr


def test_without_a_text_it_asks_for_one_again_and_again(models: dict[str, Path], tiny: Path) -> None:
    words = (models["stories"], "-n", "9", "--greedy")
    done = run(tiny, *words, text="once upon\nthe end\n\nnever read\n")
    assert done.returncode == 0
    alone = [run(tiny, models["stories"], line, *words[1:]).stdout for line in ("once upon", "the end")]
    assert done.stdout == "".join(alone)
    assert done.stderr.count("> ") == 3 and done.stderr.count("tokens/s]") == 0


def test_a_conversation_that_grows_too_long_begins_anew(tiny: Path, tmp_path: Path) -> None:
    """A model with the turns of ChatML, in a context that holds one turn but not two."""
    model = replace(SHAPES["15m"], layers=2, n_vocab=600, context=64, layout=pentium2.LAYOUT)

    def describe(writer: GGUFWriter) -> None:
        add_vocabulary(writer, model.n_vocab)
        for token, text in ((400, "<|im_start|>"), (401, "<|im_end|>")):
            writer.kv_data[0]["tokenizer.ggml.tokens"].value[token] = text
            writer.kv_data[0]["tokenizer.ggml.token_type"].value[token] = int(TokenType.CONTROL)

    pentium2.write_pentium2(tmp_path / "x.gguf", model, Restless(model, 1), describe=describe)
    words = (tmp_path / "x.gguf", "-n", "9", "--greedy")
    alone = [run(tiny, words[0], line, *words[1:]) for line in ("hello", "the end")]
    assert all(done.returncode == 0 and done.stdout for done in alone)
    chat = run(tiny, *words, text="hello\nthe end\n")
    assert chat.stderr.count("What was said before is forgotten") == 1
    assert chat.stdout == "".join(done.stdout for done in alone)
    assert "longer than" in run(tiny, words[0], "x" * 8190, "-n", "3").stderr
