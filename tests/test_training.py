"""Training of story models, on tiny ones: the engine runs what was trained; a stopped run loses nothing.

Without torch (the extra `training`) these tests skip.
"""

import shutil
import signal
import struct
from collections import Counter
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra `training`)")

from cordee.engine.stage import StageConfig  # noqa: E402
from cordee.engine.ternary import TernaryStage  # noqa: E402
from cordee.engine.vocabulary import Vocabulary  # noqa: E402
from training.chat import END, end_with_a_sentence, packed, shape_story  # noqa: E402
from training.chat import read_model as read_chat_model  # noqa: E402
from training.corpus import Corpus, Lesson, Writer, likeliest, shards_in, write_corpus  # noqa: E402
from training.cut import Cut, cut, cut_of  # noqa: E402
from training.evaluate import figures, logits_of  # noqa: E402
from training.export import export  # noqa: E402
from training.llama2c import (  # noqa: E402
    BOS,
    FIRST_BYTE,
    Piece,
    read_model,
    read_pieces,
    story_texts,
    tensors,
)
from training.processes import TRAIN, Job, Writing, together, write_together  # noqa: E402
from training.recipe import Optimiser, Recipe, recipe  # noqa: E402
from training.storyteller import Storyteller, at_temperature, count_tokens  # noqa: E402
from training.student import Student, StudentShape, ternary, ternary_linear  # noqa: E402
from training.teacher import Teacher, TeacherShape  # noqa: E402
from training.train import Report, Run, divergence  # noqa: E402

VOCAB, WINDOW, LIKELIEST = 288, 24, 16
SHAPE = StudentShape(dim=32, hidden=48, layers=2, heads=2, vocab=VOCAB, context=WINDOW)
TINY = Recipe(
    name="tiny",
    title="Tiny",
    teacher="storyteller",
    seed=1,
    window=WINDOW,
    likeliest=LIKELIEST,
    shards=1,
    temperature=0.7,
    shape=SHAPE,
    optimiser=Optimiser(steps=6, batch=8, matrix_rate=0.01, rate=0.01, warmup=2, decay=0.5),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Random weights in llama2.c's format; two query heads share a key/value head."""
    shape, random = TeacherShape(16, 24, 2, 4, 2, VOCAB, 64), np.random.default_rng(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.bin"
    header = struct.pack("<7i", 16, 24, 2, 4, 2, VOCAB, 64)
    arrays = [random.standard_normal(size, dtype=np.float32) / 2 for size in tensors(shape).values()]
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return path


@pytest.fixture(scope="module")
def teacher(model) -> Teacher:
    return read_model(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """A folder with a corpus."""
    folder = tmp_path_factory.mktemp("run")
    write_corpus(Storyteller(model, WINDOW, LIKELIEST), folder / TRAIN, shards=range(1), seed=1)
    return folder


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    return Corpus(folder / TRAIN, seed=1)


def pieces() -> list[Piece]:
    letters = [bytes([97 + i % 26]) * (1 + i // 26) for i in range(VOCAB - 259)]
    texts = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256)), *letters]
    return [Piece(text, -float(index)) for index, text in enumerate(texts)]


def all_tokens(corpus: Corpus) -> torch.Tensor:
    return corpus.lesson(range(len(corpus))).tokens


def trained(folder: Path, corpus: Corpus, rules: Recipe = TINY) -> Run:
    run = Run(rules, folder, kind=torch.float32, compiled=False)
    run.train(corpus, lambda told: None)
    return run


def test_a_teacher_samples_what_its_logits_say(teacher) -> None:
    """With a KV cache it writes what it writes when it reads everything again for each token."""
    shaping = at_temperature(0.9)
    begins = torch.full((4, 1), BOS)
    written, odds = teacher.sample(begins, WINDOW, shaping, None, torch.Generator().manual_seed(1))
    generator, again = torch.Generator().manual_seed(1), begins
    for place in range(WINDOW):
        expected = torch.softmax(teacher.logits(again)[:, -1] / 0.9, -1)
        torch.testing.assert_close(odds[:, place], expected)
        again = torch.cat([again, torch.multinomial(expected, 1, generator=generator)], 1)
    assert torch.equal(written, again[:, 1:])
    assert len(written.unique()) > 10


def test_a_cut_teacher_writes_with_what_is_kept(model) -> None:
    """Its probabilities are the whole teacher's among the kept; it reads its own ids as the whole's."""
    whole = read_model(model)
    kept = torch.tensor([END, 7, 70, 270, 271])
    part = Teacher(whole.shape, whole.weights, kept)
    own = torch.tensor([[1, 3, 4, 2]])
    torch.testing.assert_close(part.logits(own), whole.logits(kept[own])[..., kept])
    prompts = torch.tensor([[5, 200], [9, 3]])
    written, odds = part.sample(prompts, 8, at_temperature(1.0), END, torch.Generator().manual_seed(2))
    assert odds.shape == (2, 8, 5)
    for row in written.tolist():
        ended = row.index(END) if END in row else len(row)
        assert set(row[ended:]) <= {END}


def test_a_batch_writes_what_each_would_alone(model) -> None:
    """However many have ended before; here all take the likeliest tokens, and one of seven is the end."""
    whole = read_model(model)
    part = Teacher(whole.shape, whole.weights, torch.tensor([END, 270, 271, 272, 273, 274, 275]))
    prompts = torch.arange(40, 140).view(20, 5)
    sample = partial(part.sample, shaping=at_temperature(1e-4), end=END, generator=torch.Generator())
    written, odds = sample(prompts, 30)
    lengths = set()
    for row, chances, prompt in zip(written, odds, prompts, strict=True):
        alone, alone_odds = sample(prompt[None], 30)
        assert torch.equal(row, alone[0])
        length = int((row != END).sum())
        torch.testing.assert_close(chances[: length + 1], alone_odds[0, : length + 1])
        lengths.add(length)
    assert len(lengths) > 3


def test_a_story_that_grew_too_long_ends_with_a_sentence() -> None:
    dot = torch.tensor([False, False, True, False])
    written = torch.tensor([[1, 2, 3, 2, 3], [1, 2, END, END, END], [1, 3, 1, 3, 1], [1, 1, 1, 1, 2]])
    odds = torch.full((4, 5, 4), 0.25)
    end_with_a_sentence(written, odds, dot)
    assert written[0].tolist() == [1, 2, 3, 2, END]
    assert odds[0, 4].tolist() == [1, 0, 0, 0]
    assert written[1:].tolist() == [[1, 2, END, END, END], [1, 3, 1, 3, 1], [1, 1, 1, 1, 2]]
    assert (odds[1:] == 0.25).all()


def test_repeats_are_punished_and_unlikely_tokens_left_out() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0, -8.0]]).log_softmax(-1)
    fresh = torch.softmax(shape_story(logits, torch.zeros(1, 0, dtype=torch.long)), -1)
    assert (fresh > 0).tolist() == [[True, True, False, False]]
    again = torch.softmax(shape_story(logits, torch.tensor([[0]])), -1)
    assert again[0, 0] < fresh[0, 0]


