"""How the GEMMs over experts are cut, for `grouped`, by what was measured (scripts/gpu/tune_experts.py)."""

from dataclasses import dataclass

from convert_w4a8.kernels.gemm.tuned_experts import LAUNCHES, Cut

_SPLITS, _LEAST_PART = 8, 512
"""The most parts of K, and the least of their length."""
_SHORT_K = 1024
"""Up to here fewer copies in flight, and more blocks side by side, are the faster ones."""
_BLOCKS = ((16, 9), (32, 24), (64, 64))
"""Pairs of a block, by how many an expert has at most, if all have as many; 128 where they have more."""
_MANY_ROWS = 64
"""From here on sums in float32 cost registers."""


@dataclass(frozen=True)
class Launch:
    """How one grouped GEMM is cut.

    block_m: pairs of a block, a power of two from 16, on Hopper from 8, or with `overlap` 3 two of them added. block_n:
    output channels of a block. splits: parts of K. stages: copies in flight. chain: sum over K inside the tensor core,
    see `gpu.Launch`. columns: blocks of channels (and parts of K) that follow each other before the next block of
    pairs; None for all.

    On Hopper: indexed: read indices of tables, where layers have them, not the tables of all groups. apart: with these,
    and without `chain`, look up positive and negative weights apart: 1, or 2, by products in place of shifts.
    registers: of a thread at most; None as the compiler likes. overlap: what `grouped_many_kernel` does while the
    tensor core multiplies, which unrolls its loop: 0: nothing; 1 and 2: as `hopper.Launch` says; 3: look up the weights
    of the next group, a product always outstanding, with `chain`, and K is not split where a block is of two powers.
    But for 3 it has distinct tables in shared memory. None: `grouped_hopper_kernel` multiplies.
    """

    block_m: int
    splits: int
    block_n: int = 64
    stages: int = 4
    warps: int = 4
    chain: bool = False
    columns: int | None = None
    indexed: bool = True
    apart: int = 0
    registers: int | None = None
    overlap: int | None = None


def block_of_pairs(pairs: int, experts: int) -> int:
    """Return how many pairs a block takes: about as many as an expert has, if all have as many."""
    mean = pairs / experts
    for size, most in _BLOCKS:
        if mean <= most:
            return size
    return 128


def most_pairs(experts: int) -> int:
    """Return the pairs of tokens and experts up to which the blocks depend on their number."""
    return max([_BLOCKS[-1][1] * experts, *(pairs for count, _, _, pairs in LAUNCHES if count == experts)])


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Return how many blocks the pairs fill at most, however they are spread over the experts."""
    full = min(pairs, experts)
    return full + (pairs - full) // block_m


def choose_launches(
    pairs: int, experts: int, hidden: int, intermediate: int, multiprocessors: int, *, hopper: bool = False
) -> tuple[Launch, Launch]:
    """Return how to cut the two GEMMs of these pairs of tokens and experts: as measured on Hopper, or by a rule."""
    power = 1 << (pairs - 1).bit_length()
    if hopper and (measured := LAUNCHES.get((experts, hidden, intermediate, power))):
        block_m, first, second = measured
        return _launch(block_m, first), _launch(block_m, second)
    block_m = block_of_pairs(pairs, experts)
    blocks = most_blocks(pairs, experts, block_m)
    return (
        choose_launch(block_m, blocks, 2 * intermediate, hidden, multiprocessors),
        choose_launch(block_m, blocks, hidden, intermediate, multiprocessors),
    )


def _launch(block_m: int, cut: Cut) -> Launch:
    splits, block_n, stages, warps, columns, indexed, apart, registers, chain, overlap = cut
    return Launch(block_m, splits, block_n, stages, warps, chain, columns, indexed, apart, registers, overlap)


def choose_launch(block_m: int, blocks: int, n: int, k: int, multiprocessors: int) -> Launch:
    """Return how to cut a grouped GEMM of so many blocks of pairs where nothing was measured.

    Blocks of 128 channels if those fill the multiprocessors; K in parts until there are a few blocks for each.
    """
    block_n = 128 if blocks * (n // 128) >= 2 * multiprocessors else 64
    if block_m >= _MANY_ROWS:
        return Launch(block_m, 1, 64, stages=3, chain=True, columns=16, indexed=False)
    splits = 1
    while 2 * splits <= min(_SPLITS, k // _LEAST_PART) and blocks * (n // block_n) * splits < 4 * multiprocessors:
        splits *= 2
    return Launch(block_m, splits, block_n, stages=3 if k <= _SHORT_K else 4)
