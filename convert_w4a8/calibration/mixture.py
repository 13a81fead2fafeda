"""The experts of a mixture, some at a time: from the tokens that the router sends them, and others where few come.

An expert is calibrated on the tokens that are routed to it in the quantized model. Where these are fewer than the
inputs of its layers, so that a second moment says little, it borrows others, spread evenly over all tokens that count:
a never-routed expert is calibrated on borrowed tokens alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.block import Block, as_is
from convert_w4a8.calibration.experts import Rounding, down_inputs, stored_weights, without_weights
from convert_w4a8.calibration.matrix import Inputs, inputs_of, method_of, quantize_weights
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.spread import Spread, one_by_one
from convert_w4a8.calibration.states import States
from convert_w4a8.codebooks import awq_exponent
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import ServedLinear
from convert_w4a8.quantization.layer import LayerStats

Found = tuple[int, str, ServedLinear, LayerStats, Mapping[str, Any]]
"""Expert, projection, layer, what that did to the weights, and what is to be noted."""
LEAVES = ("gate_proj", "up_proj", "down_proj")
TOGETHER = 8
"""Experts whose codes are chosen side by side, at most. On a GPU the last bits depend on it."""
WEIGHTS_TOGETHER = 1 << 26
"""Of all these: of large experts fewer go together."""


def choose_tokens(index: torch.Tensor, expert: int, least: int) -> tuple[torch.Tensor, int]:
    """Return the tokens int64 that calibrate an expert, in order, and how many of them are routed to it.

    index: the router's choices, int64 [M, top k], of all tokens that count. least: how many tokens are wanted.
    """
    is_routed = (index == expert).any(1)
    tokens = is_routed.nonzero()[:, 0]
    others = (~is_routed).nonzero()[:, 0]
    missing = min(len(others), max(0, least - len(tokens)))
    if not missing:
        return tokens, len(tokens)
    places = (torch.arange(missing, device=index.device) * len(others) + len(others) // 2) // missing
    return torch.cat((tokens, others[places.clamp(max=len(others) - 1)])).sort().values, len(tokens)


def quantize_experts(
    block: Block,
    name: str,
    choices: Sequence[torch.Tensor],
    inputs: tuple[States, States],
    options: QuantizeOptions,
    device: torch.device,
    spread: Spread = one_by_one,
) -> Iterator[Found]:
    """Quantize all experts of a module of a block, in groups.

    choices: the router's, int64 [M, top k], of the tokens of each batch that count. inputs: of these tokens [M, H], in
    the original model and in the quantized one. spread: what quantizes the groups.
    """
    module = block.module.get_submodule(name)
    weights = stored_weights(module, block.dtype)
    tokens = _Tokens(choices, inputs, device, block.dtype, is_full=options.preset is Preset.FULL)
    stacks = block.stacks(name)
    experts = range(len(stacks["down_proj"]))
    step = max(1, min(TOGETHER, WEIGHTS_TOGETHER // stacks["gate_up_proj"][0].numel()))
    activation = without_weights(module)

    def prepared(number: int) -> _Expert:
        gate_up, down = weights(number)
        chosen, count = choose_tokens(tokens.index, number, gate_up.shape[1])
        notes = {"tokens": len(chosen), "routed_tokens": count}
        return _Expert(number, f"{block.label}.{name}.{number}", gate_up, down, partial(tokens.of, chosen), notes)

    groups = (experts[first : first + step] for first in experts[::step])
    calls = ((f"{block.label}.{name}.{n[0]}", [*map(prepared, n)], activation, block.rounding, options) for n in groups)
    for found in spread(quantize_group, calls):
        for expert, leaf, w4a8, stats, notes in found:
            _rows(leaf, stacks["gate_up_proj"][expert], stacks["down_proj"][expert]).copy_(decode(w4a8))
            yield expert, leaf, w4a8, stats, notes
    if options.preset is Preset.FULL:
        block.take_experts(name, stacks)


@dataclass
class _Expert:
    """An expert on its way. seen: returns its inputs [M, H] in the original model and in the quantized one.

    inputs: of what is quantized next. exponent: of the scaling of its down projection's inputs.
    """

    number: int
    label: str
    gate_up: torch.Tensor
    down: torch.Tensor
    seen: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    notes: dict[str, Any]
    inputs: Inputs | None = None
    exponent: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to another process: the inputs themselves."""
        return {**vars(self), "seen": partial(_as_given, *self.seen())}


