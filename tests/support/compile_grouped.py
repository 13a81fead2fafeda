"""Compile the kernels of the experts for a compute capability, without a GPU: `compile_grouped.py 90`.

`TRITON_INTERPRET` must not be set. Prints a line a kernel: its name, NAME=COUNT of instructions of the machine code,
the bytes of shared memory, and what in the loop over K meets registers that the tensor core is still at.
"""

import re
import sys
from typing import Any

import triton
from compile_gemm_types import hazards, machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from convert_w4a8.kernels.gemm import grouped_kernels
from convert_w4a8.kernels.gemm.grouped_reference import ACTIVATIONS

TYPES = {
    **dict.fromkeys(("x", "both", "results"), "*bf16"),
    **dict.fromkeys(("tokens", "active"), "*fp8e4nv"),
    **dict.fromkeys(("ids", "rows", "of_block", "expert_map", "packed", "counters"), "*i32"),
    **dict.fromkeys(("token_scale", "channel_scale", "scales", "sums", "weights", "maxima"), "*fp32"),
    **dict.fromkeys(("K", "N", "PAIRS", "E", "BLOCKS", "ROWS", "WIDTH", "SPLITS", "SHARE", "SHIFT", "MAXIMA"), "i32"),
    "tables": "*i64",
    "index": "*u8",
    "output": "*bf16",
}
NOT_SIXTEEN = ("PAIRS", "E", "BLOCKS", "ROWS", "WIDTH", "SPLITS", "SHARE", "SHIFT", "MAXIMA")
INSTRUCTIONS = ("PRMT", "QGMMA", "QMMA", "UTCQMMA", "HMMA", "LDL", "STL", "ACQBULK", "PREEXIT")


def show(
    kernel: Any, capability: int, constants: dict[str, Any], warps: int = 4, source_of: Any = ASTSource, **more: Any
) -> None:
    names = kernel.arg_names
    constants = {"INTERPRETED": False, "HOPPER": capability == 90, "EARLY": capability == 90} | constants
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    variable = [name for name in names if name not in constants and name not in NOT_SIXTEEN]
    sixteen = {(names.index(name),): [["tt.divisibility", 16]] for name in variable}
    source = source_of(kernel, signature, places, sixteen)
    options: dict[str, Any] = {"num_warps": warps, "launch_pdl": capability == 90} | more
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = machine_code(compiled)
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    found["limited"] = int(more.get("maxnreg") is not None)
    counts = " ".join(f"{name}={count}" for name, count in found.items())
    apart = int(constants.get("APART", False))
    if capability == 90 and "QGMMA" in code:
        counts += f" HAZARDS={len(hazards(code))}"
    print(kernel.__name__, counts, f"shared={compiled.metadata.shared} apart={apart}")  # noqa: T201


HOPPER = (
    *((8, 2, 64, 4, 4, True, 2, None), (8, 1, 128, 4, 4, True, 1, "silu"), (16, 2, 64, 4, 6, True, 0, "silu")),
    *(
        (16, 1, 128, 4, 4, False, 0, "gelu"),
        (16, 2, 128, 8, 4, True, 1, None),
        (32, 1, 128, 4, 3, True, 0, "gelu_tanh"),
    ),
    *((32, 1, 64, 4, 4, True, 2, None), (64, 1, 64, 4, 3, False, 0, "silu"), (128, 1, 128, 8, 3, True, 0, None)),
    *(
        (8, 2, 128, 4, 3, True, 1, None, 128),
        (8, 2, 128, 4, 3, True, 2, None, 128),
        (8, 1, 128, 4, 3, True, 1, "silu", 128),
    ),
)
"""Pairs of a block, parts of K, channels, warps, copies in flight, whether it reads indices of tables, how weights are
looked up, the activation, and of those with a limit, as `tuned_experts` has them, registers."""


