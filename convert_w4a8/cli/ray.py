"""What `--ray` does to a command: the cluster it works on, and what it says of that."""

from typing import TYPE_CHECKING, Any

import click

from convert_w4a8.cluster.access import cluster_at

if TYPE_CHECKING:
    from convert_w4a8.cluster.nodes import Cluster


_CLUSTER = f"{__name__}.cluster"


def enter_cluster(ctx: click.Context) -> None:
    """Connect to the cluster that a command is given, until it ends; not for a dry run.

    That is before this process imports torch, which the nodes do at the same time then.
    """
    address = None if ctx.params.get("dry_run") else ctx.params.get("ray")
    ctx.meta[_CLUSTER] = ctx.with_resource(cluster_at(address))


def cluster_of_command() -> "Cluster | None":
    """Return the cluster that the command works on; None where there is no `--ray`."""
    cluster: Cluster | None = click.get_current_context().meta[_CLUSTER]
    return cluster


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
