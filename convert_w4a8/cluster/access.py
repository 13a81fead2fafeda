"""What an address of a cluster does to work, and what is done without one: for commands and for the Python functions.

None stands for no cluster: this process works. Nothing of the other modules here is imported then.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert_w4a8.cluster.calls import CallsOnCluster
    from convert_w4a8.cluster.nodes import Cluster
    from convert_w4a8.cluster.proof import UnitsOnCluster
    from convert_w4a8.cluster.shards import Convert, ShardsOnCluster


def cluster_at(address: str | None) -> AbstractContextManager["Cluster | None"]:
    """Return the cluster at an address, while a block lasts; None where there is no address."""
    if address is None:
        return nullcontext()
    from convert_w4a8.cluster.connection import connect  # noqa: PLC0415

    return connect(address)


def path_on(address: str | None, path: Path) -> Path:
    """Return a path as it is, or absolute where other processes are to open it."""
    return path if address is None else path.absolute()


def shards_on(
    cluster: "Cluster | None",
    device: str,
    workers: int | None,
    progress: Callable[[int], None],
    function: "Convert | None" = None,
    bytes_per_weight: int = 0,
) -> "ShardsOnCluster | None":
    """Return what writes the files of an output on a cluster. function, bytes_per_weight: as `ShardsOnCluster` has."""
    if cluster is None:
        return None
    from convert_w4a8.cluster.shards import ShardsOnCluster  # noqa: PLC0415
    from convert_w4a8.conversion.shard import convert_shard  # noqa: PLC0415

    return ShardsOnCluster(
        cluster,
        device=device,
        workers=workers,
        progress=progress,
        function=function or convert_shard,
        bytes_per_weight=bytes_per_weight,
    )


def calls_on(cluster: "Cluster | None", device: str) -> "CallsOnCluster | None":
    """Return what makes independent calls on a cluster, such as those that quantize the matrices of a block."""
    if cluster is None:
        return None
    from convert_w4a8.cluster.calls import CallsOnCluster  # noqa: PLC0415

    return CallsOnCluster(cluster, device)


def units_on(cluster: "Cluster | None") -> "UnitsOnCluster | None":
    """Return what checks the units of a proof on a cluster."""
    if cluster is None:
        return None
    from convert_w4a8.cluster.proof import UnitsOnCluster  # noqa: PLC0415

    return UnitsOnCluster(cluster)
