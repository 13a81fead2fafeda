"""FP8 group scales to the kernel's lookup tables, eight bytes each."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.fp8 import OPTIONS

_BLOCK = 1024


def expand_tables(group_scale: torch.Tensor) -> torch.Tensor:
    """Expand group scales float8_e4m3fn [G, N] to tables float8_e4m3fn [G, N, 8]; see `tables.expand_tables`."""
    scales = group_scale.contiguous().view(torch.uint8)
    tables = torch.empty(*scales.shape, 8, dtype=torch.uint8, device=scales.device)
    with torch.cuda.device_of(scales):
        _expand_kernel[(triton.cdiv(scales.numel(), _BLOCK),)](scales, tables, scales.numel(), BLOCK=_BLOCK, **OPTIONS)
    return tables.view(torch.float8_e4m3fn)


@triton.jit
def _expand_kernel(scales, tables, count, BLOCK: tl.constexpr):
    """Compute e4m3(f·v) for v = −8 … −1 in integers, which round the same everywhere.

    A finite E4M3 magnitude is m·2^t with m < 16, in units of 2⁻⁹. Its product with |v| ≤ 8 is p·2^t with p ≤ 120,
    and rounding p to four significant bits is all there is to do: the byte of q·2^(s + t) is 8·(s + t) + q, even
    where q has become 16, and for subnormals too (there s = t = 0).
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK)[:, None]
    entry = tl.arange(0, 8)[None, :]
    inside = group < count - first
    f = tl.load(scales + first + group, mask=inside, other=0).to(tl.int32)
    exponent = (f >> 3) & 15
    m = tl.where(exponent == 0, 0, 8) + (f & 7)
    t = tl.maximum(exponent, 1) - 1
    p = m * (8 - entry)
    s = (p >= 16).to(tl.int32) + (p >= 32).to(tl.int32) + (p >= 64).to(tl.int32)
    q = p >> s
    remainder = p - (q << s)
    q += (2 * remainder + (q & 1) > (1 << s)).to(tl.int32)  # to nearest, ties to even
    magnitude = tl.minimum((s + t) * 8 + q, 0x7E)
    byte = tl.where((f & 0x7F) == 0x7F, 0x7F, magnitude | (~f & 0x80))  # v < 0 flips the sign, NaN stays NaN
    tl.store(tables + first * 8 + (group * 8 + entry), byte.to(tl.uint8), mask=inside & (entry < 8))