def test_stories_are_packed_with_what_follows_each_token() -> None:
    """Before each story comes the end token; after a story's last token the lesson is its end."""
    written = torch.tensor([[5, 6, END, END], [7, 8, 9, 4]])  # the second is cut off
    ids, odds = likeliest(torch.nn.functional.one_hot(written, 10).float(), 2)
    lesson = packed(written, ids, odds, window=7)
    assert lesson.tokens.tolist() == [[END, 5, 6, END, 7, 8, 9]]
    assert lesson.ids[0, :, 0].tolist() == [5, 6, END, 7, 8, 9, 4]
    assert packed(written, ids, odds, window=3).tokens.tolist() == [[END, 5, 6], [END, 7, 8]]


def test_a_cut_vocabulary_keeps_the_most_used_and_what_merges_into_it() -> None:
    tokens = ["<end>", *"abcdef", "ab", "cd", "abcd", "ef"]
    merges = ["a b", "c d", "ab cd", "e f"]
    counts = Counter({tokens.index("abcd"): 9, tokens.index("ef"): 5})
    kept, fitting = cut(tokens, merges, counts, end=0, size=10)
    assert [tokens[number] for number in kept] == ["<end>", *"abcdef", "ab", "cd", "abcd"]
    assert fitting == ["a b", "c d", "ab cd"]
    with pytest.raises(ValueError, match="11 tokens are in use"):
        cut(tokens, merges, counts, end=0, size=12)


def test_a_storyteller_s_stories_are_counted_by_another_tokenizer(corpus, tmp_path) -> None:
    """Windows become the stories in them, without the tokens between two."""
    path, texts = tmp_path / "pieces.bin", pieces()
    packed_pieces = (struct.pack("<fi", piece.score, len(piece.text)) + piece.text for piece in texts)
    path.write_bytes(struct.pack("<i", 8) + b"".join(packed_pieces))
    assert read_pieces(path, VOCAB) == texts
    window = np.array([BOS, 259, 260, BOS, FIRST_BYTE + ord("x"), 261])
    assert story_texts(texts, window) == ["ab", "xc"]
    counts = count_tokens(corpus, texts, lambda text: [len(text)])
    assert counts.total() >= len(corpus)


