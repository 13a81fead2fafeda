"""Compile quantization of rows in clusters for Hopper, without a GPU; prints what is in its machine code.

`TRITON_INTERPRET` must not be set. A line for each form: NAME=COUNT of instructions, and the kind and the terms.
"""

import re
from collections import Counter
from itertools import product

import triton
from compile_gemm_types import machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convert_w4a8.kernels.activations import gpu
from convert_w4a8.kernels.fp8 import OPTIONS

INSTRUCTIONS = ("UCGABAR_ARV", "UCGABAR_WAIT", "LDL", "STL", "ACQBULK", "PREEXIT")
"""Arrive where a cluster meets, wait there, spills, wait for the kernel before, let the one behind begin."""
TYPES = {
    **dict.fromkeys(("x", "residual", "weight", "total"), "*bf16"),
    "tokens": "*fp8e4nv",
    "scale": "*fp32",
    "epsilon": "fp32",
    **dict.fromkeys(("M", "K", "SHARE", "STRIDE", "RESIDUAL_STRIDE"), "i32"),
}

names = gpu._quantize_kernel.arg_names
for what, terms in product((gpu._PLAIN, gpu._SILU), (1, 2)):
    constants = {
        "WHAT": what,
        "TERMS": terms,
        "PARTS": gpu._MOST_OF_CLUSTER,
        "BLOCK": 2048,
        "EARLY": True,
        "INTERPRETED": False,
    }
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    sixteen = {(names.index(name),): [["tt.divisibility", 16]] for name in TYPES if name not in ("M", "epsilon")}
    source = ASTSource(gpu._quantize_kernel, signature, places, sixteen)
    options = OPTIONS | {"num_warps": 4, "launch_pdl": True}
    code = machine_code(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))
    words = Counter(re.findall(r"\w+", code))
    print(*(f"{name}={words[name]}" for name in INSTRUCTIONS), f"what={what} terms={terms}")  # noqa: T201
