"""`cordee`, whose stage workers lie (`lying_worker`). Run with the environment variable CORDEE_TEST_LIE."""

import sys

from cordee.cli.main import main
from cordee.worker import process

if __name__ == "__main__":
    process.COMMAND = (sys.executable, "-m", "lying_worker")
    main()
