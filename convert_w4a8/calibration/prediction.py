"""How long quantizing a model takes on a CPU and how much memory, from sizes alone: N and K of layers, tokens.

The constants are seconds of one core, measured with normal weights (docs/explanation/calibration.md#cost).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.states import BATCH_TOKENS
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of, is_expert, merged_name
from convert_w4a8.conversion.layers import LayerPlan
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.samples.sample import SampleSet

NEAREST_SECONDS = 0.36e-6
"""Tables and nearest codes, a weight."""
FULL_SECONDS = 1.36e-6
"""With error feedback and descent, a weight; …"""
FULL_SECONDS_PER_INPUT = 0.21e-9
"""… and for each of the layer's K."""
FLOPS = 90e9
"""Products of float32 matrices a second."""
FACTOR_FLOPS = 18e9
"""Of a factorization in float64."""
_PASSES = 2.5
"""Passes through a block for the full preset: to each of its inputs, and to its end."""
_EXPONENTS, _ROWS = 8, 512
"""AWQ's exponents that are tried, each with so many output channels of a layer."""
_BYTES_PER_WEIGHT = 24
"""Of the matrix that is worked at."""
_BASE_BYTES = 700_000_000
"""The libraries."""


@dataclass(frozen=True)
class Cost:
    """Seconds (None on a GPU), memory in bytes, and bytes of hidden states beyond the limit, which lie on the disk."""

    seconds: float | None
    memory: int
    disk: int


def predict_cost(
    checkpoint: Checkpoint,
    plan: Plan,
    options: QuantizeOptions,
    samples: SampleSet | None,
    device: torch.device,
    states_bytes: int,
) -> Cost:
    """Predict what carrying out a plan costs."""
    sizes = [(layer.spec.out_features, layer.spec.in_features) for layer in plan.converted]
    largest = max((n * k for n, k in sizes), default=0)
    is_full = samples is not None and options.preset is Preset.FULL
    seconds = sum(n * k * (_full(k) if is_full else NEAREST_SECONDS) for n, k in sizes)
    memory = _BASE_BYTES + (_BYTES_PER_WEIGHT + 4) * largest
    disk = 0
    if samples is not None:
        tokens, longest = samples.tokens, max(map(len, samples.samples))
        versions = 2 if is_full else 1
        passes = versions * (_PASSES if is_full else 1)
        seen = sum(_weights(layer) * _share(checkpoint, layer) for layer in plan.converted)
        seconds += passes * 2 * tokens * seen / FLOPS
        if options.scales_inputs:
            seconds += _EXPONENTS * NEAREST_SECONDS * sum(min(n, _ROWS) * k for n, k in sizes)
        if is_full:
            seconds += sum(_moment_seconds(k, tokens) for k in _inputs(plan))
        hidden = _hidden(checkpoint)
        states = 2 * versions * tokens * hidden  # bfloat16
        disk = max(0, states - versions * states_bytes // 4)
        memory += states - disk + max(map(_block_bytes, _blocks(plan)), default=0) * versions
        widest = max((max(n, k) for n, k in sizes), default=0)
        memory += 4 * 6 * max(BATCH_TOKENS, longest) * widest
        if is_full:
            k = max((k for _, k in sizes), default=0)
            memory += k * k * (4 * 3 + (8 if k <= 8192 else 4))
    return Cost(None if device.type != "cpu" else seconds / torch.get_num_threads(), memory, disk)


def _full(k: int) -> float:
    return FULL_SECONDS + FULL_SECONDS_PER_INPUT * k


def _moment_seconds(k: int, tokens: int) -> float:
    """Return what the moments of K inputs cost, and their factorization."""
    return 2 * 2 * tokens * k * k / FLOPS + k**3 / 3 / FACTOR_FLOPS


def _weights(layer: LayerPlan) -> int:
    return layer.spec.out_features * layer.spec.in_features


def _share(checkpoint: Checkpoint, layer: LayerPlan) -> float:
    """Return through what part of the tokens a layer goes: an expert only where it is chosen."""
    if not is_expert(layer.module):
        return 1.0
    found = [_setting(checkpoint, key) for key in ("num_experts_per_tok", "num_experts", "num_local_experts")]
    chosen, count = found[0] or 1, found[1] or found[2] or 1
    return min(1.0, chosen / count)


def _inputs(plan: Plan) -> Iterator[int]:
    """Yield K of every input that layers share."""
    names = {(merged_name(layer.module), layer.spec.in_features) for layer in plan.converted}
    return (k for _, k in names)


def _blocks(plan: Plan) -> Iterator[list[LayerPlan]]:
    """Yield the layers of each decoder block."""
    ordered = sorted(plan.layers, key=lambda layer: str(block_of(layer.spec.name)))
    for _, layers in groupby(ordered, key=lambda layer: block_of(layer.spec.name)):
        yield list(layers)


def _block_bytes(layers: list[LayerPlan]) -> int:
    """Return the bytes of one version of a block: float32, experts in 16 bits."""
    return sum(_weights(layer) * (2 if is_expert(layer.module) else 4) for layer in layers)


def _hidden(checkpoint: Checkpoint) -> int:
    return _setting(checkpoint, "hidden_size") or 0


def _setting(checkpoint: Checkpoint, key: str) -> int | None:
    """Return a number of the language model's configuration."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
