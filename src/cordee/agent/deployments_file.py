"""What the cluster is wished to serve, on this disk: a cluster that was switched off knows it again."""

from pathlib import Path

import msgspec

from cordee.cluster.deployments import Deployment
from cordee.files import atomic_file, write_all

DEPLOYMENTS_BYTES_MAX = 4 << 20  # as many as there may be, of models with hundreds of layers


class DeploymentsFile:
    """The wishes in a file; `wishes` are those of the last run, as far as they can be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.deployments = _read(path)

    def keep(self, deployments: tuple[Deployment, ...]) -> None:
        """Write them down if they changed.

        Raises:
            StorageFailed: no room on the disk.
        """
        if deployments != self.deployments:
            self.deployments = deployments
            with atomic_file(self._path) as file:
                write_all(file, msgspec.msgpack.encode(deployments))


def _read(path: Path) -> tuple[Deployment, ...]:
    """What cannot be read is heard from the others."""
    try:
        data = path.read_bytes()
        return (
            msgspec.msgpack.decode(data, type=tuple[Deployment, ...])
            if len(data) <= DEPLOYMENTS_BYTES_MAX
            else ()
        )
    except (OSError, msgspec.MsgspecError, ValueError):
        return ()
