"""`cordee eval`, `compress` and `distill`: what a model is worth, and a small one out of a large."""

from pathlib import Path
from typing import Any

import click

from cordee.cli import options
from cordee.compress import verbs
from cordee.distill import verbs as distilling

memory = click.option(
    "--memory", "memory_bytes", metavar="SIZE", type=options.Size(), default="4GB", help="Default: 4GB."
)


@click.command(name="eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@verbs.eval_options
@options.threads
@options.as_json
def evaluate(models: tuple[str, ...], against: str | None, **given: Any) -> None:
    """Measure how good MODELs are on a text, and how large they are.

    A MODEL is a model in the store, or a GGUF file. Perplexity is that of llama.cpp's llama-perplexity:
    windows of 512 tokens, the second half of each scored. Lower is better, among models with the same
    vocabulary. With --against: the KL divergence from that model's probabilities, and how often both find the
    same token most likely. Bits per weight count scales, embedding and head. With --json each model's last
    line is an object.
    """
    original = (against, _path(against)) if against else None
    verbs.show_evaluations([(model, _path(model)) for model in models], original, given)


@click.command()
@click.argument("model")
@verbs.compress_options
@memory
@click.option(
    "--size",
    "size_bytes",
    metavar="SIZE",
    type=options.Size(),
    help="Leave those matrices at 8 bits that lose most, up to a file of this size, such as 1.75GB.",
)
@options.pre
def compress(model: str, **given: Any) -> None:
    """Turn an ordinary MODEL into a ternary one, without training.

    MODEL is a model in the store, a GGUF file, or a checkpoint of the hub: a folder with config.json,
    safetensors and tokenizer; of the shape of Llama, SmolLM or Qwen3. One layer is in memory at a time. It
    takes minutes for a small model and hours for a large one; after an interruption the same command goes on
    where it stopped. A model that is ternary already is written unchanged. docs/compress.md says what is
    lost, and `cordee eval OUT --against MODEL` measures it.
    """
    verbs.run_compression(model, _path(model), given)


@click.command()
@click.argument("model", metavar="OUT")
@distilling.distill_options
@memory
@options.pre
def distill(model: str, original: str, **given: Any) -> None:
    """Train the ternary file OUT to be nearer to the model that it was compressed from.

    Each layer in turn learns to give what the original's layer gives on a text; one layer is in memory at a
    time, and no graphics card is used. OUT is replaced when all is done: hours, for a large model. After an
    interruption the same command goes on where it stopped. docs/compress.md says what it wins back.
    """
    distilling.run_distillation(model, (original, _path(original)), given)


def _path(model: str) -> Path:
    """Where a model is: a file or a folder of that name, or else in the store."""
    from cordee.cli.known import find
    from cordee.models.store import Store

    path = Path(model)
    return path if path.exists() else find(Store(), model).path
