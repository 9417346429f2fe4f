"""`cordee` that lies. Run with the environment variable CORDEE_TEST_LIE: `accuses`, `hides`, or how its stage
workers lie (`lying_worker`)."""

import os
import sys

from cordee.agent.spot_checker import SpotChecker
from cordee.cli.main import main
from cordee.worker import process
from cordee.worker.messages import Record, RecordQuery, SpotFinding, SpotRequest
from cordee.worker.stages import Stages
from lying_worker import HOW


async def accuse(self: SpotChecker, request: SpotRequest, *, fetches: bool = False) -> SpotFinding:
    """Say of every stage that it computes wrongly."""
    return SpotFinding("differs", "all of it is wrong")


async def hide(self: Stages, query: RecordQuery) -> tuple[Record, bytes]:
    """Show nothing of what a stage here computed."""
    return Record(0), b""


if __name__ == "__main__":
    match os.environ[HOW]:
        case "accuses":
            SpotChecker.check = accuse
        case "hides":
            Stages.record = hide
        case _:
            process.COMMAND = (sys.executable, "-m", "lying_worker")
    main()