@pytest.mark.long
def test_the_starter_is_read_as_a_teacher(starter_path) -> None:
    """Dequantized, with its own RoPE base and shared key-value heads, it still knows facts."""
    vocabulary = Vocabulary(starter_path)
    texts = ["Once upon a time", "The capital of France is Paris", "one, two, three, four, five"]
    rows = [vocabulary.tokenize(text, add_bos=False) for text in texts]
    # The end token, the bytes, these and what merges into them.
    found = cut_of(starter_path, Counter(token for row in rows for token in row), 284)
    teacher = read_chat_model(starter_path, found)
    for row in rows:
        own = [found.kept.index(token) for token in row]
        assert teacher.logits(torch.tensor([own[:-1]]))[0, -1].argmax() == own[-1]


@pytest.mark.parametrize("layout", ["trit5", "pentium2"])
def test_the_engine_computes_what_was_trained(layout, corpus, tmp_path) -> None:
    """Logits of the engine and of torch differ by 2 % of the logits' spread at most. What is between them:
    keys and values in f16 or 13 bits, and activations at half a step that are rounded up here, down there."""
    student = trained(tmp_path, corpus).student
    path, lesson = tmp_path / "model.gguf", corpus.lesson(range(4))
    export(student, pieces(), TINY, path, layout)
    stage = TernaryStage(path, StageConfig(context=WINDOW, sequences=1))
    ours = torch.stack([logits_of(stage, row) for row in lesson.tokens])
    stage.close()
    with torch.no_grad():
        theirs = student(lesson.tokens.long())
    assert (ours / TINY.temperature - theirs).square().mean().sqrt() < 0.02 * theirs.std()
    assert figures(path, lesson, TINY.temperature).kl_nats == pytest.approx(
        divergence(theirs, lesson.ids.long(), lesson.odds.float()).item(), rel=0.01
    )


