"""From bfloat16 activations to the FP8 terms that the GEMM takes, and what comes just before, in torch."""

import torch

FP8_MAX = 448.0
LEAST_SCALE = 1 / (FP8_MAX * 512)
"""vLLM's least scale of a token (`QuantFP8`)."""
LOW_TERM = 16.0
"""What the second term of an activation is multiplied by."""


def quantize(x: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize bfloat16 [M, K] by token: float8_e4m3fn [terms·M, K] and scales float32 [M, 1].

    One term: vLLM's `QuantFP8`, scale = amax / 448, x · (1 / scale) rounded. Two: rows M … 2M − 1 hold 16 times what
    the first rounding left, and the scale is the next power of two, so that x = scale · (first + second / 16) exactly
    for |x| above amax · 2⁻¹³, and to amax · 2⁻²¹ below.
    """
    scale = (x.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp(min=LEAST_SCALE)
    if terms == 2:
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scaled = (x.float() * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX)
    high = scaled.to(torch.float8_e4m3fn)
    if terms == 1:
        return high, scale
    low = ((scaled - high.float()) * LOW_TERM).to(torch.float8_e4m3fn)
    return torch.cat((high, low)), scale


def silu_quantize(gate_up: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize silu(gate) · up of bfloat16 [M, 2·K], each rounded to bfloat16 (vLLM's `SiluAndMul`)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return quantize(torch.nn.functional.silu(gate) * up, terms)


def norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the RMS norm of bfloat16 [M, K] with weights bfloat16 [K] (vLLM's `ir.ops.rms_norm`)."""
    return quantize(_normed(x.float(), weight, epsilon), terms)


def add_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the RMS norm of x + residual, and return that sum in bfloat16 (vLLM's `ir.ops.fused_add_rms_norm`)."""
    total = x.float() + residual.float()
    return *quantize(_normed(total, weight, epsilon), terms), total.bfloat16()


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return normed.bfloat16() * weight
