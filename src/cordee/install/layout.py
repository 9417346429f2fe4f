"""Where the running program is installed, and by what.

    PREFIX/VERSION/      a virtual environment; the empty file `whole` says that it is complete
    PREFIX/current       a link to the version in use: to change it is one rename
    PREFIX/bundle/       the folder that it was installed from (bundle.py): whose updates it takes
    BIN/cordee           a link to PREFIX/current/bin/cordee

That is what `install.sh` makes, for one account (~/.local/lib/cordee), for the machine (/opt/cordee), or for
the Debian package (/usr/lib/cordee). A clone, pipx and uv have one environment, which is theirs to change.
"""

import os
import sys
from pathlib import Path

from cordee.errors import BadRequest

DEBIAN = Path("/usr/lib/cordee")


def prefix() -> Path | None:
    """The PREFIX of the running program; None if `install.sh` did not install it."""
    environment = Path(sys.prefix)
    top = environment.parent
    return top if (environment / "whole").is_file() and (top / "current").is_symlink() else None


def required_prefix() -> Path:
    """The PREFIX of the running program.

    Raises:
        BadRequest: somebody else installed it, and has to be asked.
    """
    top = prefix()
    if top == DEBIAN:
        raise BadRequest(
            "This Cordée is a Debian package: `sudo apt-get install ./cordee_VERSION_amd64.deb` updates it, "
            "`sudo apt-get remove cordee` removes it."
        )
    if top is None:
        raise BadRequest(
            f"This Cordée was not installed by install.sh, but lies in {sys.prefix}: update or remove it "
            "with what made that (pipx, uv, pip; `git pull && make setup` in a clone)."
        )
    return top


def program() -> Path:
    """The command `cordee`, at a path that stays the same when it is updated."""
    top = prefix()
    return (top / "current" if top else Path(sys.prefix)) / "bin" / "cordee"


def links(top: Path) -> list[Path]:
    """The links to the program of this PREFIX, in the folders where install.sh puts them and on PATH."""
    folders = dict.fromkeys(
        [*os.get_exec_path(), str(Path.home() / ".local/bin"), "/usr/local/bin", "/usr/bin"]
    )
    places = [Path(folder) / "cordee" for folder in folders]
    wanted = top / "current" / "bin" / "cordee"
    return [place for place in places if place.is_symlink() and place.readlink() == wanted]
