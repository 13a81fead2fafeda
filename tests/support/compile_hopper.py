"""Compile the kernels of a decode step for Hopper, without a GPU; prints what is in their machine code.

`TRITON_INTERPRET` must not be set. A line for each form of the GEMM: NAME=COUNT of instructions, and the tokens, FP8
terms and tiles of a warp it is for.
"""

import re
from collections import Counter

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


for tokens, terms, width, warps, indexed, cluster, overlap in FORMS:
    launch = hopper.choose_launch(tokens, 4096, 14336, 132, terms)
    constants = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": width,
        "STAGES": launch.stages,
        "TERMS": terms,
        "CHAIN": launch.chain,
        "SPLIT": cluster == 0,
        "EARLY": True,
        "INDEXED": indexed,
        "OVERLAP": overlap,
        "CLUSTER": cluster,
        "SHARE": triton.next_power_of_2(triton.cdiv(launch.block_m, cluster)) if cluster else 0,
    }
    source = GluonASTSource(hopper_kernel._gemm_kernel, *arguments(hopper_kernel._gemm_kernel.arg_names, constants))
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})
    code = machine_code(found)
    words = Counter(re.findall(r"\w+", code))
    counts = [f"{name}={words[name]}" for name in INSTRUCTIONS]
    counts.append(f"HAZARDS={len(hazards(code))}")
    rooms = map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", found.asm["ptx"]))
    counts.append(f"MISALIGNED={sum(size % 1024 > 0 for size in rooms)}")
    print(*counts, f"tokens={tokens} terms={terms} tiles={width // 16 // warps} cluster={cluster}")  # noqa: T201
