"""The `w4a8_lut` format (docs/format.md): codes in the kernel's own order, loaded by our vLLM plugin as they are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorSpec
from convert_w4a8.encoding import lut_layout
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear
from convert_w4a8.lut_format import LAYOUT, METHOD, TILE_K, TILE_N, VERSION, Tables, lut_shape
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets.base import check_outputs, packed_shape

NAME = "lut"
STOCK = False
MODES = tuple(ScalesMode)

QUANT_METHOD = METHOD


def matches(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is of this format."""
    return quantization_config.get("quant_method") == QUANT_METHOD


def outputs(module: str, n: int, k: int, mode: ScalesMode) -> tuple[TensorSpec, ...]:
    """Return the tensors that a layer with N = n and K = k becomes."""
    groups = k // GROUP_SIZE
    if mode is ScalesMode.DIRECT:
        tables = TensorSpec(f"{module}.weight_lut", "F8_E4M3", (groups, 8 * n))
    else:
        tables = TensorSpec(f"{module}.weight_scale", "F8_E4M3", (groups, n))
    return (
        TensorSpec(f"{module}.weight_packed", "I32", lut_shape(n, k)),
        tables,
        TensorSpec(f"{module}.weight_chan_scale", "F32", (n,)),
    )


def encode(module: str, w: W4A8Linear) -> dict[str, Iterable[torch.Tensor]]:
    """Return a layer's tensors by name, in parts along their first dimension."""
    tensors: dict[str, Iterable[torch.Tensor]] = {
        f"{module}.weight_packed": lut_layout.repack_parts(w.packed, w.packing),
        f"{module}.weight_chan_scale": [w.channel_scale],
    }
    if w.lut is not None:
        tensors[f"{module}.weight_lut"] = [w.lut.flatten(1)]
    elif w.group_scale is not None:
        tensors[f"{module}.weight_scale"] = [w.group_scale]
    return tensors


def find_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the converted modules of a checkpoint of this format."""
    return checkpoint.modules_with("weight_packed")


def decode(checkpoint: Checkpoint, module: str) -> W4A8Linear:
    """Read a layer back, from the bytes of the checkpoint alone.

    Raises:
        ConvertError: a tensor is missing or has another shape than the format prescribes.

    """
    has_lut = f"{module}.weight_lut" in checkpoint.tensors
    rows, columns = packed_shape(checkpoint, module, "[K/32, 4·N]")
    n, k = columns // 4, rows * TILE_K
    if n % TILE_N or columns % 4:
        raise ConvertError(f"{module}.weight_packed", f"has {columns} columns, not 4·N", "convert the checkpoint again")
    check_outputs(checkpoint, outputs(module, n, k, ScalesMode.DIRECT if has_lut else ScalesMode.REFERENCE))
    tables = checkpoint.read(f"{module}.weight_lut").view(-1, n, 8) if has_lut else None
    return W4A8Linear(
        packed=lut_layout.unpack(checkpoint.read(f"{module}.weight_packed")),
        packing=Packing.ROWS,
        group_scale=None if has_lut else checkpoint.read(f"{module}.weight_scale"),
        lut=tables,
        channel_scale=checkpoint.read(f"{module}.weight_chan_scale"),
    )


def quantization_config(
    source_config: Mapping[str, Any],  # noqa: ARG001  (part of the Target interface)
    ignore: Sequence[str],
    mode: ScalesMode,
    conversion: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the quantization_config block of the output's config.json."""
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "layout": LAYOUT,
        "bits": 4,
        "group_size": GROUP_SIZE,
        "tables": str(Tables.ENTRIES if mode is ScalesMode.DIRECT else Tables.SCALE),
        "activations": {"type": "float8_e4m3fn", "strategy": "token", "dynamic": True},
        "ignore": list(ignore),
        "conversion": dict(conversion),
    }
