"""What the programs that compile GEMMs share: types of the kernels' arguments, and the disassembler."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
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


def arguments(
    names: Sequence[str], constants: Mapping[str, Any]
) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return what a GEMM is compiled for, from its arguments' names: types, constants, and what 16 divides."""
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    sixteen = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in TYPES
        if name in names and name not in ("M", "SPLITS")
    }
    return signature, places, sixteen


def machine_code(compiled: Any) -> str:
    """Return the machine code of a compiled kernel, disassembled."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([_DISASSEMBLER, "-c", cubin], capture_output=True, text=True, check=True).stdout
