"""Groups and layers whose codes cannot all be kept, for the tests of the kernels that choose new ones."""

from typing import TypedDict

import pytest
import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.linear import DenseLinear, Packing, W4A8Linear, W4Linear
from convert_w4a8.operations import Codes
from convert_w4a8.quantization.codes import SCALE_CANDIDATES

KINDS = ["gauss", "few values", "one-sided", "tiny", "huge", "mostly zero", "constant"]


class Options(TypedDict, total=False):
    """Why a layer's codes cannot be kept; see `layer`."""

    zeros: bool
    group_size: int
    act_order: bool


LAYERS: dict[str, Options | None] = {
    "zero-points": {"zeros": True},
    "groups of 32": {"zeros": True, "group_size": 32},
    "groups of 64": {"group_size": 64},
    "act-order": {"zeros": True, "act_order": True},
    "dense": None,
}
"""Layers by why their codes cannot be kept; None where there are no codes yet."""


def switch_kernels_off(patch: pytest.MonkeyPatch) -> None:
    """Let the references do all the work, on every device, as where neither numba nor Triton can be used."""
    patch.setattr(devices, "_numba_works", lambda: False)
    patch.setattr(devices, "_triton_works", lambda: False)


def groups(kind: str, width: int, seed: int, rows: int = 40) -> torch.Tensor:
    """Return groups of values, float32 [rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    match kind:
        case "few values":
            return (values * 2).round() / 4
        case "one-sided":
            return -values.abs()
        case "tiny":
            return values * 1e-38
        case "huge":
            return values * 1e18
        case "mostly zero":
            return values * (values > 1)
        case "constant":
            return values[:, :1].expand(rows, width).clone()
    return values


def layer(
    *, zeros: bool = False, group_size: int = 128, act_order: bool = False, shape: tuple[int, int] = (176, 384)
) -> W4Linear:
    """Return a layer of this shape [N, K] whose codes cannot all be kept."""
    n, k = shape
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(k // group_size, n, generator=generator).mul_(0.01).half()
    points = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=generator) if zeros else None
    g_idx = torch.arange(k, dtype=torch.int32)[torch.randperm(k, generator=generator)] // group_size
    return W4Linear(pack_codes(codes), Packing.PACK_QUANTIZED, scales, points, g_idx if act_order else None, group_size)


def fit_symmetric(
    operations: Codes, values: torch.Tensor, importance: torch.Tensor, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what an operation's `fit_symmetric` makes of codes uint8 [R, V] and scales [R] that are 99 before."""
    kept = torch.zeros(len(values), dtype=torch.bool) if kept is None else kept
    codes = torch.full(values.shape, 99, dtype=torch.uint8, device=values.device)
    scales = torch.full((len(values),), 99.0, device=values.device)
    operations.fit_symmetric(values, importance, kept.to(values.device), SCALE_CANDIDATES, codes, scales)
    return codes, scales


def layer_of(kind: str, shape: tuple[int, int] = (176, 384)) -> W4Linear | DenseLinear:
    """Return one of `LAYERS`, of this shape [N, K]."""
    options = LAYERS[kind]
    return dense_layer(shape) if options is None else layer(**options, shape=shape)


def dense_layer(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> DenseLinear:
    """Return a layer of this shape [N, K] that is not quantized: output channels of different sizes."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.exp(0.5 * torch.randn(shape[0], 1, generator=generator)) / shape[1] ** 0.5
    return DenseLinear((torch.randn(shape, generator=generator) * sizes).to(dtype))


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors have the same bytes, on whatever devices."""
    if a is None or b is None:
        return a is b
    first, second = (tensor.cpu().contiguous().view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and torch.equal(first, second)


def same_layer(a: W4A8Linear, b: W4A8Linear) -> bool:
    """Whether two layers have the same bytes."""
    names = [name for name in W4A8Linear.__dataclass_fields__ if name != "packing"]
    return all(same(getattr(a, name), getattr(b, name)) for name in names)
