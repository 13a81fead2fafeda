"""What the programs that compile GEMMs share: types of the kernels' arguments, and where the disassembler is."""

from pathlib import Path

import triton

TYPES = {
    "tokens": "*fp8e4nv",
    "packed": "*i32",
    "tables": "*i64",
    "output": "*bf16",
    "counters": "*i32",
    **dict.fromkeys(("token_scale", "channel_scale", "sums"), "*fp32"),
    **dict.fromkeys(("M", "N", "K", "SPLITS"), "i32"),
}
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
