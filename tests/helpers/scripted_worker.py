"""A stage worker that computes nothing: it says that it has loaded, and that it is wired; asked to enter the
wiring BREAKING it says in the same breath that a link of it is gone. Run like `cordee.worker.worker`."""

import asyncio
import contextlib
import sys

from cordee.engine.stage import StageDescription
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Broken, Hello, Loaded, LoadStage, Wire, Wired

BREAKING = "breaking"


DESCRIPTION = StageDescription("scripted", 1, True, 1, 1, "", 0, 0, 0, 1, ())


async def serve(name: str, control: str) -> None:
    """Answer the parent until it closes the link."""
    reader, writer = await asyncio.open_unix_connection(control)
    frames.write(writer, Hello(name))
    while True:
        message, _ = await frames.read(reader)
        if isinstance(message, LoadStage):
            frames.write(writer, Loaded(DESCRIPTION))
        elif isinstance(message, Wire):
            frames.write(writer, Wired(message.wiring))
            if message.wiring == BREAKING:
                frames.write(writer, Broken(message.wiring))


if __name__ == "__main__":
    with contextlib.suppress(LinkClosed):
        asyncio.run(serve(*sys.argv[1:3]))