def test_a_vocabulary_of_pieces_works_in_the_file(corpus, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    export(Student(SHAPE), pieces(), TINY, path, "pentium2")
    vocabulary = Vocabulary(path)
    assert (vocabulary.bos, vocabulary.eos) == (BOS, BOS)
    assert vocabulary.tokenize("ab", add_bos=True)[0] == BOS
    assert vocabulary.piece(260) == b"b"


def test_a_cut_vocabulary_works_in_the_file(tmp_path) -> None:
    letters = [chr(number) for number in range(33, 127)]
    texts = ["<|endoftext|>", *letters, "\u0120", "ab", "\u0120ab"]
    texts += [f"<{number}>" for number in range(VOCAB - len(texts))]
    found = Cut(list(range(VOCAB)), texts, ["a b", "\u0120 ab"], "smollm")
    path = tmp_path / "model.gguf"
    export(Student(SHAPE), found, TINY, path, "trit5")
    vocabulary = Vocabulary(path)
    assert (vocabulary.bos, vocabulary.eos) == (END, END)
    tokens = vocabulary.tokenize("ab abc", add_bos=True)
    assert [vocabulary.piece(token) for token in tokens] == [b"", b"ab", b" ab", b"c"]


def test_a_stopped_run_continues_as_if_it_had_not_been(corpus, tmp_path) -> None:
    """Stopped in its second step and started again, it ends with the weights of a run that was not."""
    stopped = Run(TINY, tmp_path / "stopped", kind=torch.float32, compiled=False)
    reading = corpus.batch

    def asked(step: int, size: int) -> Lesson:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return reading(step, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "batch", asked)
        stopped.train(corpus, lambda told: None)
    assert stopped.step == 2
    again, whole = trained(tmp_path / "stopped", corpus), trained(tmp_path / "whole", corpus)
    assert again.step == whole.step == TINY.optimiser.steps
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name


@pytest.mark.long
def test_two_processes_write_what_one_does(model, tmp_path) -> None:
    write_corpus(Storyteller(model, WINDOW, LIKELIEST), tmp_path / "one", shards=range(3), seed=1)
    told = []
    writer = partial(Storyteller, model, WINDOW, LIKELIEST)
    write_together(Writing(writer, tmp_path / "two", 3, 1, 2), lambda *done: told.append(done))
    assert torch.equal(*(all_tokens(Corpus(tmp_path / name, 1)) for name in ("one", "two")))
    assert told[-1] == (3, 3)


class Faulty:
    """A teacher that no process but the first can have."""

    def __call__(self) -> Writer:
        if torch.multiprocessing.parent_process() is not None:
            raise OSError("no memory")
        return lambda generator: Lesson(*(torch.zeros(1, 2, dtype=torch.uint16),) * 3)


@pytest.mark.long
def test_a_process_that_fails_is_reported(tmp_path) -> None:
    with pytest.raises(ChildProcessError, match="run the verb again"):
        write_together(Writing(Faulty(), tmp_path, 3, 1, 2), lambda *done: None)
    assert [path.name for path in shards_in(tmp_path)] == ["shard-0000.npy", "shard-0002.npy"]


def test_a_corpus_of_another_size_is_not_the_recipe_s(folder) -> None:
    rules = msgspec.structs.replace(TINY, shards=2)
    with pytest.raises(ValueError, match="holds 1 shards and the recipe wants 2"):
        together(Job(rules, folder, torch.float32, False, 1), lambda told: None)


@pytest.mark.long
def test_two_processes_learn_what_one_does(folder, corpus, tmp_path) -> None:
    """They share each step's windows: sums of floats in another order, and what roundings make of that."""
    shutil.copytree(folder, tmp_path / "two")
    told = []
    together(Job(TINY, tmp_path / "two", torch.float32, False, 2), told.append)
    assert [report.step for report in told] == [TINY.optimiser.steps]
    alone: list[Report] = []
    Run(TINY, tmp_path / "one", kind=torch.float32, compiled=False).train(corpus, alone.append)
    assert told[0].loss == pytest.approx(alone[0].loss, rel=0.01)
    assert Run(TINY, tmp_path / "two", kind=torch.float32, compiled=False).step == TINY.optimiser.steps


def test_training_brings_the_student_nearer(corpus, tmp_path) -> None:
    rules = msgspec.structs.replace(TINY, optimiser=msgspec.structs.replace(TINY.optimiser, steps=60))
    found = {}
    for name, student in {"new": Student(SHAPE), "old": trained(tmp_path, corpus, rules).student}.items():
        export(student, pieces(), TINY, tmp_path / name, "pentium2")
        found[name] = figures(tmp_path / name, corpus.lesson(range(40)), TINY.temperature)
    assert found["old"].kl_nats < 0.7 * found["new"].kl_nats
    assert found["old"].same_top1 > found["new"].same_top1
    assert found["old"].teacher_perplexity < found["old"].perplexity < found["new"].perplexity


def test_the_divergence_of_all_tokens_is_that_of_the_distributions() -> None:
    """For listed tokens only it is no larger: all others count as one token."""
    torch.manual_seed(1)
    ours, theirs = torch.randn(3, 4, 9), torch.randn(3, 4, 9)
    expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()
    best = theirs.softmax(-1).topk(9, -1)
    assert divergence(ours, best.indices, best.values) == pytest.approx(expected.item(), abs=1e-5)
    part = divergence(ours, best.indices[..., :4], best.values[..., :4])
    assert 0 < part < expected
    assert divergence(theirs, best.indices[..., :4], best.values[..., :4]) == pytest.approx(0, abs=1e-5)


def test_gradients_pass_the_roundings_as_if_they_were_not_there() -> None:
    """Of sum(y * g) for y = x @ w: the gradients are those of the product of what x and w were rounded to."""
    torch.manual_seed(1)
    x, w, g = torch.randn(5, 16), torch.randn(8, 16), torch.randn(5, 8)
    x.requires_grad_(), w.requires_grad_()
    (ternary_linear(x, w, torch.float32) * g).sum().backward()
    t, scale = ternary(w.detach())
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(x.grad, g @ (t * scale))
    torch.testing.assert_close(w.grad, g.T @ ((x.detach() / step).round() * step))


def test_a_corpus_is_its_seeds(model, corpus, tmp_path) -> None:
    """Written again it is the same, another seed gives another; each pass over it is a new order of all."""
    writer, rows = Storyteller(model, WINDOW, LIKELIEST), all_tokens(corpus)
    write_corpus(writer, tmp_path / "same", shards=range(2), seed=1)
    write_corpus(writer, tmp_path / "other", shards=range(1), seed=2)
    assert torch.equal(all_tokens(Corpus(tmp_path / "same", 1))[: len(rows)], rows)
    assert not torch.equal(all_tokens(Corpus(tmp_path / "other", 1)), rows)
    passes = [
        torch.cat([corpus.batch(step, 64).tokens for step in steps]) for steps in (range(4), range(4, 8))
    ]
    assert not torch.equal(*passes)
    for read in passes:
        assert sorted(read.tolist()) == sorted(rows.tolist())


@pytest.mark.parametrize("name", ["story-small", "story"])
def test_recipes_are_valid(name) -> None:
    found = recipe(name)
    assert found.name == name
    assert found.window <= found.shape.context
    factors = [found.optimiser.factor(step) for step in range(found.optimiser.steps)]
    assert max(factors) == 1 and factors[-1] < 0.01 and min(factors) > 0
