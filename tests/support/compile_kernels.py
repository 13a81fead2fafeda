"""Compile every Triton kernel for Hopper, without a GPU, and print the arithmetic of each that is not to be there.

`TRITON_INTERPRET` must not be set: with it there is nothing to compile. Prints one line a kernel: its name, shared
memory in bytes, and what its PTX has of float instructions that are fused, approximate, or free to be fused (no `.rn`).
"""

import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convert_w4a8.kernels.codebooks import gpu_codes, gpu_tables
from convert_w4a8.kernels.codes import gpu as codes
from convert_w4a8.kernels.fp8 import OPTIONS
from convert_w4a8.kernels.repack import gpu as repack
from convert_w4a8.kernels.tables import gpu as tables

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    **dict.fromkeys(("packed", "lut", "rows"), "*i32"),
    **dict.fromkeys(("kept", "codes", "letters"), "*u8"),
    **dict.fromkeys(("values", "counts", "weights", "importance", "factors", "channel_scale"), "*fp32"),
    **dict.fromkeys(("partial", "energies"), "*fp64"),
    **dict.fromkeys(("N", "K", "stride", "n", "groups", "count", "candidates", "rounds"), "i32"),
}
"""What the kernels' arguments are; `scales` and `tables` are bytes in one module, numbers in another."""


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield every kernel, with the types of its arguments and its constants, as they are launched."""
    for packing, block in repack.DEFAULT_BLOCKS.items():
        constants = {"PACKING": packing.name, "K_FIRST": block.k_first, "BLOCK_N": block.n, "BLOCK_K": block.k}
        yield repack._reorder_kernel, TYPES, constants
    for packing, block in repack.PACK_QUANTIZED_BLOCKS.items():
        constants = {"PACKING": packing.name, "BLOCK_N": block.n, "BLOCK_K": block.k}
        yield repack._pack_kernel, TYPES, constants
    yield tables._expand_kernel, TYPES | {"scales": "*u8", "tables": "*u8"}, {"BLOCK": tables._BLOCK}
    types = TYPES | {"scales": "*fp32", "zeros": "*u8", "tables": "*u8"}
    yield codes._gather, types, {"BLOCK": codes._GROUPS}
    yield codes._spell, types, {"BLOCK": codes._GROUPS}
    channels = {"CHANNELS": codes._CHANNELS, "STEP": codes._CHANNELS_AT_ONCE}
    yield codes._add_energies, types, channels
    for width in (16, 128):
        yield codes._fit_symmetric, types, {"WIDTH": width, "BLOCK": codes._GROUPS * 16 // width}
        yield codes._refit, types, {"WIDTH": width, "BLOCK": codes._ELEMENTS // (16 * width)}
    names = (
        "signed",
        "shares",
        "all_sums",
        "all_scratch",
        "goal",
        "start",
        "factors",
        "gradient",
        "moments",
        "diagonals",
    )
    types = TYPES | dict.fromkeys((*names, "scales", "tables", "errors"), "*fp32")
    types |= {"all_back": "*u8", "limits": "*u8", "passes": "i32"}
    for kernel in (gpu_tables.fit_group, gpu_tables.refine_group, gpu_tables.fit_scale_group, gpu_codes.feedback_group):
        yield kernel, types, {}
    for free in (True, False):
        yield gpu_codes.descend_group, types, {"FREE": free}


for kernel, types, constants in kernels():
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    warps = {"num_warps": 1} if kernel.__module__ in (gpu_codes.__name__, gpu_tables.__name__) else {}
    compiled = triton.compile(source, target=HOPPER, options=OPTIONS | warps)
    arithmetic = re.findall(r"\b(?:add|sub|mul|div|fma|mad)(?:\.\w+)*\.f(?:32|64)\b", compiled.asm["ptx"])
    inexact = {word for word in arithmetic if not re.fullmatch(r"(?:add|sub|mul|div)\.rn\.f(?:32|64)", word)}
    print(kernel.__name__, compiled.metadata.shared, *inexact)  # noqa: T201 - its result
