"""`cordee`, whose agents leave every question of planning to a process, and look again only at news."""

import sys

from cordee.cluster import controller, later_planner

later_planner.AT_ONCE_STEPS = 0
controller.RETHINK_SECONDS = 1e9

if __name__ == "__main__":
    from cordee.cli.main import main

    sys.exit(main())
