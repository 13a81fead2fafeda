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
_PARTS = ("weight_packed", "weight_scale", "weight_lut", "weight_chan_scale", "input_scale")


@dataclass(frozen=True)
class Weight:
    """A matrix, or whatever else a parameter is. kind: "lut", "compressed-tensors", or "16" for what is not INT4.

    FP8 is exact, and of kind "16" as well.
    """

    kind: str
    values: torch.Tensor


def holdings(model: torch.nn.Module) -> dict[str, Weight]:
    """Return everything that a model holds, by the name that its BF16 twin has for it."""
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            if hasattr(module, "weight_packed"):
                found[f"{name}.weight"] = _matrix(module, "", is_ours(module))
        elif isinstance(module, RoutedExperts):
            for projection in ("w13_", "w2_"):
                if hasattr(module, f"{projection}weight_packed"):
                    found[f"{name}.{projection}weight"] = _experts(module, projection)
    for name, parameter in model.named_parameters():
        if not name.endswith((*_PARTS, *NOT_OF_CHECKPOINTS)) and parameter.numel():
            is_fp8 = parameter.dtype == torch.float8_e4m3fn
            found[name] = Weight("16", _from_fp8(model, name) if is_fp8 else parameter.data)
    return found


def _from_fp8(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Decode an FP8 parameter [N, K], or that of all experts [experts, N, K], as BF16 weights would be stored."""
    module, _, role = name.rpartition(".")
    owner: Any = model.get_submodule(module)
    scale = getattr(owner, f"{role}_scale_inv" if hasattr(owner, f"{role}_scale_inv") else f"{role}_scale").data.float()
    weight = getattr(owner, role).data.float()
    if weight.dim() == 3:
        pairs = zip(weight, scale.view(len(weight), -1) if scale.dim() < 3 else scale, strict=True)
        return torch.stack([_times(of_one, by, [len(of_one) // len(by)] * len(by)) for of_one, by in pairs])
    return _times(weight, scale, getattr(owner, "logical_widths", [len(weight)]))


def _times(weight: torch.Tensor, scale: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Multiply [N, K] by the scales of output channels [N, 1], of blocks of 128×128, or of shards of these widths."""
    if scale.dim() < 2:
        scale = scale.view(-1).repeat_interleave(torch.tensor(widths))[:, None]
    elif len(scale) != len(weight):
        scale = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return (weight * scale).bfloat16()


def _matrix(layer: Any, prefix: str, lut: bool, expert: int | None = None) -> Weight:
    """Decode the parameters PREFIXweight_… of a module, or of one expert in them, to float32 [N, K]."""

    def part(role: str) -> torch.Tensor:
        data: torch.Tensor = getattr(layer, prefix + role).data
        return (data if expert is None else data[expert]).contiguous()

    packed = part("weight_packed")
    if not lut:
        scales = part("weight_scale")
        if expert is not None and packed.shape[1] == scales.shape[1]:  # W4A16, for Marlin: inputs first
            packed, scales = packed.t().contiguous(), scales.t().contiguous()
        return Weight("compressed-tensors", decode_packed(packed, scales))
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
