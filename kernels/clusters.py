"""Launches of Triton kernels in clusters of blocks, which reach each other's shared memory (Hopper and newer)."""

from typing import Any

_MORE = 48 * 1024 + 1
"""Bytes of shared memory that a kernel has to ask for."""


def launch(
    kernel: Any,
    clusters: int,
    size: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch so many clusters of blocks.

    For Triton, the blocks of a cluster share one program and all its tensors. Here each has its own: the kernel is
    compiled as for single blocks, and only launched in clusters.
    """
    compiled = kernel.warmup(*arguments, grid=(clusters,), **constants, **options)
    # Where it is loaded for more, all of a multiprocessor's shared memory may be used, also by assembly.
    compiled.metadata = compiled.metadata._replace(shared=max(compiled.metadata.shared, _MORE))
    warps, _, *rest = compiled.packed_metadata
    compiled.packed_metadata = (warps, size, *rest)
    compiled[clusters, 1, 1](*arguments, *constants.values())
