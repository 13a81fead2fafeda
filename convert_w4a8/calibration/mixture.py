"""The experts of a mixture, one after the other: from the tokens that the router sends them, and others where few come.

An expert is calibrated on the tokens that are routed to it in the quantized model. Where these are fewer than the
inputs of its layers, so that a second moment says little, it borrows others, spread evenly over all tokens that count:
a never-routed expert is calibrated on borrowed tokens alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.block import Block, as_is
from convert_w4a8.calibration.experts import down_inputs, stored_weights
from convert_w4a8.calibration.matrix import Inputs, inputs_of, method_of, quantize_weight
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.states import States
from convert_w4a8.codebooks import awq_exponent
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import ServedLinear
from convert_w4a8.quantization.layer import LayerStats

LEAVES = ("gate_proj", "up_proj", "down_proj")


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
    places = (torch.arange(missing) * len(others) + len(others) // 2) // missing
    return torch.cat((tokens, others[places.clamp(max=len(others) - 1)])).sort().values, len(tokens)


def quantize_experts(
    block: Block,
    name: str,
    choices: Sequence[torch.Tensor],
    inputs: tuple[States, States],
    options: QuantizeOptions,
    device: torch.device,
) -> Iterator[tuple[int, str, ServedLinear, LayerStats, Mapping[str, Any]]]:
    """Quantize all experts of a module of a block; yields (expert, projection, layer, …).

    choices: the router's, int64 [M, top k], of the tokens of each batch that count. inputs: of these tokens [M, H], in
    the original model and in the quantized one.
    """
    module = block.module.get_submodule(name)
    label = f"{block.label}.{name}"
    weights = stored_weights(module, block.dtype)
    original, seen = inputs
    index = torch.cat(list(choices))
    starts = torch.tensor([0, *(len(part) for part in choices)]).cumsum(0)
    stacks = block.stacks(name)

    def taken(states: States, tokens: torch.Tensor) -> torch.Tensor:
        parts = []
        for batch in range(len(choices)):
            low, high = int(starts[batch]), int(starts[batch + 1])
            ours = tokens[(tokens >= low) & (tokens < high)] - low
            if len(ours):
                parts.append(states.get(batch)[ours])
        return torch.cat(parts).to(device, block.dtype)

    is_full = options.preset is Preset.FULL
    for expert in range(len(stacks["down_proj"])):
        gate_up, down = weights(expert)
        tokens, count = choose_tokens(index, expert, gate_up.shape[1])
        theirs = taken(original, tokens)
        ours = taken(seen, tokens) if is_full else theirs
        notes: dict[str, Any] = {"tokens": len(tokens), "routed_tokens": count}
        inner = down_inputs(module, theirs, gate_up, as_is)
        own: dict[str, Any] = {}
        if options.scales_inputs:
            gate_up, down, inner, exponent = _scale(module, (gate_up, down), theirs, inner, options)
            own["awq_exponent"] = exponent

        def finish(
            leaf: str, weight: torch.Tensor, ready: Inputs, notes: dict[str, Any] = notes, expert: int = expert
        ) -> tuple[int, str, ServedLinear, LayerStats, Mapping[str, Any]]:
            w4a8, stats, db = quantize_weight(f"{label}.{expert}.{leaf}", weight.detach().float(), ready, options)
            return expert, leaf, w4a8, stats, {**notes, "output_sqnr_db": db}

        ready = _inputs(f"{label}.{expert}", block.rounding(ours), theirs, options)
        for leaf, weight, rows in zip(LEAVES, gate_up.chunk(2), stacks["gate_up_proj"][expert].chunk(2), strict=False):
            done = finish(leaf, weight, ready)
            rows.copy_(decode(done[2]))
            yield done
        inner_seen = inner
        if is_full:
            inner_seen = down_inputs(module, ours, stacks["gate_up_proj"][expert].to(block.dtype), block.rounding)
        notes.update(own)
        done = finish(
            "down_proj", down, _inputs(f"{label}.{expert}.down_proj", block.rounding(inner_seen), inner, options)
        )
        stacks["down_proj"][expert].copy_(decode(done[2]))
        yield done
    if is_full:
        block.take_experts(name, stacks)


def _scale(
    module: nn.Module,
    weights: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    inner: torch.Tensor,
    options: QuantizeOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | None]:
    """Scale the inputs of an expert's down projection; the other part goes into the rows of its up projection.

    Returns gate and up, down, the inputs, and the exponent; None where the inputs are not linear in up's outputs.
    """
    gate_up, down = weights
    energies = inner.float().square().mean(0)
    s, exponent = awq_exponent([down.float()], energies, method_of(options, data=True))
    if not exponent:
        return gate_up, down, inner, exponent
    scaled = gate_up.clone()
    scaled[len(scaled) // 2 :] /= s[:, None].to(scaled.dtype)
    found = down_inputs(module, x, scaled, as_is)
    if not torch.allclose(found * s.to(found.dtype), inner, rtol=1e-5, atol=1e-5 * float(inner.abs().max())):
        return gate_up, down, inner, None
    return scaled, down * s.to(down.dtype), found, exponent


def _inputs(label: str, seen: torch.Tensor, original: torch.Tensor, options: QuantizeOptions) -> Inputs:
    is_full = options.preset is Preset.FULL
    moments = Moments(energies=not is_full)
    moments.add(seen, original if is_full and options.alpha else None)
    return inputs_of(label, moments, options)
