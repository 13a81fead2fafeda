"""A linear layer that computes as the W4A8 kernel does, and that can be trained."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from convert_w4a8.devices import training
from convert_w4a8.distillation.tables import nearest_within_cells, round_to_e4m3, spacing
from convert_w4a8.encoding.packing import to_pack_quantized, unpack_codes
from convert_w4a8.encoding.tables import table_entries
from convert_w4a8.kernels.training.reference import look_up
from convert_w4a8.linear import Packing, W4A8Linear

_KEPT = "_w4a8_quantized"
"""An attribute of tensors, which is gone when they are."""
Own = Callable[[torch.Tensor], torch.Tensor]
"""Returns what this process has of a layer's tensor: its rows, where processes share the model."""


class Preset(StrEnum):
    """What is trained."""

    TABLES = "tables"
    """Table entries, channel scales, norms and biases. Codes stay."""
    WEIGHTS = "weights"
    """Also the weights: the code of each is the nearest entry of its table, chosen anew at every step."""


class LutLinear(nn.Module):
    """Stands for an `nn.Linear` of N × K.

    codes: uint8 [N, K], unsigned. start: float32 [N, G, 8], the entries that came in; step: their spacing in E4M3.
    entries: float32 [N, G, 8], trained, how far the entries are from `start` in units of `step`.
    scale: float32 [N], trained, the logarithm of the channel scales by those that came in, `channel_scale`.
    weight: float32 [N, K], trained, latent weights in units of `channel_scale`·`unit`; None if codes are fixed.
    unit: the root mean square of the layer's weights in units of their channel scales.
    bias: bfloat16 [N], or None.
    """

    codes: torch.Tensor
    start: torch.Tensor
    step: torch.Tensor
    channel_scale: torch.Tensor

    def __init__(
        self,
        w: W4A8Linear,
        bias: torch.Tensor | None,
        preset: Preset,
        original: torch.Tensor | None = None,
        towards: float = 0.0,
    ) -> None:
        """Make the layer of `w`.

        original: the teacher's weights [N, K]. towards: how far latent weights begin from the values of their codes
        towards these, as far as the codes allow: 0 at the values, 1 at the place nearest to the teacher's weight.
        """
        super().__init__()
        n, k = w.shape_nk
        start = table_entries(w).float().transpose(0, 1).contiguous()
        codes = unpack_codes(to_pack_quantized(w.packed, w.packing), Packing.PACK_QUANTIZED).to(torch.uint8).view(n, k)
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("step", spacing(start), persistent=False)
        self.register_buffer("channel_scale", w.channel_scale.clone(), persistent=False)
        self.entries = nn.Parameter(torch.zeros_like(start))
        self.scale = nn.Parameter(torch.zeros_like(w.channel_scale))
        self.bias = None if bias is None else nn.Parameter(bias.bfloat16())
        self.weight: nn.Parameter | None = None
        self.unit = 1.0
        if preset is Preset.WEIGHTS:
            values = look_up(start, self.codes).float()
            latent = values.clone()
            if original is not None and towards:
                near = nearest_within_cells(original.float() / self.channel_scale[:, None], start, self.codes)
                latent.lerp_(near, towards)
            self.unit = float(values.square().mean().sqrt().clamp(min=2.0**-9))
            self.weight = nn.Parameter(latent.div_(self.unit))

    @torch.no_grad()
    def current(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the layer multiplies by: entries float32 [N, G, 8] on the E4M3 grid, channel scales, codes."""
        return self.operand()[:3]

    @torch.no_grad()
    def operand(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `current` does, and the entries by the codes, bfloat16 [N, K]."""
        entries = round_to_e4m3(self.start + self.entries * self.step)
        scale = self.channel_scale * self.scale.exp()
        operations = training(entries.device)
        if self.weight is None:
            codes = self.codes.view(torch.uint8)  # as they are, where the model is not spread over processes
            return entries, scale, codes, operations.look_up(entries, codes)
        codes, values = operations.choose(self.weight, self.unit * self.channel_scale / scale, entries)
        return entries, scale, codes, values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply activations bfloat16 [..., K]; bfloat16 [..., N]."""
        y: torch.Tensor = _Multiply.apply(  # type: ignore[no-untyped-call]
            x, self.entries, self.scale, self.weight, self
        )
        return y if self.bias is None else y + self.bias


class _Multiply(torch.autograd.Function):
    """y = bf16(s·(C·(a·eᵀ))) with x ≈ s·a per token; rounding of x, of entries and to codes passes gradients on."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        entries: torch.Tensor,  # noqa: ARG004  (`layer.operand` reads it; here it is for its gradient)
        scale: torch.Tensor,  # noqa: ARG004
        weight: torch.Tensor | None,
        layer: LutLinear,
    ) -> torch.Tensor:
        operations = training(x.device)
        rounded, channel, codes, values = layer.operand()
        tokens, wide, token_scale = _quantized(x)
        ctx.save_for_backward(tokens, token_scale, rounded, channel, codes)
        ctx.step, ctx.unit, ctx.base = layer.step, layer.unit, layer.channel_scale
        ctx.has_weight = weight is not None
        y = operations.scale_outputs(_product(wide, values.t()), token_scale, channel)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, token_scale, rounded, channel, codes = ctx.saved_tensors
        operations = training(gradient.device)
        shape, gradient = gradient.shape, gradient.flatten(0, -2)
        by_channel, by_token = operations.scale_gradients(gradient, token_scale, channel)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(by_channel, operations.look_up(rounded, codes), gradient.dtype).view(*shape[:-1], -1)
        of_values = _product(by_token.t(), operations.widen(tokens))
        sums = operations.sum_by_entry(of_values, codes)
        d_scale = (sums * rounded).sum((1, 2)) * channel
        d_entries = sums.mul_(channel[:, None, None]).mul_(ctx.step)
        d_weight = of_values.mul_((ctx.unit * ctx.base)[:, None]) if ctx.has_weight else None
        return dx, d_entries, d_scale, d_weight, None


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize [..., K] by token, once for all layers whose input it is: query, key and value, or gate and up."""
    version = x._version  # noqa: SLF001 - torch's own count of changes, of which it has no other
    kept = getattr(x, _KEPT, None)
    if kept is None or kept[0] != version:
        kept = version, training(x.device).quantize(x.flatten(0, -2))
        setattr(x, _KEPT, kept)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = kept[1]
    return found


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiply bfloat16 matrices, which hold E4M3 numbers exactly, with sums in float32."""
    if a.device.type == "cpu":
        return (a.float() @ b.float()).to(dtype)
    return torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
