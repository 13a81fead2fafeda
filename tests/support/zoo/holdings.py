"""What a loaded model holds, as weights: each linear layer and all experts, decoded from the parameters vLLM filled.

compressed-tensors is decoded with plain arithmetic here; `w4a8_lut` by the reference of its layout and tables, which
golden vectors of vLLM's own kernels hold (tests/encoding).
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase

from convert_w4a8.encoding import lut_layout, tables
from convert_w4a8.linear import Packing, W4A8Linear
from zoo.engine import NOT_OF_CHECKPOINTS, is_ours

GROUP = 128
_PARTS = ("weight_packed", "weight_scale", "weight_lut", "weight_chan_scale")


@dataclass(frozen=True)
class Weight:
    """A matrix, or whatever else a parameter is. kind: "lut", "compressed-tensors", or "16" for what is not INT4."""

    kind: str
    values: torch.Tensor


def holdings(model: torch.nn.Module) -> dict[str, Weight]:
    """Return everything that a model holds, by the name that its BF16 twin has for it."""
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            if hasattr(module, "weight_packed"):
                found[f"{name}.weight"] = _matrix(module, "", is_ours(module))
            elif module.weight.dtype == torch.float8_e4m3fn:
                found[f"{name}.weight"] = Weight("16", decode_fp8(module))
        elif isinstance(module, RoutedExperts):
            for projection in ("w13_", "w2_"):
                if hasattr(module, f"{projection}weight_packed"):
                    found[f"{name}.{projection}weight"] = _experts(module, projection)
    for name, parameter in model.named_parameters():
        if name not in found and not name.endswith((*_PARTS, *NOT_OF_CHECKPOINTS)) and parameter.numel():
            found[name] = Weight("16", parameter.data)
    return found


def _matrix(layer: Any, prefix: str, lut: bool, expert: int | None = None) -> Weight:
    """Decode the parameters PREFIXweight_… of a module, or of one expert in them, to float32 [N, K]."""

    def part(role: str) -> torch.Tensor:
        data: torch.Tensor = getattr(layer, prefix + role).data
        return (data if expert is None else data[expert]).contiguous()

    packed = part("weight_packed")
    if not lut:
        return Weight("compressed-tensors", decode_packed(packed, part("weight_scale")))
    n = packed.shape[-1] // 4
    scale = part("weight_scale") if hasattr(layer, f"{prefix}weight_scale") else None
    entries = None if scale is not None else part("weight_lut").view(-1, n, 8)
    codes = lut_layout.restore(packed)
    layer_ = W4A8Linear(codes, Packing.PACK_QUANTIZED, scale, entries, part("weight_chan_scale"))
    return Weight("lut", tables.decode(layer_))


def _experts(layer: Any, prefix: str) -> Weight:
    """Decode all experts of a module, [experts, N, K]."""
    count = len(getattr(layer, f"{prefix}weight_packed"))
    weights = [_matrix(layer, prefix, is_ours(layer), expert) for expert in range(count)]
    return Weight(weights[0].kind, torch.stack([weight.values for weight in weights]))


def decode_packed(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return (code − 8)·scale, float32 [N, K], of int32 [N, K/8] (low nibble first) and scales [N, K/128]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((packed[..., None] >> shifts) & 15).flatten(1).float() - 8
    groups = codes.view(len(codes), -1, codes.shape[1] // scale.shape[1])
    return (groups * scale.float()[..., None]).flatten(1)


def decode_fp8(layer: Any) -> torch.Tensor:
    """Return an FP8 weight times its scale, of the whole, of rows or of blocks, as bfloat16 [N, K]."""
    weight = layer.weight.data
    scale = layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale
    spread = scale.data.float().view(-1, scale.shape[-1] if scale.dim() == 2 else 1)
    for dim, size in enumerate(weight.shape):
        spread = spread.repeat_interleave(-(-size // spread.shape[dim]), dim).narrow(dim, 0, size)
    values: torch.Tensor = (weight.float() * spread).bfloat16()
    return values
