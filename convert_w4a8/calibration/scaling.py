"""AWQ scaling in a block: which input channels are scaled by what, and where the other part goes.

The scales are powers of two, so the block of the original model computes the same numbers before and after. That is
tried with the tokens at hand: what does not hold is undone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from convert_w4a8.calibration.block import Block, Stage
from convert_w4a8.calibration.matrix import method_of
from convert_w4a8.calibration.model import BlockCall
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.checkpoint.folds import Fold, find_folds, origin_channels
from convert_w4a8.codebooks import awq_exponent
from convert_w4a8.experts import is_experts

_EXPERTS = 8
"""Of all experts, so many choose the scale of the inputs that they share."""
_TOLERANCE = 1e-5
"""Part of a block's largest output by which it may change: products are the same, bit by bit, but for underflow."""

_FAR = 2.0**-10
"""A scale that takes what is between two linear layers to where it would be clamped."""
_Tried = tuple[torch.Tensor, str, int, torch.Tensor]


@dataclass
class Scaling:
    """What was done to a block, by names in it.

    factors: parameter → what it was multiplied by, each along a dimension. exponents: linear layer, or experts, →
    AWQ's exponent of its inputs; 0 where none was better.
    """

    factors: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    exponents: dict[str, float] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a parameter was multiplied by something."""
        return _stacked(name) in self.factors

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of a parameter as the scaled block has it, in the same dtype."""
        for dim, factor in self.factors.get(_stacked(name), ()):
            shape = [1] * tensor.dim()
            shape[dim] = -1
            tensor = tensor * factor.view(shape).to(tensor)
        return tensor

    def note(self, name: str, dim: int, factor: torch.Tensor) -> None:
        """Note what a parameter was multiplied by."""
        self.factors.setdefault(name, []).append((dim, factor.cpu()))


def _stacked(name: str) -> str:
    """Return the parameter in which transformers holds what a checkpoint has for each expert."""
    experts, _, own = name.rpartition(".experts.")
    is_shared = experts and own.partition(".")[2] in ("gate_proj.weight", "up_proj.weight")
    return f"{experts}.experts.gate_up_proj" if is_shared else name


def scale_block(
    block: Block,
    modules: Collection[str],
    energies: Mapping[Stage, Moments],
    states: torch.Tensor,
    call: BlockCall,
    options: QuantizeOptions,
) -> Scaling:
    """Scale what can be scaled in a block, in place, its energies too.

    modules: those with a weight, by transformers' names in the block, experts one by one. energies: of the inputs of
    each stage. states, call: what the block is tried with.
    """
    found = Scaling()
    known = {name for name, _ in block.module.named_modules()}
    want = block.output(states, call, quantized=False)
    limit = _TOLERANCE * float(want.abs().max())
    for fold in find_folds("", modules):
        if any(".experts." in name for name in (fold.origin, *(() if fold.is_norm else fold.consumers))):
            continue  # an expert's own, which it scales when its turn comes
        names = _module_names(fold.consumers)
        if not {fold.origin, *names} <= known:
            continue  # transformers calls it otherwise
        stages = {stage: moments for stage, moments in energies.items() if stage.modules[0] in names}
        scales = _choose(block, fold, stages, options) if stages else None
        if scales is None:
            continue
        s, origin_scale, exponent = scales
        if exponent:
            if not fold.is_norm:  # clamps, which no token may reach here, are reached
                far = (torch.full_like(s, _FAR), torch.full_like(origin_scale, _FAR))
                if not _is_linear(block, _parameters(block.module, fold, names, *far), (states, call), want, limit):
                    continue
            tried = _parameters(block.module, fold, names, s, origin_scale)
            for parameter, _, dim, factor in tried:
                _multiply(parameter, dim, factor)
            change = (block.output(states, call, quantized=False) - want).abs().max()
            if not float(change) <= limit:
                for parameter, _, dim, factor in tried:
                    _multiply(parameter, dim, 1 / factor)  # exactly what it was
                continue
            for _, name, dim, factor in tried:
                found.note(name, dim, factor)
            for moments in stages.values():
                assert moments.second is not None
                moments.second /= s.square()
        found.exponents |= dict.fromkeys(names, exponent)
    return found


def _is_linear(
    block: Block, tried: Sequence[_Tried], inputs: tuple[torch.Tensor, BlockCall], want: torch.Tensor, limit: float
) -> bool:
    """Whether the block's output stays what it is with parameters multiplied by powers of two."""
    for parameter, _, dim, factor in tried:
        _multiply(parameter, dim, factor)
    change = (block.output(*inputs, quantized=False) - want).abs().max()
    for parameter, _, dim, factor in tried:
        _multiply(parameter, dim, 1 / factor)  # exactly what it was
    return float(change) <= limit


def _module_names(consumers: Iterable[str]) -> set[str]:
    """Return consumers as the block's modules are called: the experts of a mixture by the one that holds them."""
    return {name[: name.index(".experts.") + len(".experts")] if ".experts." in name else name for name in consumers}


def _choose(
    block: Block, fold: Fold, stages: Mapping[Stage, Moments], options: QuantizeOptions
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Return the scale of the inputs [K], that of what makes them, and the exponent; None where it cannot be told."""
    module = block.module
    energies, _ = next(iter(stages.values())).mean()
    k = len(energies)
    tie = None
    if not fold.is_norm:
        origin = module.get_submodule(fold.origin)
        if not isinstance(origin, nn.Linear):
            return None
        head_dim = getattr(module.get_submodule(fold.origin.rpartition(".")[0]), "head_dim", None)
        tie = origin_channels(origin.out_features, k, head_dim if isinstance(head_dim, int) else None)
        if tie is None:
            return None
        tie = tie.to(energies.device)
    elif module.get_parameter(f"{fold.origin}.weight").shape != (k,):
        return None
    weights: list[torch.Tensor] = []
    for stage in stages:
        for name in stage.modules:
            if stage.is_experts:
                stack = module.get_parameter(f"{name}.gate_up_proj")
                step = -(-len(stack) // _EXPERTS)
                weights.extend(part.float() for part in stack[::step])
            else:
                weights.append(module.get_parameter(f"{name}.weight").float())
    s, exponent = awq_exponent(weights, energies, method_of(options, data=True), tie=tie)
    made = s
    if tie is not None:
        made = torch.ones(int(tie.max()) + 1, device=s.device)
        made[tie] = s
    return s, made, exponent


def _parameters(
    module: nn.Module, fold: Fold, consumers: Collection[str], s: torch.Tensor, made: torch.Tensor
) -> Sequence[_Tried]:
    """Return all parameters that a scale goes into, by name, along which dimension, and what each is multiplied by."""
    found = []
    for leaf in ("weight", "bias"):
        name = f"{fold.origin}.{leaf}"
        parameter = getattr(module.get_submodule(fold.origin), leaf, None)
        if parameter is not None:
            found.append((parameter, name, 0, 1 / made))
    for consumer in sorted(consumers):
        part = module.get_submodule(consumer)
        leaf = "gate_up_proj" if is_experts(part) else "weight"
        found.append((part.get_parameter(leaf), f"{consumer}.{leaf}", -1, s))
    return found


def _multiply(parameter: torch.Tensor, dim: int, factor: torch.Tensor) -> None:
    shape = [1] * parameter.dim()
    shape[dim] = -1
    parameter.mul_(factor.view(shape).to(parameter.dtype))
