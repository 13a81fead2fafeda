"""Compile the kernels of a decode step for Hopper, without a GPU; prints what is in their machine code.

`TRITON_INTERPRET` must not be set. A line for each form of the GEMM: NAME=COUNT of instructions, and the tokens, FP8
terms and tiles of a warp it is for.
"""

import re
from collections import Counter

import triton
from compile_gemm_types import arguments, machine_code
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from convert_w4a8.kernels.gemm import hopper, hopper_kernel

INSTRUCTIONS = ("PRMT", "QGMMA", "HMMA", "LDL", "STL", "ACQBULK", "PREEXIT", "FENCE")
"""The last three: wait for the kernel before, let the one behind begin, show copies to the tensor core. AFTER: PRMT
between the wait for the product before and the next one, which reads the registers that they write."""

FORMS = (
    *((1, 1, 64, 4, True), (8, 1, 64, 4, False), (16, 1, 64, 4, True), (32, 1, 64, 4, True), (32, 1, 128, 4, False)),
    *((64, 1, 64, 4, False), (64, 1, 128, 8, True), (64, 1, 128, 4, True), (128, 1, 128, 8, False)),
    *((8, 2, 64, 4, True), (32, 2, 64, 4, False)),
)
"""Tokens, FP8 terms of an activation, channels and warps of a block, whether it reads indices of tables."""

for tokens, terms, width, warps, indexed in FORMS:
    launch = hopper.choose_launch(tokens, 4096, 14336, 132, terms)
    constants = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": width,
        "STAGES": launch.stages,
        "TERMS": terms,
        "CHAIN": launch.chain,
        "SPLIT": True,
        "EARLY": True,
        "INDEXED": indexed,
        "OVERLAP": indexed,
    }
    source = GluonASTSource(hopper_kernel._gemm_kernel, *arguments(hopper_kernel._gemm_kernel.arg_names, constants))
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": True})
    code = machine_code(found)
    words = Counter(re.findall(r"\w+", code))
    counts = [f"{name}={words[name]}" for name in INSTRUCTIONS]
    counts.append(f"AFTER={code.partition('QGMMA')[0].rpartition('WARPGROUP.DEPBAR')[2].count('PRMT')}")
    print(*counts, f"tokens={tokens} terms={terms} tiles={width // 16 // warps}")  # noqa: T201
