"""Verification on a cluster: units of a proof by tasks, each of about so many bytes; the driver passes judgement."""

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster.nodes import Cluster
from convert_w4a8.cluster.paths import check_inputs, states_of
from convert_w4a8.cluster.shards import PROCESS_BYTES
from convert_w4a8.cluster.tasks import Runner, Task
from convert_w4a8.errors import ClusterError
from convert_w4a8.threads import one_thread_each
from convert_w4a8.verification.proof import Findings, Proof, Units

TASK_BYTES = 1 << 30
"""What a task compares of the source, at least; less where there would be fewer tasks than CPUs."""
_BYTES_A_BYTE = 6
"""Memory that a layer takes while it is compared: both sides, and what they are unpacked into."""


class UnitsOnCluster:
    """Checks the units of a proof on a cluster; can be given to `verify` as `check`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __call__(self, proof: Proof, progress: Callable[[int], None]) -> list[Findings]:
        """Check all units of a proof; returns what was found in their order.

        Raises:
            W4A8Error: a file cannot be read, or nodes see other files, have another version, or fail too often.

        """
        self._cluster.check_versions()
        files = {info.path for checkpoint in (proof.out, proof.source) for info in checkpoint.tensors.values()}
        check_inputs(self._cluster, states_of(files))
        sizes = proof.sizes
        cpus = sum(int(node.cpus) for node in self._cluster.nodes())
        parts = list(cut(sizes, min(TASK_BYTES, sum(sizes) // max(1, 2 * cpus) + 1)))
        only = None if proof.only is None else frozenset(proof.only)
        roots = str(proof.out.root), str(proof.source.root)
        tasks = [
            Task(
                f"{start}-{stop}",
                check_on_node,
                lambda _number, units=(start, stop): (*roots, only, proof.min_sqnr_db, len(sizes), units),  # type: ignore[misc]
                1,
                PROCESS_BYTES + _BYTES_A_BYTE * max(sizes[start:stop]),
            )
            for start, stop in parts
        ]
        found: dict[str, Findings] = {}
        with closing(Runner(self._cluster).run(tasks)) as finished:
            for task, _, result in finished:
                found[task.name] = result
                start, stop = map(int, task.name.split("-"))
                progress(sum(sizes[start:stop]))
        return [found[task.name] for task in tasks]


def cut(sizes: list[int], nbytes: int) -> Iterator[Units]:
    """Cut units into parts of about so many bytes, in order."""
    start = filled = 0
    for stop, size in enumerate(sizes, 1):
        filled += size
        if filled >= nbytes or stop == len(sizes):
            yield start, stop
            start, filled = stop, 0


@lru_cache(1)
def _opened(out: str, source: str, only: Collection[str] | None, min_sqnr_db: float | None) -> Proof:
    return Proof(open_checkpoint(Path(out)), open_checkpoint(Path(source)), only=only, min_sqnr_db=min_sqnr_db)


def check_on_node(
    out: str, source: str, only: frozenset[str] | None, min_sqnr_db: float | None, count: int, units: Units
) -> Findings:
    """Check some units on a node. count: how many there are in all.

    Raises:
        ClusterError: the node sees other checkpoints.

    """
    proof = _opened(out, source, only, min_sqnr_db)
    if len(proof.sizes) != count:
        raise ClusterError(out, "is another checkpoint", "mount its file system there, or take the node out")
    with one_thread_each():
        return proof.check(units)
