"""Shared libraries of our own, which lie beside the file that loads them."""

import ctypes
import sys
from pathlib import Path

SUFFIX = ".dll" if sys.platform == "win32" else ".so"


def load(path: Path) -> ctypes.CDLL:
    """A shared library, whose name is given without the system's suffix.

    Raises:
        OSError: it is not there, or cannot be used.
    """
    return ctypes.CDLL(str(path.with_name(path.name + SUFFIX)))
