"""What one tensor-parallel rank may hold of a layer: the kernels' size rules, and what to do about a violation."""

from collections.abc import Callable
from dataclasses import dataclass

from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TILE_N, refusal

CUTLASS_MULTIPLE = 128
"""`cutlass_w4a8_mm` takes N in multiples of this; our kernel takes whole tiles."""
EXPERT_MULTIPLE = 128
"""Our grouped kernel takes experts in multiples of this along hidden and intermediate."""
CUTLASS_EXPERT_MULTIPLE = 256
"""CUTLASS reorders experts, and its grouped kernel reads them, in multiples of this."""
_TP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)


@dataclass(frozen=True)
class Partition:
    """One rank's part of a linear layer: input channels, and output channels of each merged shard (q, k, v, …)."""

    k: int
    shards: tuple[int, ...]

    @property
    def problem(self) -> str | None:
        """Why no kernel, or vLLM's slicing in units of 16 output channels, can take it; None if one can."""
        if self.k % GROUP_SIZE:
            return f"{self.k} input channels are not a multiple of {GROUP_SIZE}"
        if any(shard % TILE_N for shard in self.shards):
            if len(self.shards) == 1:
                return f"{self.shards[0]} output channels are not a multiple of {TILE_N}"
            return f"merged shards of {', '.join(map(str, self.shards))} output channels are not multiples of {TILE_N}"
        return None

    @property
    def cutlass_problem(self) -> str | None:
        """Why vLLM's CUTLASS kernel cannot take what one kernel takes; None if it can."""
        n = sum(self.shards)
        return f"{n} output channels are not a multiple of {CUTLASS_MULTIPLE}" if n % CUTLASS_MULTIPLE else None


@dataclass(frozen=True)
class ExpertPartition:
    """One rank's part of an expert, and what its sizes are to be multiples of."""

    hidden: int
    intermediate: int
    multiple: int = EXPERT_MULTIPLE

    @property
    def problem(self) -> str | None:
        """Why no kernel can take it; None if one can."""
        return self._not_multiples_of(self.multiple)

    @property
    def cutlass_problem(self) -> str | None:
        """Why vLLM's CUTLASS kernel cannot take it; None if it can."""
        return self._not_multiples_of(CUTLASS_EXPERT_MULTIPLE)

    def _not_multiples_of(self, multiple: int) -> str | None:
        for name, size in (("hidden", self.hidden), ("intermediate", self.intermediate)):
            if size % multiple:
                return f"an expert's {name} size of {size} is not a multiple of {multiple}"
        return None


def divided(size: int, parts: int) -> int | None:
    """Return size / parts, or None where that is not whole."""
    return None if size % parts else size // parts


def columns(k: int, outputs: tuple[int, ...], tp: int) -> Partition | None:
    """Return a column-parallel layer's part at a tensor-parallel size; None where it cannot be split so."""
    shards = tuple(divided(size, tp) for size in outputs)
    return None if None in shards else Partition(k, tuple(size for size in shards if size is not None))


def rows(k: int, outputs: tuple[int, ...], tp: int) -> Partition | None:
    """Return a row-parallel layer's part at a tensor-parallel size; None where it cannot be split so."""
    part = divided(k, tp)
    return None if part is None else Partition(part, outputs)


def qkv(k: int, heads: int, kv_heads: int, head_sizes: tuple[int, int], tp: int) -> Partition | None:
    """Return a q/k/v layer's part; k and v heads are replicated where there are fewer of them than ranks.

    head_sizes: of q and k, and of v.
    """
    q, kv = divided(heads, tp), divided(kv_heads, tp)
    if kv is None and tp % kv_heads == 0:
        kv = 1
    if q is None or kv is None:
        return None
    return Partition(k, (q * head_sizes[0], kv * head_sizes[0], kv * head_sizes[1]))


def check(
    name: str,
    part: Partition | ExpertPartition,
    tp: int,
    at: Callable[[int], Partition | ExpertPartition | None],
) -> None:
    """Raise ValueError, in one line, if a rank's part of the layer `name` is not one that a kernel takes.

    at: the part at another tensor-parallel size, from which the error says which sizes would work.
    """
    problem = part.problem
    if problem is None:
        return
    good = [size for size in _TP_SIZES if (other := at(size)) is not None and other.problem is None]
    remedy = (
        f"tensor-parallel sizes that work for this layer: {', '.join(map(str, good))}"
        if good
        else "no tensor-parallel size works for it: convert the checkpoint again with this layer unquantized (--keep)"
    )
    raise refusal(name, f"at tensor-parallel size {tp}, {problem} per rank", remedy)
