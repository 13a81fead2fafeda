"""What `--ray` does to a command: the cluster it works on, and what it says of that."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from convert_w4a8.cluster.connection import Cluster
    from convert_w4a8.cluster.shards import Convert, ShardsOnCluster
    from convert_w4a8.verification.proof import CheckUnits


def enter_cluster(address: str | None) -> "Cluster | None":
    """Return the cluster at an address until the command ends; None where there is no `--ray`."""
    if address is None:
        return None
    from convert_w4a8.cluster.connection import connect

    cluster: Cluster = click.get_current_context().with_resource(connect(address))
    return cluster


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
    from convert_w4a8.cluster.shards import ShardsOnCluster
    from convert_w4a8.conversion.shard import convert_shard

    return ShardsOnCluster(
        cluster,
        device=device,
        workers=workers,
        progress=progress,
        function=function or convert_shard,
        bytes_per_weight=bytes_per_weight,
    )


def units_on(cluster: "Cluster | None") -> "CheckUnits | None":
    """Return what checks the units of a proof on a cluster."""
    if cluster is None:
        return None
    from convert_w4a8.cluster.proof import UnitsOnCluster

    return UnitsOnCluster(cluster)


def ray_dict(cluster: "Cluster | None") -> dict[str, Any]:
    """Return what ran where under the key `ray`, for programs; nothing without a cluster."""
    if cluster is None:
        return {}
    from convert_w4a8.cluster.record import as_dict

    return {"ray": as_dict(cluster.ran)}


def ray_lines(cluster: "Cluster | None") -> list[str]:
    """Return what ran where, for people."""
    if cluster is None:
        return []
    from convert_w4a8.cluster.record import as_text

    return [as_text(cluster.ran)]
