"""The cluster's deployments on this disk, so that a cluster that was switched off knows them again."""

from pathlib import Path

import msgspec

from cordee.cluster.deployments import Deployment
from cordee.files import atomic_file, write_all

DEPLOYMENTS_BYTES_MAX = 4 << 20  # DEPLOYMENTS_MAX of models with hundreds of layers take less


class DeploymentsFile:
    """A file of deployments; `deployments` are those of the last run, as far as they can be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.deployments = _read(path)

    def keep(self, deployments: tuple[Deployment, ...]) -> None:
        """Write them to the file if they changed.

        Raises:
            StorageFailed: the disk has no room.
        """
        if deployments != self.deployments:
            self.deployments = deployments
            with atomic_file(self._path) as file:
                write_all(file, msgspec.msgpack.encode(deployments))


def _read(path: Path) -> tuple[Deployment, ...]:
    """Nothing if the file cannot be read: the other nodes tell what the cluster serves."""
    try:
        data = path.read_bytes()
        return (
            msgspec.msgpack.decode(data, type=tuple[Deployment, ...])
            if len(data) <= DEPLOYMENTS_BYTES_MAX
            else ()
        )
    except (OSError, msgspec.MsgspecError, ValueError):
        return ()
