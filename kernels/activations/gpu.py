"""The operations of `reference` in Triton: a block a token, its row in registers, one launch each.

With programmatic dependent launch (Hopper and newer): the GEMM behind it may start, and fetch weights, while these run.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels import clusters
from convert_w4a8.kernels.activations import reference
from convert_w4a8.kernels.fp8 import OPTIONS, to_e4m3

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FP8_MAX = tl.constexpr(reference.FP8_MAX)
_LEAST_SCALE = tl.constexpr(reference.LEAST_SCALE)
_LOW_TERM = tl.constexpr(reference.LOW_TERM)
_PLAIN, _SILU, _NORM, _ADD_NORM = range(4)
_ELEMENTS_PER_THREAD = 16
_MOST_OF_CLUSTER = 8
"""Blocks of a cluster that every Hopper GPU takes."""
_LONG_ROW = 14336
"""Numbers that are read from which on a cluster is faster than one block: of gates and ups, both."""
_FEW_ROWS = 16
"""Rows up to which it is: many blocks fill the GPU by themselves."""
_LARGEST_OF_CLUSTER = tl.constexpr(
    """
{
.shared .align 4 .b32 room;
.reg .pred first;
.reg .b32 own, there, thread;
.reg .f32 found;
mov.u32 own, room;
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
@first st.shared.f32 [own], $1;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
mapa.shared::cluster.u32 there, own, 0;
ld.shared::cluster.f32 $0, [there];
"""
    + "".join(
        f"""mapa.shared::cluster.u32 there, own, {block};
ld.shared::cluster.f32 found, [there];
max.NaN.f32 $0, $0, found;
"""
        for block in range(1, _MOST_OF_CLUSTER)
    )
    + """
barrier.cluster.arrive.relaxed.aligned;
}
"""
)
"""The largest number of the blocks of a cluster. None of them may end before all have read (`_READ_BY_ALL`)."""
_READ_BY_ALL = tl.constexpr("barrier.cluster.wait.aligned; mov.b32 $0, 0;")


def quantize(x: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.quantize`."""
    return _run(_PLAIN, x, terms)[:2]


def silu_quantize(gate_up: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.silu_quantize`."""
    return _run(_SILU, gate_up, terms)[:2]


def norm_quantize(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.norm_quantize`."""
    return _run(_NORM, x, terms, weight=weight, epsilon=epsilon)[:2]


def add_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.add_norm_quantize`."""
    return _run(_ADD_NORM, x, terms, residual, weight, epsilon)


def _run(
    what: int,
    x: torch.Tensor,
    terms: int,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k = x.shape[0], x.shape[1] // (2 if what == _SILU else 1)
    tokens = torch.empty(terms * m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    total = torch.empty_like(x) if what == _ADD_NORM else x
    if m == 0:
        return tokens, scale, total
    early = _starts_early(x.device)
    parts = _MOST_OF_CLUSTER if early and what in (_PLAIN, _SILU) and x.shape[1] >= _LONG_ROW and m <= _FEW_ROWS else 1
    share = triton.cdiv(k, 16 * parts) * 16
    block = triton.next_power_of_2(share)
    warps = min(max(block // (32 * _ELEMENTS_PER_THREAD), 4), 32)
    options = OPTIONS | {"num_warps": warps} | ({"launch_pdl": True} if early else {})
    arguments = (
        *(x, x if residual is None else residual, x if weight is None else weight, tokens, scale, total, epsilon),
        *(m, k, share, x.stride(0), x.stride(0) if residual is None else residual.stride(0)),
    )
    constants = {
        "WHAT": what,
        "TERMS": terms,
        "PARTS": parts,
        "BLOCK": block,
        "EARLY": early,
        "INTERPRETED": _INTERPRETED,
    }
    with torch.cuda.device_of(x):
        if parts > 1:
            clusters.launch(_quantize_kernel, m, parts, arguments, constants, options)
        else:
            _quantize_kernel[(m,)](*arguments, **constants, **options)
    return tokens, scale, total


@cache
def _starts_early(device: torch.device) -> bool:
    return not _INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _bf16(x, INTERPRETED: tl.constexpr):
    """Round float32 to bfloat16, to the nearest, ties to even; the interpreter's own conversion cuts off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _fp8(x, INTERPRETED: tl.constexpr):
    """Round float32 to E4M3, to the nearest, ties to even."""
    if INTERPRETED:
        return to_e4m3(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:  # noqa: RET505 - the compiler sees one of the two
        return x.to(tl.float8e4nv)


@triton.jit
def _rounded(x):
    """Round |float32| ≤ 448 to the nearest E4M3 number, ties to even, and stay in float32.

    Triton 3.6 gives elements' neighbours where FP8 is cast back to float32 beside being stored.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 · 2¹⁴: multiples of 2⁻⁹ remain
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def _larger(one, other):
    """Return the larger number, NaN if one of them is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["M"])
def _quantize_kernel(
    x,
    residual,
    weight,
    tokens,
    scale,
    total,
    epsilon,
    M,
    K,
    SHARE,
    STRIDE,
    RESIDUAL_STRIDE,
    WHAT: tl.constexpr,
    TERMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Quantize a row, or so many numbers of it as a block of a cluster of PARTS has."""
    m = (tl.program_id(0) // PARTS).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < SHARE
    k += tl.program_id(0) % PARTS * SHARE
    inside = inside & (k < K)
    if EARLY:
        gdc_launch_dependents()
    if WHAT >= 2:
        factor = tl.load(weight + k, mask=inside, other=0.0)  # not an activation: no kernel before writes it
    if EARLY:
        gdc_wait()
    value = tl.load(x + m * STRIDE + k, mask=inside, other=0.0).to(tl.float32)
    if WHAT == 1:
        gate = _bf16(value / (1.0 + tl.exp(-tl.maximum(value, -80.0))), INTERPRETED).to(tl.float32)
        up = tl.load(x + m * STRIDE + K + k, mask=inside, other=0.0).to(tl.float32)
        value = _bf16(gate * up, INTERPRETED).to(tl.float32)
    if WHAT == 3:
        value += tl.load(residual + m * RESIDUAL_STRIDE + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + m * K + k, _bf16(value, INTERPRETED), mask=inside)
    if WHAT >= 2:
        normed = value * tl.rsqrt(tl.sum(value * value, 0) / K + epsilon)
        normed = _bf16(normed, INTERPRETED).to(tl.float32)
        value = _bf16(normed * factor.to(tl.float32), INTERPRETED).to(tl.float32)
    largest = tl.reduce(tl.abs(value), 0, _larger)
    if PARTS > 1:
        largest = tl.inline_asm_elementwise(
            _LARGEST_OF_CLUSTER, "=f,f", [largest], dtype=tl.float32, is_pure=False, pack=1
        )
    step = _larger(largest / _FP8_MAX, _LEAST_SCALE)
    if TERMS == 2:
        step = ((step.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scaled = tl.clamp(value * (1.0 / step), -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(tokens + m * K + k, _fp8(scaled, INTERPRETED), mask=inside)
    if TERMS == 2:
        low = (scaled - _rounded(scaled)) * _LOW_TERM
        tl.store(tokens + (M + m) * K + k, _fp8(low, INTERPRETED), mask=inside)
    tl.store(scale + m, step)
    if PARTS > 1:
        tl.inline_asm_elementwise(_READ_BY_ALL, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
