"""`python -m sim --seed N [--seeds COUNT]`: plays seeds on all cores and reports the failures."""

import argparse
import os
import statistics
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import track

from sim.run import Broken, Outcome, play
from sim.stall import play_stall

STALLS = 10


def attempt(seed: int) -> Outcome | str:
    """A seed's outcome, or what was wrong; every STALLS-th seed is also one of a fault that lasts."""
    try:
        if seed % STALLS == 0:
            play_stall(seed)
        return play(seed)
    except Broken as error:
        return str(error)


def main() -> int:
    """Exit status 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    failures = 0
    leases: list[float] = []
    streams: Counter[str] = Counter()
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(seeds))) as pool:
        outcomes = pool.map(attempt, seeds, chunksize=max(1, min(50, len(seeds) // 8)))
        for outcome in track(outcomes, "seeds", total=len(seeds), console=Console(stderr=True)):
            if isinstance(outcome, str):
                failures += 1
                print(outcome, flush=True)
            else:
                leases.append(outcome.leases)
                streams += outcome.streams
    if leases:
        leases.sort()
        median, most = statistics.median(leases), leases[int(len(leases) * 0.99)]
        print(
            f"{len(leases)} of {len(seeds)} seeds hold; leases to convergence: "
            f"median {median:.1f}, 99 % {most:.1f}, max {leases[-1]:.1f}"
        )
        print("streams: " + ", ".join(f"{count} {end}" for end, count in sorted(streams.items())))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
