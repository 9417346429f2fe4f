"""Taking Cordée off this machine: its service, its program, and, if asked for, what it keeps."""

import contextlib
import shutil
from pathlib import Path

from cordee.errors import NotRunning
from cordee.files import disk_faults, home
from cordee.install import layout, service


def uninstall(*, models_too: bool) -> list[Path]:
    """Remove the service and the program; with `models_too`, models and identity. Gives what stays.

    Raises:
        BadRequest: something else than install.sh installed it.
        StorageFailed: a folder cannot be removed.
    """
    top, state = layout.required_prefix(), home()
    links = layout.links(top)
    mine = service.own()
    with contextlib.suppress(NotRunning):
        mine.remove()
    kept = [folder for folder in (state, service.STATE if mine.for_machine else state) if folder.is_dir()]
    if models_too:
        for folder in dict.fromkeys(kept):
            with disk_faults(folder):
                shutil.rmtree(folder)
        kept = []
    for link in links:
        with disk_faults(link):
            link.unlink()
    # Last: this process runs from there, and has loaded all that it still needs.
    with disk_faults(top):
        shutil.rmtree(top)
    return list(dict.fromkeys(kept))
