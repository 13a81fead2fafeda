"""Norms, gates and rotary positions of Llama-like blocks as one kernel each, in the place of transformers' many.

A part of a model is replaced where what it computes of random numbers, small and large, is what the reference of the
kernel computes, to the last bit, so a norm of another kind stays as it is, and a gate that is cut off. What a kernel
does not take, as rotary positions of a part of each head, is computed as before.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from convert_w4a8.devices import blocks, why_not_compiled
from convert_w4a8.kernels.blocks import reference

_ROTATE = "apply_rotary_pos_emb"
"""What transformers calls the function in each of its modules."""
_ROTATIONS = "_w4a8_rotations"
_LARGE = 2.0**16


def fuse(model: nn.Module, device: torch.device) -> None:
    """Replace what kernels compute, in a model that is on a GPU; nothing on other devices."""
    if why_not_compiled(device) is None:
        replace(model)


@torch.no_grad()
def replace(model: nn.Module) -> None:
    """Replace what `blocks` of the model's device compute."""
    rotations: dict[str, Callable[..., Any]] = {}
    for module in model.modules():
        if _is_norm(module):
            module.forward = partial(_normalize, module)
        elif _is_gated(module):
            module.forward = partial(_gated, module)
        name = type(module).__module__
        rotate = getattr(sys.modules[name], _ROTATE, None)
        if name not in rotations and rotate is not None and _is_rotation(rotate, module):
            rotations[name] = partial(_rotate_both, rotate)
    vars(model)[_ROTATIONS] = rotations


@contextmanager
def rotations(model: nn.Module) -> Iterator[None]:
    """Have transformers call the kernel while a model runs whose rotary positions `fuse` has replaced."""
    before = {}
    for name, rotate in vars(model).get(_ROTATIONS, {}).items():
        module: Any = sys.modules[name]
        before[module] = getattr(module, _ROTATE)
        setattr(module, _ROTATE, rotate)
    try:
        yield
    finally:
        for module, rotate in before.items():
            setattr(module, _ROTATE, rotate)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")  # noqa: SLF001 - of its own, no property
    ours = type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float)
    if not ours or weight is None or weight.dim() != 1 or weight.dtype != torch.bfloat16:
        return False
    probes = _probes(3, len(weight), device=weight.device)
    return all(_same(module, x, reference.normalize(x, weight, _epsilon(module))[0]) for x in probes)


def _is_gated(module: nn.Module) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    gates, up, down, _ = parts
    parameter = next(module.parameters(), None)
    width = getattr(module, "hidden_size", None)
    if parameter is None or not isinstance(width, int):
        return False
    probes = _probes(3, width, device=parameter.device)
    return all(_same(module, x, down(reference.gate(gates(x), up(x)))) for x in probes)


def _is_rotation(rotate: Callable[..., Any], module: nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    if parameter is None:
        return False
    x, cos, sin = (_probe(1, *shape, 8, device=parameter.device) for shape in ((2, 3), (3,), (3,)))
    expected = reference.rotate(x, cos, sin, back=False)
    try:
        found = rotate(x, x[:, :1], cos, sin)
        return torch.equal(found[0], expected) and torch.equal(found[1], expected[:, :1])
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes something else
        return False


def _same(module: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        found = module(x)
    except (RuntimeError, TypeError, ValueError):  # it takes something else
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, expected)


def _probe(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)


def _probes(*shape: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return numbers as activations are, and so large that whatever has a limit shows it."""
    x = _probe(*shape, device=device)
    return x, x * _LARGE


def _epsilon(module: nn.Module) -> float:
    epsilon: Any = module.variance_epsilon
    return float(epsilon)


def _normalize(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor
    if hidden_states.dtype == torch.bfloat16:
        found = _Norm.apply(hidden_states, module.weight, _epsilon(module))  # type: ignore[no-untyped-call]
    else:
        found = type(module).forward(module, hidden_states)
    return found


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = module.down_proj(
        _Gate.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    )
    return found


def _rotate_both(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Rotate queries and keys. Called otherwise than Llama calls it, the function is transformers' own."""
    if options or len(arguments) != 4 or any(each.dtype != torch.bfloat16 for each in arguments):
        return original(*arguments, **options)
    query, key, cos, sin = arguments
    if not all(_rotates(x, cos, sin) for x in (query, key)):
        return original(*arguments)
    return tuple(_Rotation.apply(x, cos, sin) for x in (query, key))  # type: ignore[no-untyped-call]


def _rotates(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes these: all of each head is rotated, not a part, and each token has one angle."""
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    return cos.shape[1:] == (x.shape[2], x.shape[3]) and cos.shape[0] in (1, x.shape[0])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, inverse = blocks(x.device).normalize(flat, weight, epsilon)
        ctx.save_for_backward(flat, weight, inverse)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        flat, weight, inverse = ctx.saved_tensors
        of_x, of_weight = blocks(flat.device).normalize_gradients(gradient.reshape(flat.shape), flat, weight, inverse)
        return of_x.view(gradient.shape), of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gates, up)
        return blocks(gates.device).gate(gates, up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, up = ctx.saved_tensors
        return blocks(gates.device).gate_gradients(gradient, gates, up)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return blocks(x.device).rotate(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return blocks(gradient.device).rotate(gradient, cos, sin, back=True), None, None
