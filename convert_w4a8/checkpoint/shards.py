"""Which tensors lie in which file of an output."""

from collections.abc import Iterable
from dataclasses import dataclass

from convert_w4a8.checkpoint.directory import SINGLE_FILE
from convert_w4a8.checkpoint.safetensors_file import TensorSpec


@dataclass(frozen=True)
class ShardPlan:
    """One output file and the tensors it will hold."""

    file_name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> tuple[ShardPlan, ...]:
    """Fill shards in the given order up to `max_shard_size` bytes; a larger tensor gets a shard of its own."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (ShardPlan(SINGLE_FILE, tuple(groups[0])),)
    total = len(groups)
    return tuple(
        ShardPlan(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )
