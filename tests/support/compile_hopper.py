"""Compile the kernels of a decode step for Hopper, without a GPU; prints what is in their machine code.

`TRITON_INTERPRET` must not be set. A line for each form of the GEMM: NAME=COUNT of instructions, and the blocks of a
cluster, tiles of a warp, tokens, FP8 terms and registers of a thread it is for.
"""

import re
from collections import Counter
from collections.abc import Iterator

import triton
from compile_gemm_types import arguments, hazards, machine_code
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from convert_w4a8.kernels.gemm import hopper, hopper_kernel

INSTRUCTIONS = ("PRMT", "QGMMA", "HMMA", "LDL", "STL", "ACQBULK", "PREEXIT", "FENCE", "UCGABAR_ARV", "STAS")
"""The last five: wait for the kernel before, let the one behind begin, show copies to the tensor core, arrive where the
blocks of a cluster meet, and send sums to another one."""

FORMS = (
    *((1, 1, 64, 4, True, 0, 1), (8, 1, 64, 4, False, 8, 0), (16, 1, 64, 4, True, 3, 1), (32, 1, 64, 4, True, 0, 2)),
    *((32, 1, 128, 4, False, 5, 0), (64, 1, 64, 4, False, 4, 2), (64, 1, 128, 8, True, 0, 1)),
    *(
        (64, 1, 128, 4, False, 8, 0),
        (128, 1, 128, 8, False, 0, 0),
        (8, 2, 64, 4, True, 2, 2),
        (32, 2, 64, 4, False, 0, 0),
    ),
)
"""Tokens, FP8 terms of an activation, channels and warps of a block, whether it reads indices of tables, the blocks of
a cluster (0 for none), and beside what it multiplies."""
TUNED = (
    *((12288, 33792, 8, 1), (12288, 33792, 16, 1), (12288, 33792, 32, 1), (12288, 33792, 64, 1), (28672, 4096, 8, 1)),
    *((4096, 14336, 8, 1), (6144, 4096, 8, 2), (6144, 4096, 128, 1), (14336, 4096, 8, 1)),
)
"""Launches of `tuned.py` that differ in what they are compiled with: registers, clusters, what comes first. Two
others, for two terms of 16 tokens, spill more than the test allows; the plugin has two terms up to 8 tokens only."""


def launches() -> Iterator[tuple[hopper.Launch, int]]:
    """Yield launches, and the terms of their activations."""
    for tokens, terms, width, warps, indexed, cluster, overlap in FORMS:
        chosen = hopper.choose_launch(tokens, 4096, 14336, 132, terms)
        cut = hopper.Launch(
            *(chosen.block_m, cluster or 2, chosen.stages, width, warps, chosen.chain, indexed, overlap),
            cluster=cluster > 0,
            copies_first=indexed,
        )
        yield cut, terms
    for n, k, tokens, terms in TUNED:
        yield hopper.choose_launch(tokens, n, k, 132, terms), terms


for launch, terms in launches():
    constants = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "TERMS": terms,
        "CHAIN": launch.chain,
        "SPLIT": launch.splits > 1 and not launch.cluster,
        "EARLY": True,
        "INDEXED": launch.indexed,
        "OVERLAP": launch.overlap,
        "CLUSTER": launch.splits if launch.cluster else 0,
        "SHARE": launch.share,
        "COPIES_FIRST": launch.copies_first,
    }
    source = GluonASTSource(hopper_kernel._gemm_kernel, *arguments(hopper_kernel._gemm_kernel.arg_names, constants))
    options = {"num_warps": launch.warps, "launch_pdl": True, "maxnreg": launch.registers or None}
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = machine_code(found)
    words = Counter(re.findall(r"\w+", code))
    counts = [f"{name}={words[name]}" for name in INSTRUCTIONS]
    counts.append(f"HAZARDS={len(hazards(code))}")
    rooms = map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", found.asm["ptx"]))
    counts.append(f"MISALIGNED={sum(size % 1024 > 0 for size in rooms)}")
    counts.append(f"CLUSTER={constants['CLUSTER']} TILES={launch.block_n // 16 // launch.warps}")
    print(*counts, f"tokens={launch.block_m} terms={terms} registers={launch.registers}")  # noqa: T201
