"""Compile the GEMM for a compute capability and numbers of tokens, without a GPU: `compile_gemm.py 90 16 128`.

`TRITON_INTERPRET` must not be set. Prints a line for each number of tokens: NAME=COUNT of instructions in the machine
code with which a layer of 4096 × 14336 runs, what in Hopper's loop over K meets registers that the tensor core is still
at, and the bytes of shared memory that it has and may have.
"""

import re
import sys
from collections import Counter

import triton
from compile_gemm_types import arguments, hazards, machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convert_w4a8.kernels.gemm import gpu

SHARED = {89: 99 * 1024, 90: gpu.HOPPER_SHARED, 100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024, 121: 99 * 1024}
"""Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications)."""
INSTRUCTIONS = ("PRMT", "QGMMA", "QMMA", "UTCQMMA", "HMMA", "LDL", "STL", "HAZARDS")


def compiled(capability: int, tokens: int) -> tuple[str, int]:
    """Return the machine code, disassembled, and the bytes of shared memory."""
    launch = gpu.choose_launch(tokens, 4096, 14336, 132, SHARED[capability])
    constants = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "CHAIN": launch.chain,
        "SPLIT": launch.splits > 1,
        "SIDE_BY_SIDE": gpu.SIDE_BY_SIDE if tokens > launch.block_m else 0,
        "WHOLE": True,
        "HOPPER": capability == 90,
        "INTERPRETED": False,
    }
    source = ASTSource(gpu._gemm_kernel, *arguments(gpu._gemm_kernel.arg_names, constants))
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    return machine_code(found), found.metadata.shared


capability = int(sys.argv[1])
for tokens in map(int, sys.argv[2:]):
    code, shared = compiled(capability, tokens)
    words = Counter(re.findall(r"\w+", code))
    if capability == 90:
        words["HAZARDS"] = len(hazards(code))
    print(*(f"{name}={words[name]}" for name in INSTRUCTIONS), f"shared={shared}", f"limit={SHARED[capability]}")  # noqa: T201
