"""The operations of `reference` in Triton: one launch each, sums in a fixed order."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import os

import torch
import triton
import triton.language as tl

from convert_w4a8.fp8 import E4M3_MAX, MIN_TOKEN_SCALE
from convert_w4a8.kernels.fp8 import OPTIONS, from_e4m3, to_bf16, to_e4m3
from convert_w4a8.kernels.training.gpu_tables import choose, look_up, pull, sum_by_entry

__all__ = [
    "adam",
    "choose",
    "divergence",
    "look_up",
    "pull",
    "quantize",
    "scale_gradients",
    "scale_outputs",
    "sum_by_entry",
    "widen",
]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FP8_MAX = tl.constexpr(E4M3_MAX)
_LEAST_SCALE = tl.constexpr(MIN_TOKEN_SCALE)
_ELEMENTS_PER_THREAD = 16
_BLOCK = 1024
"""Elements of a block where they do not depend on each other."""
_LOGITS = 4096
"""Logits of a token at a time."""


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.quantize`."""
    x = x.contiguous()
    m, k = x.shape
    tokens = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    wide = torch.empty(m, k, dtype=torch.bfloat16, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    warps = min(max(block // (32 * _ELEMENTS_PER_THREAD), 4), 32)
    with torch.cuda.device_of(x):
        _quantize_kernel[(m,)](x, tokens, wide, scale, k, BLOCK=block, num_warps=warps, **OPTIONS)
    return tokens.view(torch.float8_e4m3fn), wide, scale


def widen(tokens: torch.Tensor) -> torch.Tensor:
    """See `reference.widen`."""
    out = torch.empty(tokens.shape, dtype=torch.bfloat16, device=tokens.device)
    count = tokens.numel()
    with torch.cuda.device_of(tokens):
        _widen_kernel[(triton.cdiv(count, _BLOCK),)](tokens.view(torch.uint8), out, count, BLOCK=_BLOCK, **OPTIONS)
    return out


def scale_outputs(sums: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor) -> torch.Tensor:
    """See `reference.scale_outputs`."""
    out = torch.empty(sums.shape, dtype=torch.bfloat16, device=sums.device)
    m, n = sums.shape
    with torch.cuda.device_of(sums):
        _outputs_kernel[(m, triton.cdiv(n, _BLOCK))](
            sums, token_scale, channel_scale, out, n, BLOCK=_BLOCK, INTERPRETED=_INTERPRETED, **OPTIONS
        )
    return out


def scale_gradients(
    gradient: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.scale_gradients`."""
    gradient = gradient.contiguous()
    by_channel, by_token = torch.empty_like(gradient), torch.empty_like(gradient)
    m, n = gradient.shape
    with torch.cuda.device_of(gradient):
        _gradients_kernel[(m, triton.cdiv(n, _BLOCK))](
            gradient,
            token_scale,
            channel_scale,
            by_channel,
            by_token,
            n,
            BLOCK=_BLOCK,
            INTERPRETED=_INTERPRETED,
            **OPTIONS,
        )
    return by_channel, by_token


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `reference.divergence`."""
    student, teacher = student.contiguous(), teacher.contiguous()
    values = torch.empty(len(student), dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student) if with_gradient else None
    if len(student):
        with torch.cuda.device_of(student):
            _divergence_kernel[(len(student),)](
                student,
                teacher,
                values,
                student if gradient is None else gradient,
                student.shape[1],
                BLOCK=min(_LOGITS, triton.next_power_of_2(student.shape[1])),
                GRADIENT=with_gradient,
                num_warps=8,
                **OPTIONS,
            )
    return values, gradient


def adam(
    value: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    rounded: torch.Tensor | None,
    numbers: torch.Tensor,
) -> None:
    """See `reference.adam`."""
    count = value.numel()
    with torch.cuda.device_of(value):
        _adam_kernel[(triton.cdiv(count, _BLOCK),)](
            value,
            gradient.contiguous(),
            first,
            second,
            value if rounded is None else rounded,
            numbers,
            count,
            ROUNDED=rounded is not None,
            BLOCK=_BLOCK,
            INTERPRETED=_INTERPRETED,
            **OPTIONS,
        )


@triton.jit
def _quantize_kernel(x, tokens, wide, scale, K, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    value = tl.load(x + m * K + k, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), _FP8_MAX), _LEAST_SCALE)
    scaled = tl.clamp(tl.div_rn(value, step), -_FP8_MAX, _FP8_MAX)
    bits = scaled.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (scaled + 24576.0) - 24576.0  # 1.5 · 2¹⁴: multiples of 2⁻⁹ remain
    rounded = tl.where(tl.abs(scaled) < 0.015625, subnormal, normal)
    tl.store(tokens + m * K + k, to_e4m3(scaled).to(tl.uint8), mask=inside)
    tl.store(wide + m * K + k, rounded.to(tl.bfloat16), mask=inside)
    tl.store(scale + m, step)


@triton.jit
def _widen_kernel(tokens, out, COUNT, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    tl.store(out + place, from_e4m3(tl.load(tokens + place, mask=inside, other=0)).to(tl.bfloat16), mask=inside)


@triton.jit
def _outputs_kernel(sums, token_scale, channel_scale, out, N, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    value = tl.load(sums + m * N + n, mask=inside, other=0.0)
    value = tl.load(token_scale + m) * (tl.load(channel_scale + n, mask=inside, other=0.0) * value)
    tl.store(out + m * N + n, to_bf16(value, INTERPRETED), mask=inside)


@triton.jit
def _gradients_kernel(
    gradient, token_scale, channel_scale, by_channel, by_token, N, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    value = tl.load(gradient + m * N + n, mask=inside, other=0.0).to(tl.float32)
    channel = tl.load(channel_scale + n, mask=inside, other=0.0)
    tl.store(by_channel + m * N + n, to_bf16(value * channel, INTERPRETED), mask=inside)
    tl.store(by_token + m * N + n, to_bf16(value * tl.load(token_scale + m), INTERPRETED), mask=inside)


@triton.jit
def _divergence_kernel(student, teacher, values, gradient, V, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * V
    place = tl.arange(0, BLOCK)
    most_s = tl.full((BLOCK,), -float("inf"), tl.float32)
    most_t = most_s
    for start in range(0, V, BLOCK):
        inside = start + place < V
        s = tl.load(student + row + start + place, mask=inside, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + row + start + place, mask=inside, other=-float("inf")).to(tl.float32)
        most_s, most_t = tl.maximum(most_s, s), tl.maximum(most_t, t)
    top_s, top_t = tl.max(most_s, 0), tl.max(most_t, 0)
    total_s = tl.zeros((BLOCK,), tl.float32)
    total_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + place < V
        s = tl.load(student + row + start + place, mask=inside, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher + row + start + place, mask=inside, other=-float("inf")).to(tl.float32)
        total_s += tl.exp(s - top_s)
        total_t += tl.exp(t - top_t)
    log_s, log_t = tl.log(tl.sum(total_s, 0)), tl.log(tl.sum(total_t, 0))
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + place < V
        s = (tl.load(student + row + start + place, mask=inside, other=0.0).to(tl.float32) - top_s) - log_s
        t = (tl.load(teacher + row + start + place, mask=inside, other=0.0).to(tl.float32) - top_t) - log_t
        p = tl.where(inside, tl.exp(t), 0.0)
        found += p * tl.where(inside & (p > 0.0), t - s, 0.0)
        if GRADIENT:
            tl.store(gradient + row + start + place, (tl.exp(s) - p).to(gradient.dtype.element_ty), mask=inside)
    tl.store(values + tl.program_id(0), tl.sum(found, 0))


@triton.jit
def _adam_kernel(
    value,
    gradient,
    first,
    second,
    rounded,
    numbers,
    COUNT,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(first + place, mask=inside, other=0.0)
    v = tl.load(second + place, mask=inside, other=0.0)
    m += (g - m) * tl.load(numbers + 1)
    v += (g * g - v) * tl.load(numbers + 2)
    change = tl.div_rn(tl.load(numbers) * m, tl.sqrt_rn(v) * tl.load(numbers + 3) + tl.load(numbers + 4))
    new = tl.load(value + place, mask=inside, other=0.0) - change
    tl.store(first + place, m, mask=inside)
    tl.store(second + place, v, mask=inside)
    tl.store(value + place, new, mask=inside)
    if ROUNDED:
        tl.store(rounded + place, to_bf16(new, INTERPRETED), mask=inside)
