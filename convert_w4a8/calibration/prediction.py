"""How long quantizing a model takes and how much memory, from sizes alone: N and K of layers, blocks, tokens.

What a GPU does in a second was measured with whole blocks on an H100 (docs/benchmarks/results/quantize-block.json), and
what codes take of a core with one block (codebooks.json): tests/calibration/test_prediction.py compares them with the
numbers here. A core's other numbers are rougher.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from convert_w4a8.calibration.mixture import TOGETHER, WEIGHTS_TOGETHER
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.states import BATCH_TOKENS
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of, is_expert, merged_name
from convert_w4a8.conversion.layers import LayerPlan
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.samples.sample import SampleSet


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, or how many seconds a thing takes.

    nearest: seconds of tables and nearest codes, a weight. full, full_per_input: with error feedback and descent, a
        weight, and for each of the layer's K. rest: of reading, rounding and writing, a weight.
    forward: operations of a block's passes. call: seconds of an expert's call in a batch, however few its tokens are.
    moments: operations of the products of second moments. factor: of their factorization. target: of targets between
        two models. states: bytes of hidden states that are brought to the device or back. disk: of those on the disk.
    """

    nearest: float
    full: float
    full_per_input: float
    rest: float
    forward: float
    call: float
    moments: float
    factor: float
    target: float
    states: float
    disk: float


CORE = Rates(
    nearest=0.36e-6,
    full=1.36e-6,
    full_per_input=0.21e-9,
    rest=0.08e-6,
    forward=60e9,
    call=1e-3,
    moments=60e9,
    factor=18e9,
    target=40e9,
    states=1e9,
    disk=0.8e9,
)
"""A core of a CPU."""
H100 = Rates(
    nearest=4.6e-9,
    full=16.4e-9,
    full_per_input=0.23e-12,
    rest=4.1e-9,
    forward=450e12,
    call=0.28e-3,
    moments=530e12,
    factor=25e12,
    target=46e12,
    states=9e9,
    disk=2.9e9,
)
"""An H100."""
_PASSES = 2.5
"""Passes through a block for the full preset: to each of its inputs, and to its end."""
_EXPONENTS, _ROWS = 8, 512
"""AWQ's exponents that are tried, each with so many output channels of a layer."""
_PASSES_TO_STAGES = 5
"""How often hidden states are read for that."""
_ACTIVATIONS = 24
"""Bytes of activations in float32, a token and channel of the widest layer."""
_BYTES_PER_WEIGHT = 28
"""Of the matrices that are worked at together, on a CPU, …"""
_GPU_BYTES_PER_WEIGHT = 44
"""… on a GPU with the full preset, …"""
_GPU_BYTES_PER_WEIGHT_FAST = 32
"""… and without it."""
_EXACT = 8192
"""Up to so many inputs a CPU factors in float64, as `codebooks/moments.py` does; a GPU always."""
_GPU_BASE_BYTES = 2_000_000_000
"""The libraries and what CUDA takes of the host."""
_BASE_BYTES = 700_000_000
"""The libraries."""


@dataclass(frozen=True)
class Cost:
    """What quantizing takes.

    seconds: on all cores, or on a GPU like an H100. memory: the host's, in bytes. disk: bytes of hidden states beyond
    the limit. gpu_memory: bytes; None without a GPU.
    """

    seconds: float
    memory: int
    disk: int
    gpu_memory: int | None = None


