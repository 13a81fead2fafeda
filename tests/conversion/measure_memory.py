"""Measure the most memory that converting a layer takes; for test_memory.py, which runs this as a process of its own.

Prints JSON: kind of layer → [bytes measured, bytes that `layer_memory` says]. Large blocks go back to the system at
once (ENVIRONMENT), so that what the system counts as resident is what is in use; and its record of the most is reset
(Linux: /proc/self/clear_refs) before each kind, after a small layer of it, by when all kernels are compiled.

    python tests/conversion/measure_memory.py
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import torch

from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, Reader, TensorInfo, TensorSpec
from convert_w4a8.conversion import layer as conversion
from convert_w4a8.conversion.plan import Codes, LayerPlan
from convert_w4a8.linear import DenseLinear
from convert_w4a8.options import Options
from convert_w4a8.sources import LayerSpec, Source, source_named
from convert_w4a8.targets import target_named

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Read when a process starts."""
KINDS: Mapping[str, tuple[int, int]] = {
    "gptq-kept": (4096, 4096),
    "awq-new": (8192, 8192),
    "awq-new-small": (2048, 4096),
    "gptq-act-order": (2048, 4096),
    "ct-int8": (4096, 4096),
    "dense": (2048, 4096),
    "gptq-in-bf16": (4096, 4096),
}
"""Kind of layer → (N, K)."""


def plan_of(kind: str, n: int, k: int) -> LayerPlan:
    """Return the plan of one layer; its tensors lie nowhere."""
    groups = k // 128
    forms: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "awq": {"qweight": ("I32", (k, n // 8)), "qzeros": ("I32", (groups, n // 8)), "scales": ("F16", (groups, n))},
        "gptq": {
            "qweight": ("I32", (k // 8, n)),
            "qzeros": ("I32", (groups, n // 8)),
            "scales": ("F16", (groups, n)),
            "g_idx": ("I32", (k,)),
        },
        "compressed-tensors": {"weight": ("I8", (n, k)), "weight_scale": ("BF16", (n, groups))},
        "dense": {"weight": ("BF16", (n, k))},
    }
    source = {"ct-int8": "compressed-tensors"}.get(kind, kind.partition("-")[0])
    parts = {role: TensorInfo(f"x.{role}", *form, Path("/nowhere"), 0) for role, form in forms[source].items()}
    spec = LayerSpec(
        name="x",
        source=source,
        out_features=n,
        in_features=k,
        group_size=128,
        symmetric=kind not in ("awq-new", "awq-new-small", "dense"),
        act_order=kind == "gptq-act-order",
        parts=parts,
        dense=source == "dense",
        has_zeros="qzeros" in parts,
        has_g_idx="g_idx" in parts,
        zero_offset=1 if source == "gptq" else 0,
    )
    if kind.endswith("in-bf16"):
        return LayerPlan(spec, "x", "for the measurement", Codes.NEW, None, (TensorSpec("x.weight", "BF16", (n, k)),))
    options = Options()
    specs = target_named(options.format).tensor_specs("x", n, k, options.scales)
    codes = Codes.KEPT if kind in ("gptq-kept", "ct-int8") else Codes.NEW
    return LayerPlan(spec, "x", None, codes, None, specs)


def make_tensor(info: TensorInfo, plan: LayerPlan) -> torch.Tensor:
    """Make up a tensor, as if it were read: memory of its own."""
    dtype = TORCH_DTYPES[info.dtype]
    generator = torch.Generator().manual_seed(0)
    match info.name.rpartition(".")[2], plan.spec.source:
        case (("scales" | "weight_scale"), _):
            return torch.full(info.shape, 0.01, dtype=dtype)
        case "weight", "compressed-tensors":
            return torch.randint(-8, 8, info.shape, dtype=dtype, generator=generator)
        case "weight", _:
            return torch.empty(info.shape, dtype=dtype).normal_(generator=generator)
        case "g_idx", _:
            groups = torch.arange(info.shape[0], dtype=dtype) // plan.spec.group_size
            return groups.flip(0) if plan.spec.act_order else groups
        case "qzeros", "gptq":
            return torch.full(info.shape, 0x77777777, dtype=dtype)
        case _:
            return torch.randint(-(2**31), 2**31, info.shape, dtype=dtype, generator=generator)


class Dense:
    """What reads a layer that is not quantized; there is no such format in the package yet."""

    @staticmethod
    def read_layer(spec: LayerSpec, read: Reader) -> DenseLinear:
        """Read one layer's weight."""
        return DenseLinear(read(spec.parts["weight"]))


def named(name: str) -> Source | type[Dense]:
    """Return the format of a layer."""
    return Dense if name == "dense" else source_named(name)


def convert(plan: LayerPlan) -> None:
    """Convert a layer, and make every part of its tensors."""
    tensors, _ = conversion.convert_layer(plan, lambda info: make_tensor(info, plan), Options(), torch.device("cpu"))
    for parts in tensors.values():
        for part in parts:
            part.numel()


def resident(key: str) -> int:
    """Return VmRSS, the memory in use in bytes, or VmHWM, the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(key)


def measure(kind: str, n: int, k: int) -> tuple[int, int]:
    """Return the most memory that converting a layer took, and what `layer_memory` says."""
    convert(plan_of(kind, 256, 256))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, plan = resident("VmRSS"), plan_of(kind, n, k)
    convert(plan)
    return resident("VmHWM") - before, conversion.layer_memory(plan)


def main() -> None:
    """Measure every kind of layer, in a process with the environment."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    torch.set_num_threads(1)
    with mock.patch.object(conversion, "source_named", named):
        print(json.dumps({kind: measure(kind, n, k) for kind, (n, k) in KINDS.items()}))  # noqa: T201


if __name__ == "__main__":
    main()
