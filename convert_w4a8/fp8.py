"""FP8 E4M3: its numbers, and rounding to them."""

import torch

E4M3 = torch.float8_e4m3fn


E4M3_MAX = 448.0


E4M3_NAN = 0x7F
"""The bits of NaN without the sign. There are no infinities."""


CODE_MAX = 8
"""The largest magnitude of a code: that of minus eight."""


SCALE_MAX = E4M3_MAX / CODE_MAX
"""The largest FP8 group scale: 8·56 = 448."""


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest float8_e4m3fn (ties to even), saturating at ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


MIN_TOKEN_SCALE = 1.0 / (E4M3_MAX * 512.0)
"""vLLM's floor for dynamic FP8 activation scales (csrc/quantization/w8a8/fp8, `min_scaling_factor`)."""


def quantize_tokens(act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations [M, K] per token as vLLM does: (float8_e4m3fn [M, K], float32 [M, 1])."""
    x = act.float()
    # Division by a tensor is a division; by a number, CUDA's torch multiplies by the reciprocal.
    scale = (x.abs().amax(dim=1, keepdim=True) / x.new_full((), E4M3_MAX)).clamp(min=MIN_TOKEN_SCALE)
    return to_e4m3(x / scale), scale
