"""What other accounts of this machine, and reports of crashes, get to see of a process that holds questions.

Linux shows the arguments of every process to every account, and writes the memory of one that crashed to disk
or hands it to a program that collects crashes; prompts and answers are in both.
"""

import contextlib
import ctypes
import sys

import setproctitle

PR_SET_DUMPABLE = 4  # linux/prctl.h


def no_core_dumps() -> None:
    """Have nothing of this process written or collected when it crashes; its children inherit the limit.

    Other processes of the same account cannot attach to it or read its memory then, either.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):  # a system without such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # a collector of crashes is asked regardless of the limit
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if sys.platform == "win32":
        from cordee.system import windows

        windows.no_error_reports()


def show_only(title: str) -> None:
    """Have lists of processes show a title instead of this process's arguments."""
    setproctitle.setproctitle(title)
