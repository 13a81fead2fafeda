"""Operators that quantize activations for the decode kernel, alone or with what comes before, in one launch."""

from collections.abc import Callable

import torch

from convert_w4a8 import devices

Tokens = tuple[torch.Tensor, torch.Tensor]


def quantize(x: torch.Tensor, terms: int) -> Tokens:
    """See `kernels.activations.reference.quantize`."""
    return devices.activations(x.device).quantize(x, terms)


def silu_quantize(gate_up: torch.Tensor, terms: int) -> Tokens:
    """See `kernels.activations.reference.silu_quantize`."""
    return devices.activations(gate_up.device).silu_quantize(gate_up, terms)


def norm_quantize(x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int) -> Tokens:
    """See `kernels.activations.reference.norm_quantize`."""
    return devices.activations(x.device).norm_quantize(x, weight, epsilon, terms)


def add_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.activations.reference.add_norm_quantize`."""
    return devices.activations(x.device).add_norm_quantize(x, residual, weight, epsilon, terms)


def _fake(x: torch.Tensor, k: int, terms: int) -> Tokens:
    m = x.shape[0]
    return x.new_empty((terms * m, k), dtype=torch.float8_e4m3fn), x.new_empty((m, 1), dtype=torch.float32)


def _fake_quantize(x: torch.Tensor, terms: int) -> Tokens:
    return _fake(x, x.shape[1], terms)


def _fake_silu_quantize(gate_up: torch.Tensor, terms: int) -> Tokens:
    return _fake(gate_up, gate_up.shape[1] // 2, terms)


def _fake_norm_quantize(x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int) -> Tokens:  # noqa: ARG001
    return _fake(x, x.shape[1], terms)


def _fake_add_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,  # noqa: ARG001
    weight: torch.Tensor,  # noqa: ARG001
    epsilon: float,  # noqa: ARG001
    terms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake(x, x.shape[1], terms), x.new_empty(x.shape)


_library = torch.library.Library("w4a8_lut", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"w4a8_lut::{name}", fake, lib=_library)


_define("quantize(Tensor x, int terms) -> (Tensor, Tensor)", quantize, _fake_quantize)
_define("silu_quantize(Tensor gate_up, int terms) -> (Tensor, Tensor)", silu_quantize, _fake_silu_quantize)
_define(
    "norm_quantize(Tensor x, Tensor weight, float epsilon, int terms) -> (Tensor, Tensor)",
    norm_quantize,
    _fake_norm_quantize,
)
_define(
    "add_norm_quantize(Tensor x, Tensor residual, Tensor weight, float epsilon, int terms) -> (Tensor, Tensor, Tensor)",
    add_norm_quantize,
    _fake_add_norm_quantize,
)
OPERATORS = torch.ops.w4a8_lut