def predict_cost(
    checkpoint: Checkpoint,
    plan: Plan,
    options: QuantizeOptions,
    samples: SampleSet | None,
    device: torch.device,
    states_bytes: int,
) -> Cost:
    """Predict what carrying out a plan costs."""
    on_cpu = device.type == "cpu"
    seconds = sum(seconds_by_step(checkpoint, plan, options, samples, states_bytes, CORE if on_cpu else H100).values())
    is_full = samples is not None and options.preset is Preset.FULL
    versions = 2 if is_full else 1
    per_weight = _BYTES_PER_WEIGHT if on_cpu else (_GPU_BYTES_PER_WEIGHT if is_full else _GPU_BYTES_PER_WEIGHT_FAST)
    at_work = per_weight * max(map(_weights_at_work, plan.converted), default=0)
    states = disk = 0
    if samples is not None:
        has_experts = any(is_expert(layer.module) for layer in plan.converted)
        states = 2 * versions * samples.tokens * _hidden(checkpoint) * (2 if has_experts else 1)  # bfloat16
        disk = max(0, states - versions * (2 if has_experts else 1) * states_bytes // 4)
        if is_full:
            k = max((layer.spec.in_features for layer in plan.converted), default=0)
            factoring = 16 if on_cpu and k <= _EXACT else 24
            at_work = max(at_work + 12 * k * k, factoring * k * k)
        block = max((_block_bytes(layers, 4 if on_cpu else 2) for layers in _blocks(plan)), default=0)
        widest = max((max(layer.spec.out_features, layer.spec.in_features) for layer in plan.converted), default=0)
        longest = max(BATCH_TOKENS, *map(len, samples.samples))
        at_work += (2 if has_experts else versions) * block + (_ACTIVATIONS // (1 if on_cpu else 2)) * longest * widest
        if has_experts and not on_cpu:  # their inputs, and moments of those that are worked at together
            k = max(layer.spec.in_features for layer in plan.converted if is_expert(layer.module))
            at_work += states // 2 + (2 * TOGETHER * 20 * k * k if is_full else 0)
    if on_cpu:
        return Cost(seconds / torch.get_num_threads(), _BASE_BYTES + at_work + states - disk, disk)
    largest = max(map(_weights, plan.converted), default=0)
    return Cost(seconds, _GPU_BASE_BYTES + 2 * largest + states - disk, disk, at_work)


def seconds_by_step(
    checkpoint: Checkpoint,
    plan: Plan,
    options: QuantizeOptions,
    samples: SampleSet | None,
    states_bytes: int,
    rates: Rates,
) -> dict[str, float]:
    """Return seconds on one core or a GPU by the steps that scripts/gpu/bench_quantize_block.py measures."""
    sizes = [(layer.spec.out_features, layer.spec.in_features) for layer in plan.converted]
    is_full = samples is not None and options.preset is Preset.FULL
    found = {
        "codebooks": sum(n * k * _seconds_per_weight(k, rates, is_full=is_full) for n, k in sizes),
        "rest": rates.rest * sum(n * k for n, k in sizes),
    }
    if samples is None:
        return found
    if options.scales_inputs:
        found["codebooks"] += _EXPONENTS * rates.nearest * sum(min(n, _ROWS) * k for n, k in sizes)
    tokens = samples.tokens
    versions, passes, moved = (2, _PASSES, _PASSES_TO_STAGES) if is_full else (1, 2.0, 2)
    seen = sum(_weights(layer) * _share(checkpoint, layer) for layer in plan.converted)
    experts = sum(is_expert(layer.module) for layer in plan.converted) / 3
    calls = 2 * experts * -(-tokens // BATCH_TOKENS)
    found["forward"] = 2 * tokens * seen * versions * passes / rates.forward + calls * rates.call
    nbytes = 2 * versions * tokens * _hidden(checkpoint)
    spilled = max(0, nbytes - versions * states_bytes // 4)
    times = (moved + 1 + (2 if experts else 0)) * len(list(_blocks(plan)))  # and back; of experts the inputs
    found["states"] = times * ((nbytes - spilled) / rates.states + spilled / rates.disk)
    if is_full:
        inputs = list(_inputs(checkpoint, plan))
        found["moments"] = sum(2 * 2 * tokens * part * k * k for k, part in inputs) / rates.moments
        found["factor"] = sum(k**3 / 3 for k, _ in inputs) / rates.factor
        found["target"] = sum(6 * n * k * k for n, k in sizes) / rates.target
    return found


def _seconds_per_weight(k: int, rates: Rates, *, is_full: bool) -> float:
    """Return what codes and tables of a layer with K inputs cost."""
    return rates.full + rates.full_per_input * k if is_full else rates.nearest


def _weights_at_work(layer: LayerPlan) -> int:
    """Return how many weights are worked at together with a layer's: those of experts some at a time."""
    n = _weights(layer)
    return max(n, min(2 * TOGETHER * n, WEIGHTS_TOGETHER)) if is_expert(layer.module) else n


def _weights(layer: LayerPlan) -> int:
    return layer.spec.out_features * layer.spec.in_features


def _share(checkpoint: Checkpoint, layer: LayerPlan) -> float:
    """Return through what part of the tokens a layer goes: an expert only where it is chosen."""
    if not is_expert(layer.module):
        return 1.0
    found = [checkpoint.number(key) for key in ("num_experts_per_tok", "num_experts", "num_local_experts")]
    chosen, count = found[0] or 1, found[1] or found[2] or 1
    return min(1.0, chosen / count)


def _inputs(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[int, float]]:
    """Yield K of every input that layers share, and which part of the tokens it has."""
    names = {(merged_name(layer.module), layer.spec.in_features): _share(checkpoint, layer) for layer in plan.converted}
    return ((k, part) for (_, k), part in names.items())


def _blocks(plan: Plan) -> Iterator[list[LayerPlan]]:
    """Yield the layers of each decoder block."""
    ordered = sorted(plan.layers, key=lambda layer: str(block_of(layer.spec.name)))
    for _, layers in groupby(ordered, key=lambda layer: block_of(layer.spec.name)):
        yield list(layers)


def _block_bytes(layers: list[LayerPlan], size: int) -> int:
    """Return the bytes of one version of a block, of `size` bytes a weight; experts in 16 bits."""
    return sum(_weights(layer) * (2 if is_expert(layer.module) else size) for layer in layers)


def _hidden(checkpoint: Checkpoint) -> int:
    return checkpoint.number("hidden_size") or 0
