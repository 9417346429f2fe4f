"""The verbs of training: `python -m training [cut] | corpus | train | export | evaluate`, in that order."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import msgspec
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cordee.engine.vocabulary import Vocabulary
from training.chat import Chat
from training.corpus import Corpus, Writer
from training.cut import Cut, cut_of
from training.evaluate import figures
from training.export import export as write_model
from training.llama2c import read_pieces
from training.processes import HELD_OUT, TRAIN, Job, Writing, together, write_together
from training.recipe import Recipe
from training.recipe import recipe as read_recipe
from training.storyteller import Storyteller, count_tokens
from training.train import CHECKPOINT, Report, Run

CUT = "cut.json"
HELD_OUT_SHARDS = 1
PIECES = 512  # in tok512.bin

_existing = click.Path(exists=True, path_type=Path)
_recipe = click.argument("recipe", callback=lambda _context, _parameter, name: read_recipe(name))
_folder = click.option(
    "--folder", type=click.Path(path_type=Path), required=True, help="The folder of corpus and checkpoints."
)
_processes = click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=os.cpu_count(),
    show_default=True,
    help="How many processes share the work; each that runs a chat model takes 6 GB of memory.",
)
_teacher = click.option("--teacher", type=_existing, required=True, help="stories260K.bin, or a GGUF file.")


@click.group()
def main() -> None:
    """Train small ternary story models from an existing teacher. Every verb resumes where it was stopped."""
    torch.set_num_threads(1)


@main.command()
@_recipe
@_teacher
@_folder
@click.option("--stories", type=_existing, required=True, help="The folder of a storyteller's corpus.")
@click.option("--pieces", type=_existing, required=True, help="tok512.bin, the vocabulary of stories260K.")
def cut(recipe: Recipe, teacher: Path, folder: Path, pieces: Path, stories: Path) -> None:
    """Cut a chat teacher's vocabulary to what a storyteller's stories use."""
    vocabulary = Vocabulary(teacher)
    counts = count_tokens(
        Corpus(stories / TRAIN, recipe.seed),
        read_pieces(pieces, PIECES),
        lambda text: vocabulary.tokenize(text, add_bos=False),
    )
    folder.mkdir(parents=True, exist_ok=True)
    found = cut_of(teacher, counts, recipe.shape.vocab)
    (folder / CUT).write_bytes(msgspec.json.encode(found))
    share = sum(counts[number] for number in found.kept) / counts.total()
    click.echo(f"{len(found.kept)} tokens are {share:.1%} of the {counts.total():,} in the stories")


@main.command()
@_recipe
@_teacher
@_folder
@_processes
def corpus(recipe: Recipe, teacher: Path, folder: Path, processes: int) -> None:
    """Have the teacher write what the student learns from, and what it is evaluated on."""
    writer = _writer(recipe, teacher, folder)
    splits = ((HELD_OUT, HELD_OUT_SHARDS, recipe.seed + 1), (TRAIN, recipe.shards, recipe.seed))
    with _progress(recipe.name) as show:
        for split, shards, seed in splits:
            writing = Writing(writer, folder / split, shards, seed, min(processes, shards))
            with _plainly():
                write_together(writing, partial(show, split))


@main.command()
@_recipe
@_folder
@_processes
@click.option("--kind", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Let torch compile the step; needs a C++ compiler.")
def train(recipe: Recipe, folder: Path, processes: int, kind: str, compiled: bool) -> None:
    """Train, from the last checkpoint on. Ctrl-C or SIGTERM writes a checkpoint first."""
    with _progress(recipe.name) as show:

        def show_report(report: Report) -> None:
            show(f"loss {report.loss:.4f}, {report.cpu_seconds:.0f} CPU s", report.step, report.steps)

        with _plainly():
            together(Job(recipe, folder, getattr(torch, kind), compiled, processes), show_report)


@main.command()
@_recipe
@_folder
@click.option("--pieces", type=_existing, help="tok512.bin, if the teacher was stories260K.")
@click.option("--layout", type=click.Choice(["trit5", "pentium2"]), default="pentium2", show_default=True)
@click.argument("model", type=click.Path(path_type=Path))
def export(recipe: Recipe, folder: Path, pieces: Path | None, layout: str, model: Path) -> None:
    """Write the student as a model file for the ternary engine."""
    if not (folder / CHECKPOINT).exists():
        raise click.ClickException(f"{folder} holds no {CHECKPOINT}: train first.")
    run = Run(recipe, folder, kind=torch.float32, compiled=False)
    vocabulary = read_pieces(pieces, PIECES) if pieces else _cut(folder)
    write_model(run.student, vocabulary, recipe, model, layout)
    click.echo(f"{model}  {model.stat().st_size:,} bytes, {recipe.shape.weights:,} weights, step {run.step}")


@main.command()
@_recipe
@_folder
@click.argument("model", type=_existing)
def evaluate(recipe: Recipe, folder: Path, model: Path) -> None:
    """Compare a model file with its teacher, on the ternary engine and on text that it has not seen."""
    held_out = Corpus(folder / HELD_OUT, recipe.seed)
    found = figures(model, held_out.lesson(range(len(held_out))), recipe.temperature)
    for name, value in vars(found).items():
        click.echo(f"{name:20} {value:.4g}")


def _writer(recipe: Recipe, teacher: Path, folder: Path) -> Callable[[], Writer]:
    if recipe.teacher == "storyteller":
        return partial(Storyteller, teacher, recipe.window, recipe.likeliest)
    return partial(Chat, teacher, _cut(folder), recipe.window, recipe.likeliest)


def _cut(folder: Path) -> Cut:
    if not (folder / CUT).exists():
        raise click.ClickException(f"{folder} holds no {CUT}: run the cut verb first.")
    return msgspec.json.decode((folder / CUT).read_bytes(), type=Cut)


@contextmanager
def _plainly() -> Iterator[None]:
    """Report what the user can fix without a traceback."""
    try:
        yield
    except (ValueError, ChildProcessError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar: show(text, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None)
        yield lambda text, done, total: bar.update(
            task, completed=done, total=total, description=f"{title}: {text}"
        )


if __name__ == "__main__":
    main()
