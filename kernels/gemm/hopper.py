"""The GEMM of `gpu` for Hopper, in Gluon: explicit layouts, and weights on their way before the tokens are there.

Launched with programmatic dependent launch: a block starts while the kernel before it still runs, fills its ring of
copies with weights, which no kernel writes, and only then waits for that kernel's results. Gluon also says how the
words go from shared memory to registers: in the order of the tensor core's operand, which `assert_trivial` checks when
the kernel is compiled.

Where a layer has few tables, as one of scales has, each group brings an index into them instead of its own: a byte in
place of eight. A block keeps all of them in its shared memory.

Activations are one or two FP8 terms. Two, x = hi + lo / 16, hold a bfloat16 value to the last bit over 13 binades
below the largest of its token (`kernels.activations`).
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import triton

from convert_w4a8.kernels import clusters
from convert_w4a8.kernels.gemm import gpu, workspace
from convert_w4a8.kernels.gemm.hopper_kernel import _gemm_kernel
from convert_w4a8.kernels.gemm.tuned import LAUNCHES

BLOCK_N = 64
MAX_TOKENS = 128
"""The most rows of activations that one launch takes."""
MAX_TOKENS_OF_TWO_TERMS = 32
_BLOCKS_PER_SM = {8: 6, 16: 5, 32: 4, 64: 3, 128: 2}
"""By the rows of tokens in a block: blocks of one multiprocessor at a time, by shared memory and registers."""
_STAGES = {8: 6, 16: 6, 32: 4, 64: 4, 128: 3}
_SPLITS = 12
_REGISTERS = 65536
"""Of a multiprocessor."""
_LEAST_REGISTERS = 80
"""Of a thread, with which a kernel keeps nearly all that it needs."""
ALWAYS = 32
"""Tokens up to which this kernel is the faster one whatever the size; beyond, where it was measured to be."""
MOST_OF_CLUSTER = 8
"""Blocks of a cluster that every Hopper GPU takes."""
_MOST_SENT = 44 * 1024
"""Bytes that a block has room for: assembly may have 48 KiB of shared memory, and distinct tables take 4 of them."""
_MANY_ROWS = 64
"""From here on sums in float32 cost registers."""


@dataclass(frozen=True)
class Launch:
    """How one GEMM is cut: tokens of a block (a power of two from 8), parts of K, copies in flight.

    block_n: output channels of a block, 64 or 128: with many tokens, reading these again and again takes longer than
        reading the weights. warps: four for each 64 of them, or half of that.
    chain: sum over K inside the tensor core, whose sums of FP8 products have about 14 bits, instead of adding up
        groups of 128 in float32.
    indexed: read indices of tables, where the layer has them, not the tables of all groups.
    overlap: 1: multiply one group while the next one's words are read; 2: and while they are looked up. Takes the room
        of one more group.
    early: start before the kernel ahead of it has ended.
    cluster: blocks that have the parts of K of the same outputs add them up through each other's shared memory; at most
        `MOST_OF_CLUSTER` parts. Otherwise the last one does, through memory.
    registers: of a thread, at most, so that more blocks have room on a multiprocessor; 0: what the compiler takes.
    copies_first: start copies before a group's words are read: sooner, but with many blocks a multiprocessor slower.
    """

    block_m: int
    splits: int
    stages: int = 4
    block_n: int = BLOCK_N
    warps: int = 4
    chain: bool = False
    indexed: bool = True
    overlap: int = 0
    early: bool = True
    cluster: bool = False
    registers: int = 0
    copies_first: bool = False

    @property
    def share(self) -> int:
        """Tokens for which a block of a cluster adds up the parts: a power of two, of which all have enough."""
        power: int = triton.next_power_of_2(triton.cdiv(self.block_m, self.splits))
        return power if self.cluster else 0

    def copied(self, terms: int) -> int:
        """Return the bytes of shared memory for copies in flight: of words, tables and tokens."""
        return self.stages * (72 * self.block_n + 128 * self.block_m * terms)

    def clusters(self, terms: int) -> bool:  # noqa: ARG002
        """Whether clusters can add up the parts of K, if there are any.

        What blocks are sent has a place of its own, and no two threads may have the same sums: they would be sent
        twice.
        """
        sent = 4 * self.block_n * replace(self, cluster=True).share * self.splits + 8
        once = self.block_m >= 2 * self.warps
        return 1 < self.splits <= MOST_OF_CLUSTER and once and sent <= _MOST_SENT


def choose_launch(m: int, n: int, k: int, multiprocessors: int, terms: int = 1) -> Launch:
    """Return how to cut an [m, n, k] GEMM: as measured, or so that all blocks run at once."""
    block_m = _block_m(m)
    rows = block_m * terms
    chain = rows >= _MANY_ROWS
    if measured := LAUNCHES.get((n, k, block_m, terms)):
        splits, stages, block_n, warps, indexed, overlap, cluster, registers, copies_first = measured
        return Launch(
            *(block_m, splits, stages, block_n, warps, chain, indexed, overlap),
            cluster=cluster,
            registers=registers,
            copies_first=copies_first,
        )
    blocks = triton.cdiv(n, BLOCK_N)
    splits = max(1, min(round(_BLOCKS_PER_SM[rows] * multiprocessors / blocks), _SPLITS, k // (2 * gpu.GROUP)))
    registers = registers_for(blocks * splits, 4, multiprocessors)
    return Launch(block_m, splits, _STAGES[rows], chain=chain, registers=registers)


def registers_for(blocks: int, warps: int, multiprocessors: int) -> int:
    """Return with how many registers of a thread all blocks run at once; 0: with all there are, or not at all."""
    most = _REGISTERS // (32 * warps * triton.cdiv(blocks, multiprocessors)) // 8 * 8
    return most if _LEAST_REGISTERS <= most < 255 else 0


def _block_m(m: int) -> int:
    power: int = triton.next_power_of_2(m)
    return max(8, power)


def compiled_for(m: int, n: int, k: int, device: torch.device, terms: int) -> Hashable:
    """Return what the kernel for an [m, n, k] product is compiled for; see `gpu.compiled_for`."""
    launch = _launch(m, n, k, device, terms)
    return launch if launch.cluster else replace(launch, splits=min(launch.splits, 2)), terms


def _launch(m: int, n: int, k: int, device: torch.device, terms: int) -> Launch:
    return choose_launch(m, n, k, workspace.multiprocessors(device), terms)


def probe(device: torch.device) -> None:
    """Run a small product by tables and by indices, parts of K added up in memory and in a cluster.

    Raises whatever goes wrong, ArithmeticError if it is the result.
    """
    ones = torch.ones(1, 256, device=device).to(torch.float8_e4m3fn)
    packed = torch.full((8, 4 * BLOCK_N), -0x77777778, dtype=torch.int32, device=device)  # the first entry everywhere
    tables = torch.ones(2, BLOCK_N, 8, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(BLOCK_N, dtype=torch.float32, device=device)
    index, distinct = (
        torch.zeros(2, BLOCK_N, dtype=torch.uint8, device=device),
        tables.expand(2, -1, -1, -1).reshape(256, 8),
    )
    for few, cluster in (((), False), ((index, distinct), True)):
        launch = Launch(8, 2, cluster=cluster)
        product = gemm_by(ones, scale[:1, None], packed, tables, scale, *few, launch=launch)
        if not bool((product == 256).all()):
            raise ArithmeticError("1 · 1, 256 times, is not 256")


def suits(m: int, n: int, k: int) -> bool:
    """Whether this kernel is the faster one for [m, n, k], and takes it."""
    if n % BLOCK_N or m > MAX_TOKENS:
        return False
    return m <= ALWAYS or (n, k, _block_m(m), 1) in LAUNCHES


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    index: torch.Tensor | None = None,
    distinct: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply FP8 activations by a layer in the LUT layout; see `operations.Gemm`. N is a multiple of 64.

    index, distinct: the same tables as indices, uint8 [K/128, N], into distinct ones, float8_e4m3fn [256, 8].

    ValueError for M > `MAX_TOKENS`, and for M > `MAX_TOKENS_OF_TWO_TERMS` where the tokens have two terms.
    """
    m, k, n = token_scale.shape[0], tokens.shape[1], packed.shape[1] // 4
    if m == 0:
        return torch.empty(0, n, dtype=torch.bfloat16, device=tokens.device)
    launch = _launch(m, n, k, tokens.device, tokens.shape[0] // m)
    return gemm_by(tokens, token_scale, packed, tables, channel_scale, index, distinct, launch=launch)


def gemm_by(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    index: torch.Tensor | None = None,
    distinct: torch.Tensor | None = None,
    *,
    launch: Launch,
) -> torch.Tensor:
    """Do what `gemm` does, cut as `launch` says."""
    m, k, n = token_scale.shape[0], tokens.shape[1], packed.shape[1] // 4
    output = torch.empty(m, n, dtype=torch.bfloat16, device=tokens.device)
    if m == 0:
        return output
    terms = tokens.shape[0] // m
    if m > (MAX_TOKENS if terms == 1 else MAX_TOKENS_OF_TWO_TERMS):
        raise ValueError(f"M = {m} with {terms} terms is more than a launch takes")
    if launch.cluster and not launch.clusters(terms):
        raise ValueError(f"{launch} cannot have clusters")
    if n % launch.block_n:
        raise ValueError(f"N = {n} is not a multiple of {launch.block_n}")
    blocks = n // launch.block_n
    wanted = 1 if launch.cluster else launch.splits
    splits, sums, counters = workspace.split(output, blocks, launch.block_n * launch.block_m, wanted)
    few = distinct if launch.indexed and index is not None else None
    arguments = (
        *(tokens, packed, (tables if few is None else few).view(torch.int64), packed if few is None else index),
        *(token_scale, channel_scale, output, sums, counters, m, n, k, launch.splits if launch.cluster else splits),
    )
    constants = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "TERMS": terms,
        "CHAIN": launch.chain,
        "SPLIT": splits > 1,
        "EARLY": launch.early,
        "INDEXED": few is not None,
        "OVERLAP": launch.overlap,
        "CLUSTER": launch.splits if launch.cluster else 0,
        "SHARE": launch.share,
        "COPIES_FIRST": launch.copies_first,
    }
    options = {"num_warps": launch.warps, "launch_pdl": launch.early, "maxnreg": launch.registers or None}
    grid = (blocks * splits,)
    with torch.cuda.device(tokens.device):
        if launch.cluster:
            clusters.launch(_gemm_kernel, blocks, launch.splits, arguments, constants, options)
        else:
            _gemm_kernel[grid](*arguments, **constants, **options)
    return output
