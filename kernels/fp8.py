"""What several kernels do with numbers, rounded as torch rounds it."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": False}
"""For every launch: a fused multiply-add would round once where a CPU rounds twice."""
_ROUNDER = tl.constexpr(1.5 * 2**23)
"""x + this − this rounds |x| < 2²² to the nearest integer, ties to even."""


@triton.jit
def to_e4m3(x):
    """Return the bytes, int32, of the nearest E4M3 numbers, ties to even, saturating."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = ((magnitude * 512.0 + _ROUNDER) - _ROUNDER).to(tl.int32)
    return sign | tl.where(magnitude < 0.015625, subnormal, normal)


@triton.jit
def from_e4m3(byte):
    """Return the float32 values of bytes."""
    b = byte.to(tl.int32)
    exponent, mantissa = (b >> 3) & 15, b & 7
    subnormal = (mantissa.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    magnitude = tl.where(exponent > 0, ((exponent + 120) << 23) | (mantissa << 20), subnormal)
    return (magnitude | ((b & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(x, INTERPRETED: tl.constexpr):
    """Round float32 to bfloat16, to the nearest, ties to even; the interpreter's own conversion cuts off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def round_code(x):
    """Round to the nearest whole number from −8 to 7, ties to even."""
    clamped = tl.minimum(tl.maximum(x, -9.0), 8.0)
    return tl.minimum(tl.maximum((clamped + _ROUNDER) - _ROUNDER, -8.0), 7.0)


@triton.jit
def tree_sum(terms):
    """Sum up [R, V, T] over V by halves, as `codes/reference.py`'s tree_sum does: [R, T]."""
    R: tl.constexpr = terms.shape[0]
    T: tl.constexpr = terms.shape[2]
    V: tl.constexpr = terms.shape[1]
    for step in tl.static_range(4 if V == 16 else 7):
        halves = tl.reshape(terms, (R, 2, (V >> step) // 2, T))
        low, high = tl.split(tl.permute(halves, (0, 2, 3, 1)))
        terms = low + high
    return tl.reshape(terms, (R, T))