MANY = (
    *((32, 0, 2, 64, 4, 3, True, None, None), (64, 0, 1, 64, 4, 3, True, 128, "silu")),
    *((64, 16, 1, 64, 4, 3, True, None, "gelu"), (64, 16, 1, 128, 8, 3, False, None, None)),
    *((64, 32, 1, 128, 8, 3, False, None, "silu"), (64, 0, 1, 128, 8, 3, True, None, None)),
)
"""Of the kernel for many pairs: both runs of pairs, parts of K, channels, warps, copies in flight, whether it reads
indices of tables, registers, the activation."""
UNROLLED = (
    *((8, 0, 2, 64, 4, 4, True, 96, None), (16, 0, 1, 64, 4, 6, True, None, "silu")),
    *((32, 0, 1, 128, 4, 3, True, None, "silu"), (64, 0, 1, 64, 4, 3, True, None, None)),
    *((64, 0, 1, 128, 4, 3, True, None, "silu"), (64, 0, 1, 128, 4, 3, True, None, None)),
)
"""The same, of those that multiply one group after the other."""
READ_AHEAD = ((32, 0, 1, 64, 4, 4, True, None, None),)
"""The same, of those that read the next group's words meanwhile."""


def show_hopper() -> None:
    from convert_w4a8.kernels.gemm import grouped_hopper_kernel, grouped_many_kernel

    for block_m, splits, block_n, warps, stages, indexed, apart, activation, *limit in HOPPER:
        constants: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "CHAIN": block_m >= 64}
        constants |= {"SPLIT": splits > 1, "INDEXED": indexed, "SORTED": activation is None, "ACTIVATION": activation}
        constants |= {"APART": apart > 0, "BY_PRODUCTS": apart == 2}
        registers = limit[0] if limit else None
        show(grouped_hopper_kernel._grouped_kernel, 90, constants, warps, GluonASTSource, maxnreg=registers)
    many = [(overlap, case) for overlap, cases in ((3, MANY), (0, UNROLLED), (1, READ_AHEAD)) for case in cases]
    for overlap, (block_m, rest, splits, block_n, warps, stages, indexed, registers, activation) in many:
        constants = {"BLOCK_M": block_m, "REST": rest, "BLOCK_N": block_n, "STAGES": stages, "SPLIT": splits > 1}
        constants |= {"INDEXED": indexed, "SORTED": activation is None, "ACTIVATION": activation}
        constants |= {"OVERLAP": overlap, "CHAIN": overlap == 3 or block_m >= 32}
        show(grouped_many_kernel._grouped_kernel, 90, constants, warps, GluonASTSource, maxnreg=registers)


def main() -> None:
    capability = int(sys.argv[1])
    sort = {"MAPPED": True, "BLOCK_M": 16, "LEAST": 16, "BINS": 128, "CHUNK": 128, "ONE_CHUNK": True, "BLOCK_K": 2048}
    show(grouped_kernels._prepare_kernel, capability, sort)
    multiply = {"BLOCK_M": 16, "BLOCK_N": 64, "STAGES": 4, "CHAIN": False, "SPLIT": True}
    show(grouped_kernels._grouped_kernel, capability, multiply)
    multiply |= {"SPLIT": False}
    show(grouped_kernels._grouped_kernel, capability, multiply)
    show(grouped_kernels._grouped_kernel, capability, multiply | {"BLOCK_M": 128, "STAGES": 3, "CHAIN": True})
    if capability == 90:
        show_hopper()
    for activation in ACTIVATIONS:
        activate = {"MAPPED": True, "BLOCK": 1024, "ACTIVATION": activation, "WHOLE": activation != "silu"}
        show(grouped_kernels._activate_kernel, capability, activate)
    show(grouped_kernels._quantize_pairs_kernel, capability, {"MAPPED": True, "BLOCK": 1024, "PARTS": 16})
    show(grouped_kernels._combine_kernel, capability, {"MAPPED": False, "CHOICES": 8, "BLOCK": 1024})


if __name__ == "__main__":
    main()
