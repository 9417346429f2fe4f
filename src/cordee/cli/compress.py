"""`cordee eval` and `cordee compress`: what a model is worth, and a small one out of a large."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cordee.cli import options
from cordee.terminal import output

if TYPE_CHECKING:
    from cordee.models.gguf import Header


@click.command(name="eval")
@click.argument("model")
@click.option("--against", metavar="MODEL", help="The model it was made from: adds how near it is to that.")
@click.option("--text", metavar="FILE", help="The text to read; default: some English and French prose.")
@options.threads
@options.as_json
def evaluate(model: str, against: str | None, text: str | None, threads: int | None, as_json: bool) -> None:
    """Measure how good MODEL is on a text, and how large it is.

    MODEL is a model in the store, or a GGUF file. Perplexity is that of llama.cpp's llama-perplexity: windows
    of 512 tokens, the second half of each scored. Lower is better, among models with the same vocabulary.
    With --against: the KL divergence from that model's probabilities, and how often both find the same token
    most likely. Bits per weight count scales, embedding and head. With --json the last line is an object.
    """
    from cordee.compress.evaluate import default_text, read_text, size_of_model
    from cordee.compress.evaluate import evaluate as run
    from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, ENVIRONMENT

    os.environ |= ENVIRONMENT | BATCH_INVARIANT_ENVIRONMENT  # as in workers; libllama reads it when loaded
    header, original = _header(model), _header(against) if against else None
    read = default_text() if text is None else read_text(Path(text))
    with output.progress(f"reading with {model}") as progress:
        found = run(header, read, original=original, threads=threads, progress=progress)
    size = size_of_model(header)
    if as_json:
        facts = {"model": model, "original": against} | asdict(found)
        facts |= {"bytes": size.nbytes, "bits_per_weight": size.bits_per_weight}
        click.echo(json.dumps(facts | {"bits_per_layer_weight": size.bits_per_layer_weight}))
        return
    facts = [("perplexity", f"{found.perplexity:.2f}")]
    if found.perplexity_original is not None and found.kl is not None and found.same_top1 is not None:
        facts += [
            ("perplexity of the original", f"{found.perplexity_original:.2f}"),
            ("KL divergence", f"{found.kl:.4f}"),
            ("same top 1", f"{100 * found.same_top1:.1f} %"),
        ]
    facts += [
        ("scored tokens", str(found.tokens)),
        ("size", output.size(size.nbytes)),
        ("bits per weight", f"{size.bits_per_weight:.2f}, {size.bits_per_layer_weight:.2f} in the layers"),
    ]
    output.print_facts(facts)


@click.command()
@click.argument("model")
@click.option(
    "-o", "out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@click.option(
    "--method",
    type=click.Choice(["gptq", "fit", "absmean"]),
    default="gptq",
    show_default=True,
    help="Fit each matrix to the inputs it will have; or to itself, well or plainly (faster, much worse).",
)
@click.option(
    "--group",
    type=click.Choice(["64", "128", "256", "row"]),
    default="128",
    show_default=True,
    help="Neighbouring inputs that share a scale: fewer are better and take more room.",
)
@click.option(
    "--planes",
    type=click.IntRange(1, 3),
    default=1,
    show_default=True,
    help="Ternary matrices of which each matrix is the sum: better, and as many times as large.",
)
@click.option(
    "--rotate/--no-rotate",
    default=False,
    show_default=True,
    help="Spread outliers of inputs over many of them.",
)
@click.option(
    "--keep",
    metavar="PATTERN",
    multiple=True,
    help="Leave matrices at 8 bits: *.ffn_down, or blk.0.*; may be repeated.",
)
@click.option(
    "--head",
    type=click.Choice(["int8", "int6", "int4"]),
    default="int8",
    show_default=True,
    help="Precision of the output head.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="Text like what the model will read, 10,000 words or so; default: some English and French prose.",
)
@click.option(
    "--memory",
    "memory_bytes",
    metavar="SIZE",
    type=options.Size(),
    default="4GB",
    help="Memory to use; default: 4GB",
)
@options.pre
def compress(
    model: str,
    out: Path,
    method: Literal["gptq", "fit", "absmean"],
    group: str,
    planes: int,
    rotate: bool,
    keep: tuple[str, ...],
    head: str,
    calibration: str | None,
    memory_bytes: int,
    pre: str | None,
) -> None:
    """Turn an ordinary MODEL into a ternary one, without training.

    MODEL is a model in the store, a GGUF file, or a checkpoint of the hub: a folder with config.json,
    safetensors and tokenizer. Llama and SmolLM shapes are known. One layer is in memory at a time. It takes
    minutes for a small model and hours for a large one; after an interruption the same command goes on where
    it stopped. A model that is ternary already is written unchanged. docs/compress.md says what is lost:
    `cordee eval OUT --against MODEL` measures it.
    """
    from cordee.compress.compress import compress as run
    from cordee.compress.evaluate import read_text
    from cordee.compress.fitter import CompressOptions

    text = None if calibration is None else read_text(Path(calibration))
    span = 0 if group == "row" else int(group)
    settings = CompressOptions(method, span, planes, rotate, keep, head, text, memory_bytes)
    with output.progress(model) as progress:
        run(_path(model), out, settings, name=model, pre=pre, progress=progress, report=output.note)
    click.echo(f"{out}  {output.size(out.stat().st_size)}")


def _header(model: str) -> "Header":
    from cordee.models.gguf import read_header

    return read_header(_path(model), name=model)


def _path(model: str) -> Path:
    """Where a model is: a file or a folder of that name, or else in the store."""
    from cordee.cli.known import find
    from cordee.models.store import Store

    path = Path(model)
    return path if path.exists() else find(Store(), model).path
