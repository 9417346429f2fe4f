"""One training run by several processes of this machine, which meet after every step."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from training.corpus import Corpus
from training.recipe import Recipe
from training.train import LOG, Report, Run, log_to

# How long a process waits for the others: they may be stopped (SIGSTOP) for hours while the machine does
# something else.
WAIT = timedelta(days=7)
TRAIN, HELD_OUT = "train", "held-out"  # the parts of a corpus, as folders


@dataclass(frozen=True)
class Job:
    """What all processes are told; see `Run`. `folder` holds corpus, checkpoints and log."""

    recipe: Recipe
    folder: Path
    kind: torch.dtype
    compiled: bool
    processes: int


def together(job: Job, report: Callable[[Report], None]) -> None:
    """Train until the recipe's end, or until this process gets SIGINT or SIGTERM; reports are logged, too."""
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
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nobody else shall hear them
    if job.processes > 1:
        place = f"file://{meeting}/group"
        distributed.init_process_group(
            "gloo", init_method=place, timeout=WAIT, rank=rank, world_size=job.processes
        )
    run = Run(job.recipe, job.folder, kind=job.kind, compiled=job.compiled, rank=rank, size=job.processes)

    def log(told: Report) -> None:
        log_to(job.folder / LOG, told)
        report(told)

    run.train(Corpus(job.folder / TRAIN, job.recipe.seed), log)
    if job.processes > 1:
        distributed.destroy_process_group()


def _ignore(told: Report) -> None:
    """Only the first process reports."""
