"""Group scales → FP8 group scales and FP32 channel scales: vLLM's own arithmetic, bit for bit.

A group scale f is stored with 1/8 inside, so that |f·v| ≤ 448 for every code v in −8 … 7: no table entry can clip.
Better choices of f and of the channel scale than vLLM's are in `scale_search.py`.
"""

import torch

from convert_w4a8.fp8 import CODE_MAX, E4M3, E4M3_MAX, SCALE_MAX, to_e4m3
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO

CHANNEL_FLOOR = 1 / (E4M3_MAX * 512)
"""vLLM's floor of c = amax/448. A channel whose largest group scale is below 1/512 loses range there."""


def check_finite(scales: torch.Tensor) -> None:
    """Raise ValueError where a scale is infinite or NaN: the E4M3 cast would make a number of it."""
    # A sum is finite only if its terms are, and is cheaper than isfinite().all(); float64, so that it cannot overflow.
    if not torch.isfinite(scales.sum(dtype=torch.float64)):
        bad = scales.numel() - int(torch.isfinite(scales).sum())
        raise ValueError(f"{bad} of {scales.numel()} group scales are not finite")


def channel_unit(amax: torch.Tensor) -> torch.Tensor:
    """Return vLLM's c = max(amax / 448, 1 / (448·512)) for the largest group scales of channels, float32 [N].

    The divisor is a tensor on purpose: on CUDA, torch turns division by a Python number into multiplication by its
    reciprocal, which differs in the last bit for every other channel.
    """
    return (amax / amax.new_full((), E4M3_MAX)).clamp(min=CHANNEL_FLOOR)


def quantize_reference(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize group scales as vLLM 0.25 … 0.33 does at load ("column" quantization), bit for bit.

        c[n] = max(amax_g |s[g, n]| / 448, 1 / (448·512))
        f[g, n] = e4m3(e4m3(s[g, n] / c[n]) / 8),  channel[n] = 8·c[n]

    scales: float16, bfloat16 or float32 [G, N]; their stored values are used. Signs are kept.
    Returns (float8_e4m3fn [G, N], float32 [N]). Raises ValueError on a scale that is not finite.
    """
    check_finite(scales)
    s = scales.float()
    c = channel_unit(s.abs().amax(dim=0))
    f = to_e4m3(to_e4m3(s / c).float() / CODE_MAX)
    return f, c * CODE_MAX


def quantize_naive(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast group scales to FP8 as they are, with channel scales of 1: the baseline to compare with, not a mode.

    Scales of real models fall into the subnormals, where few distinct values are left.
    Same arguments, results and errors as `quantize_reference`. Saturates at ±56, so that no entry can clip.
    """
    check_finite(scales)
    f = scales.float().clamp(-SCALE_MAX, SCALE_MAX).to(E4M3)
    return f, torch.ones(scales.shape[1], dtype=torch.float32, device=scales.device)


_PLAIN_RANGE = 7.5
"""amax/7.5 uses the codes −8 … 7 to both ends with the same error."""


def round_to_nearest(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float32 [n, K] in the plainest way: codes uint8 [n, K] and scales float32 [K/128, n]."""
    groups = weights.view(len(weights), -1, GROUP_SIZE)
    scales = groups.abs().amax(dim=-1) / _PLAIN_RANGE
    steps = groups / torch.where(scales > 0, scales, 1.0)[..., None]
    codes = steps.round_().clamp_(-CODE_MAX, CODE_MAX - 1) + SYMMETRIC_ZERO
    return codes.to(torch.uint8).flatten(1), scales.t()
