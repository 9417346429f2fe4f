"""The node as a task of Windows: `cordee up` without a window; what it says goes to node.log in its folder."""

import os
import sys

KEPT_BYTES = 1 << 20  # of the log, at each start


def main() -> None:
    """Run until Windows ends the task."""
    from cordee.files import home

    path = home() / "node.log"
    if path.exists() and path.stat().st_size > KEPT_BYTES:
        path.replace(path.with_suffix(".old.log"))
    log = path.open("a", encoding="utf-8", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    sys.stdin = open(os.devnull, encoding="utf-8")
    sys.argv = ["cordee", "up"]
    from cordee.cli.main import main as cordee

    cordee()


if __name__ == "__main__":
    main()
