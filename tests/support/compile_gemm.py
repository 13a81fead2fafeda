"""Compile the decode GEMM for a compute capability, without a GPU, and count instructions: `compile_gemm.py 90`.

`TRITON_INTERPRET` must not be set. Prints NAME=COUNT of the machine code for 16 tokens and a K that is split, and the
bytes of shared memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convert_w4a8.kernels.gemm import gpu

TYPES = {
    "tokens": "*fp8e4nv",
    "packed": "*i32",
    "tables": "*i64",
    "output": "*bf16",
    "counters": "*i32",
    **dict.fromkeys(("token_scale", "channel_scale", "sums"), "*fp32"),
    **dict.fromkeys(("M", "N", "K", "SPLITS"), "i32"),
}
CONSTANTS = {
    "BLOCK_M": 16,
    "BLOCK_N": gpu.BLOCK_N,
    "STAGES": 5,
    "CHAIN": False,
    "SPLIT": True,
    "WHOLE": True,
    "INTERPRETED": False,
}
INSTRUCTIONS = ("PRMT", "QGMMA", "QMMA", "UTCQMMA", "HMMA", "LDL", "STL")

kernel = gpu._gemm_kernel
names = kernel.arg_names
signature = {name: "constexpr" if name in CONSTANTS else TYPES[name] for name in names}
places = {(names.index(name),): value for name, value in CONSTANTS.items()}
sixteen = {(names.index(name),): [["tt.divisibility", 16]] for name in TYPES if name not in ("M", "SPLITS")}
source = ASTSource(kernel, signature, places, sixteen)
compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
with tempfile.TemporaryDirectory() as directory:
    cubin = Path(directory) / "gemm.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    sass = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
found = {name: len(re.findall(rf"\b{name}\b", sass)) for name in INSTRUCTIONS}
print(*(f"{name}={count}" for name, count in found.items()), f"shared={compiled.metadata.shared}")  # noqa: T201
