"""What the programs that compile GEMMs share: types of the kernels' arguments, and the disassembler."""

import re
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


def hazards(code: str) -> list[str]:
    """Return what, in the loop over groups, meets registers that the tensor core is still at.

    That is what writes its operands, or reads or writes its sums. The loop is the innermost one with products. A wait
    leaves so many batches of products as it says.
    """
    lines = code.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.lstrip().startswith(".L_")}
    jumps = ((i, re.search(r"BRA.*`\((\.L_\w+)\)", line)) for i, line in enumerate(lines))
    loops = [(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i]
    begin, end = next(loop for loop in loops if any("QGMMA" in line for line in lines[slice(*loop)]))
    batches: list[tuple[set[int], set[int]]] = [(set(), set())]  # operands and sums; the last is not complete
    found = []
    for line in lines[begin:end] * 2:  # what a turn leaves, the next meets
        if left := re.search(r"WARPGROUP.DEPBAR.LE gsb0, (0x[0-9a-f]+)", line):
            batches = batches[max(0, len(batches) - 1 - int(left[1], 16)) :]
            continue
        if product := re.search(r"\bQGMMA\.64x(\d+)x32\S* R(\d+), R(\d+), gdesc", line):
            width, sums, operand = map(int, product.groups())
            batches[-1][0].update(range(operand, operand + 4))
            batches[-1][1].update(range(sums, sums + width // 2))
            if "gsb0" in line:
                batches.append((set(), set()))
            continue
        read = {int(number) for number in re.findall(r"\bR(\d+)\b", line)}
        written = set()
        if result := re.search(r"\b[A-Z][A-Z0-9]*((?:\.\w+)*) R(\d+)\b", line):
            width = 4 if ".128" in result[1] else 2 if ".64" in result[1] or ".WIDE" in result[1] else 1
            written = set(range(int(result[2]), int(result[2]) + width))
        operands, sums_at = (set().union(*(batch[part] for batch in batches)) for part in (0, 1))
        if written & operands or (written | read) & sums_at:
            found.append(line.strip())
    return found