def _as_given(theirs: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return theirs, ours


def quantize_group(
    _name: str, experts: Sequence[_Expert], module: nn.Module, rounding: Rounding, options: QuantizeOptions
) -> list[Found]:
    """Quantize some experts side by side. module: what has their activation function.

    Raises:
        ConvertError: weights or inputs are not finite.

    """
    is_full = options.preset is Preset.FULL
    for expert in experts:
        theirs, ours = expert.seen()
        if options.scales_inputs:
            inner = down_inputs(module, theirs, expert.gate_up, as_is)
            scaled = _scale(module, (expert.gate_up, expert.down), theirs, inner, options)
            expert.gate_up, expert.down, expert.exponent = scaled
        expert.inputs = _inputs(expert.label, rounding(ours), theirs, options)
    found = _quantized(
        [
            (expert, leaf, weight)
            for expert in experts
            for leaf, weight in zip(LEAVES, expert.gate_up.chunk(2), strict=False)
        ],
        options,
    )
    served = {(number, leaf): w4a8 for number, leaf, w4a8, _, _ in found}
    for expert in experts:
        theirs, ours = expert.seen()
        inner = inner_seen = down_inputs(module, theirs, expert.gate_up, as_is)
        if is_full:
            gate_up = torch.empty_like(expert.gate_up, dtype=torch.bfloat16)
            for leaf in LEAVES[:2]:
                _rows(leaf, gate_up, gate_up).copy_(decode(served[expert.number, leaf]))
            inner_seen = down_inputs(module, ours, gate_up.to(expert.gate_up.dtype), rounding)
        expert.inputs = _inputs(f"{expert.label}.down_proj", rounding(inner_seen), inner, options)
        if options.scales_inputs:
            expert.notes["awq_exponent"] = expert.exponent
    return found + _quantized([(expert, "down_proj", expert.down) for expert in experts], options)


def _rows(leaf: str, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return where a projection lies in an expert's parameters."""
    return down if leaf == "down_proj" else gate_up.chunk(2)[LEAVES.index(leaf)]


def _quantized(jobs: Sequence[tuple[_Expert, str, torch.Tensor]], options: QuantizeOptions) -> list[Found]:
    """Quantize projections of one shape: (expert, projection, weights)."""
    found = quantize_weights(
        [f"{expert.label}.{leaf}" for expert, leaf, _ in jobs],
        [weight.detach().float() for *_, weight in jobs],
        [expert.inputs for expert, *_ in jobs if expert.inputs is not None],
        options,
    )
    return [
        (expert.number, leaf, w4a8, stats, {**expert.notes, "output_sqnr_db": db})
        for (expert, leaf, _), (w4a8, stats, db) in zip(jobs, found, strict=True)
    ]


class _Tokens:
    """The tokens that count: the router's choices `index`, and the inputs of the experts in both models.

    On a GPU all inputs lie in its memory where they take no more than a quarter of what is free.
    """

    def __init__(
        self,
        choices: Sequence[torch.Tensor],
        inputs: tuple[States, States],
        device: torch.device,
        dtype: torch.dtype,
        *,
        is_full: bool,
    ) -> None:
        self.index = torch.cat(list(choices)).to(device)
        self._starts = torch.tensor([0, *(len(part) for part in choices)]).cumsum(0)
        self._device, self._dtype, self._is_full = device, dtype, is_full
        self._states = inputs
        self._near: list[torch.Tensor] | None = None
        batches = range(len(choices))
        if device.type == "cuda":
            versions = inputs if is_full else inputs[:1]
            nbytes = len(versions) * len(self.index) * inputs[0].get(0).shape[1] * dtype.itemsize
            if nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
                self._near = [
                    torch.cat([states.get(batch).to(device, dtype) for batch in batches]) for states in versions
                ]

    def of(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs [M, H] of some tokens, int64 [M], in both models; of one alone, twice that one's."""
        theirs = self._taken(0, tokens)
        return theirs, self._taken(1, tokens) if self._is_full else theirs

    def _taken(self, version: int, tokens: torch.Tensor) -> torch.Tensor:
        if self._near is not None:
            return self._near[version][tokens]
        parts, tokens = [], tokens.cpu()
        for batch, (low, high) in enumerate(pairwise(self._starts.tolist())):
            ours = tokens[(tokens >= low) & (tokens < high)] - low
            if len(ours):
                parts.append(self._states[version].get(batch)[ours])
        return torch.cat(parts).to(self._device, self._dtype)


def _scale(
    module: nn.Module,
    weights: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    inner: torch.Tensor,
    options: QuantizeOptions,
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Scale the inputs of an expert's down projection; the other part goes into the rows of its up projection.

    Returns gate and up, down, and the exponent; None where the inputs are not linear in up's outputs.
    """
    gate_up, down = weights
    energies = inner.float().square().mean(0)
    s, exponent = awq_exponent([down.float()], energies, method_of(options, data=True))
    if not exponent:
        return gate_up, down, exponent
    scaled, close = gate_up, 1e-5 * float(inner.abs().max())
    far = torch.full_like(s, 2.0**-10)  # reaches clamps that no token may reach here
    for factor in (far, s):
        scaled = gate_up.clone()
        scaled[len(scaled) // 2 :] /= factor[:, None].to(scaled.dtype)
        found = down_inputs(module, x, scaled, as_is)
        if not torch.allclose(found * factor.to(found.dtype), inner, rtol=1e-5, atol=close):
            return gate_up, down, None
    return scaled, down * s.to(down.dtype), exponent


def _inputs(label: str, seen: torch.Tensor, original: torch.Tensor, options: QuantizeOptions) -> Inputs:
    is_full = options.preset is Preset.FULL
    moments = Moments(energies=not is_full)
    moments.add(seen, original if is_full and options.alpha else None)
    return inputs_of(label, moments, options)
