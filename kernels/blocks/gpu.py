"""The operations of `reference` in Triton: one launch each, sums in a fixed order."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import os

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.fp8 import OPTIONS, to_bf16

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BLOCK = 1024
"""Elements of a block where they do not depend on each other."""
_MOST = tl.constexpr(88.0)
"""Of an exponent, whose power is a float32 still."""
_ROWS = 32
"""Rows whose gradients by the weight one program adds."""


def normalize(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.normalize`."""
    x = x.contiguous()
    m, h = x.shape
    out, inverse = torch.empty_like(x), torch.empty(m, 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _normalize_kernel[(m,)](x, weight, out, inverse, h, epsilon, INTERPRETED=_INTERPRETED, **_width(h), **OPTIONS)
    return out, inverse


def normalize_gradients(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.normalize_gradients`."""
    gradient, x = gradient.contiguous(), x.contiguous()
    m, h = x.shape
    programs = triton.cdiv(m, _ROWS)
    of_x, sums = torch.empty_like(x), torch.empty(programs, h, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _normalize_gradients_kernel[(programs,)](
            gradient,
            x,
            weight,
            inverse,
            of_x,
            sums,
            m,
            h,
            ROWS=_ROWS,
            INTERPRETED=_INTERPRETED,
            **_width(h),
            **OPTIONS,
        )
    return of_x, sums.sum(0)


def gate(gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `reference.gate`."""
    gates, up = gates.contiguous(), up.contiguous()
    out, count = torch.empty_like(gates), gates.numel()
    with torch.cuda.device_of(gates):
        _gate_kernel[(triton.cdiv(count, _BLOCK),)](
            gates, up, out, count, BLOCK=_BLOCK, INTERPRETED=_INTERPRETED, **OPTIONS
        )
    return out


def gate_gradients(gradient: torch.Tensor, gates: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.gate_gradients`."""
    gradient, gates, up = gradient.contiguous(), gates.contiguous(), up.contiguous()
    of_gates, of_up, count = torch.empty_like(gates), torch.empty_like(gates), gates.numel()
    with torch.cuda.device_of(gates):
        _gate_gradients_kernel[(triton.cdiv(count, _BLOCK),)](
            gradient, gates, up, of_gates, of_up, count, BLOCK=_BLOCK, INTERPRETED=_INTERPRETED, **OPTIONS
        )
    return of_gates, of_up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    """See `reference.rotate`."""
    batch, heads, length, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _rotate_kernel[(batch * length,)](
            x,
            cos,
            sin,
            out,
            *x.stride()[:3],
            length,
            heads,
            width,
            len(cos),
            BACK=back,
            HEADS=triton.next_power_of_2(heads),
            BLOCK=triton.next_power_of_2(width),
            INTERPRETED=_INTERPRETED,
            **OPTIONS,
        )
    return out.transpose(1, 2)


def _width(h: int) -> dict[str, int]:
    """Return the block that holds a row, and how many warps work on it."""
    block = triton.next_power_of_2(h)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@triton.jit
def _normalize_kernel(x, weight, out, inverse, H, epsilon, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < H
    value = tl.load(x + row * H + h, mask=inside, other=0.0).to(tl.float32)
    one = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(value * value, 0), H.to(tl.float32)) + epsilon))
    normalized = to_bf16(value * one, INTERPRETED).to(tl.float32)
    scaled = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32) * normalized
    tl.store(out + row * H + h, to_bf16(scaled, INTERPRETED), mask=inside)
    tl.store(inverse + row, one)


@triton.jit
def _normalize_gradients_kernel(
    gradient,
    x,
    weight,
    inverse,
    of_x,
    sums,
    M,
    H,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    h = tl.arange(0, BLOCK)
    inside = h < H
    factor = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + ROWS, M)):
        g = tl.load(gradient + row * H + h, mask=inside, other=0.0).to(tl.float32)
        one = tl.load(inverse + row)
        normalized = tl.load(x + row * H + h, mask=inside, other=0.0).to(tl.float32) * one
        total += g * to_bf16(normalized, INTERPRETED).to(tl.float32)
        wide = to_bf16(g * factor, INTERPRETED).to(tl.float32)
        mean = tl.div_rn(tl.sum(wide * normalized, 0), H.to(tl.float32))
        tl.store(of_x + row * H + h, to_bf16(one * (wide - normalized * mean), INTERPRETED), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + h, total, mask=inside)


@triton.jit
def _gate_kernel(gates, up, out, COUNT, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    g = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    silu = to_bf16(tl.div_rn(g, 1.0 + tl.exp(tl.minimum(-g, _MOST))), INTERPRETED).to(tl.float32)
    tl.store(out + place, to_bf16(silu * u, INTERPRETED), mask=inside)


@triton.jit
def _gate_gradients_kernel(gradient, gates, up, of_gates, of_up, COUNT, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    below = 1.0 + tl.exp(tl.minimum(-g, _MOST))
    share = tl.div_rn(1.0, below)
    silu = to_bf16(tl.div_rn(g, below), INTERPRETED).to(tl.float32)
    of_silu = to_bf16(d * u, INTERPRETED).to(tl.float32)
    tl.store(of_gates + place, to_bf16(of_silu * (share * (1.0 + g * (1.0 - share))), INTERPRETED), mask=inside)
    tl.store(of_up + place, to_bf16(d * silu, INTERPRETED), mask=inside)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    of_batch,
    of_head,
    of_token,
    LENGTH,
    heads,
    WIDTH,
    batches,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // LENGTH, place % LENGTH
    head = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    half = WIDTH // 2
    other = tl.where(d < half, d + half, d - half)
    inside = (head < heads) & (d < WIDTH)
    source = x + batch * of_batch + head * of_head + token * of_token
    angle = (tl.minimum(batch, batches - 1) * LENGTH + token) * WIDTH
    ours = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    theirs = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + (other if BACK else d), mask=d < WIDTH, other=0.0).to(tl.float32)
    theirs = tl.where((d < half) != BACK, -theirs, theirs)
    along = to_bf16(ours * c, INTERPRETED).to(tl.float32)
    across = to_bf16(theirs * s, INTERPRETED).to(tl.float32)
    tl.store(out + (place * heads + head) * WIDTH + d, to_bf16(along + across, INTERPRETED), mask=inside)
