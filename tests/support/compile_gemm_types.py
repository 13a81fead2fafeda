"""What the programs that compile GEMMs share: types of the kernels' arguments, and the disassembler."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TYPES = {
    "tokens": "*fp8e4nv",
    "packed": "*i32",
    "tables": "*i64",
    "index": "*u8",
    "output": "*bf16",
    "counters": "*i32",
    **dict.fromkeys(("token_scale", "channel_scale", "sums"), "*fp32"),
    **dict.fromkeys(("M", "N", "K", "SPLITS"), "i32"),
}
_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def machine_code(compiled: Any) -> str:
    """Return the machine code of a compiled kernel, disassembled."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([_DISASSEMBLER, "-c", cubin], capture_output=True, text=True, check=True).stdout
