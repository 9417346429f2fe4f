"""Several processes of this machine: in a training run they synchronise after every step, of a corpus each
writes its share."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from training.corpus import Corpus, Writer, shards_in, write_corpus
from training.recipe import Recipe
from training.train import LOG, Report, Run, log_to

# How long a process waits for the others: they may be stopped (SIGSTOP) for hours while the machine does
# other work.
WAIT = timedelta(days=7)
TRAIN, HELD_OUT = "train", "held-out"  # folders of a corpus


@dataclass(frozen=True)
class Job:
    """The parameters of all processes; see `Run`. `folder` holds corpus, checkpoints and log."""

    recipe: Recipe
    folder: Path
    kind: torch.dtype
    compiled: bool
    processes: int


def together(job: Job, report: Callable[[Report], None]) -> None:
    """Train until the recipe's end, or until this process gets SIGINT or SIGTERM; reports are logged, too.

    Raises:
        ValueError: the corpus does not have as many shards as the recipe says.
    """
    found = len(shards_in(job.folder / TRAIN))
    if found != job.recipe.shards:
        raise ValueError(
            f"{job.folder / TRAIN} holds {found} shards and the recipe wants {job.recipe.shards}: run the "
            "corpus verb, or change the recipe"
        )
    with tempfile.TemporaryDirectory() as meeting:
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(target=_one, args=(job, rank, meeting, _ignore), daemon=True)
            for rank in range(1, job.processes)
        ]
        for other in others:
            other.start()
        _one(job, 0, meeting, report)
        for other in others:
            other.join()


def _one(job: Job, rank: int, meeting: str, report: Callable[[Report], None]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # not reachable from other machines
    if job.processes > 1:
        place = f"file://{meeting}/group"
        distributed.init_process_group(
            "gloo", init_method=place, timeout=WAIT, rank=rank, world_size=job.processes
        )
    run = Run(job.recipe, job.folder, kind=job.kind, compiled=job.compiled, rank=rank, size=job.processes)

    def log(entry: Report) -> None:
        log_to(job.folder / LOG, entry)
        report(entry)

    run.train(Corpus(job.folder / TRAIN, job.recipe.seed), log)
    if job.processes > 1:
        distributed.destroy_process_group()


@dataclass(frozen=True)
class Writing:
    """Shards of a corpus to be written; `writer` makes the teacher in each process."""

    writer: Callable[[], Writer]
    folder: Path
    shards: int
    seed: int
    processes: int


def write_together(writing: Writing, progress: Callable[[int, int], None]) -> None:
    """Write the missing shards. `progress(shards_there, shards)` is called now and then.

    Raises:
        ChildProcessError: another process has failed; its shards are missing.
    """
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_write, args=(writing, rank), daemon=True)
        for rank in range(1, writing.processes)
    ]
    # Exiting normally ends the other processes as well.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for other in others:
            other.start()
        _write(writing, 0, lambda: progress(len(shards_in(writing.folder)), writing.shards))
        for other in others:
            other.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    if any(other.exitcode for other in others):
        raise ChildProcessError(f"not all shards of {writing.folder} were written: run the verb again")
    progress(writing.shards, writing.shards)


def _write(writing: Writing, rank: int, wrote: Callable[[], None] | None = None) -> None:
    torch.set_num_threads(1)
    share = range(rank, writing.shards, writing.processes)
    write_corpus(writing.writer(), writing.folder, shards=share, seed=writing.seed, wrote=wrote)


def _ignore(_: Report) -> None:
    """Only the first process reports."""
