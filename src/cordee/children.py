"""The command line of a Python process of ours: it imports what this process does, wherever it is started.

`python -m` would put the current folder first, and run a `numpy.py` or `queue.py` that a user has there; so
would what PYTHONPATH, PYTHONSTARTUP and the user's site-packages may name. Children are started isolated from
all that (`-I`), and are handed the path of this process, without the folder that it was started in.
"""

import sys
import sysconfig
from pathlib import Path

import cordee

PACKAGE = Path(cordee.__file__).parents[1]  # where children find this package


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `main()` of a module of this package, with its `sys.argv[1:]`."""
    start = f"import sys; sys.path[:] = {_path()!r}; from {module} import main; sys.exit(main())"
    # -I ignores PYTHONUTF8, too, and then the two could disagree about file names.
    return [sys.executable, "-I", f"-Xutf8={sys.flags.utf8_mode}", "-c", start, *arguments]


def _path() -> list[str]:
    """Where this process looks for modules, without the current folder."""
    installed = {str(PACKAGE), *sysconfig.get_paths().values()}
    here = _current_folder()
    path = [each for each in sys.path if Path(each).is_absolute() and (each in installed or each != here)]
    return path if str(PACKAGE) in path else [*path, str(PACKAGE)]


def _current_folder() -> str | None:
    """The current folder; None if it was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return None
