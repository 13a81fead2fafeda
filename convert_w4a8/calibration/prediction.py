"""How long quantizing a model takes and how much memory, from sizes alone: N and K of layers, blocks, tokens.

What a CPU's core and a GPU do in a second are measured: docs/benchmarks/results/quantize-block-cpu.json and
quantize-block.json (an H100), which tests/calibration/test_prediction.py compares with the numbers here.
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


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, or how many seconds a thing takes.

    nearest: seconds of tables and nearest codes, a weight. full, full_per_input: with error feedback and descent, a
        weight, and for each of the layer's K. forward: operations of a block's passes. moments: of the products of
        second moments. factor: of their factorization. target: of targets between two models. states: bytes of hidden
        states that are brought to the device or taken from it. matrix: seconds that a matrix takes, however small.
    """

    nearest: float
    full: float
    full_per_input: float
    forward: float
    moments: float
    factor: float
    target: float
    states: float
    matrix: float


CORE = Rates(
    nearest=0.36e-6,
    full=1.36e-6,
    full_per_input=0.21e-9,
    forward=90e9,
    moments=90e9,
    factor=18e9,
    target=60e9,
    states=2e9,
    matrix=0.0,
)
"""A core of a CPU."""
H100 = Rates(
    nearest=5.0e-9,
    full=13e-9,
    full_per_input=0.2e-12,
    forward=400e12,
    moments=400e12,
    factor=10e12,
    target=30e12,
    states=5e9,
    matrix=5e-3,
)
"""An H100."""
_PASSES = 2.5
"""Passes through a block for the full preset: to each of its inputs, and to its end."""
_PASSES_TO_STAGES = 5
"""How often hidden states are read for that."""
_ACTIVATIONS = 24
"""Bytes of activations in float32, a token and channel of the widest layer."""
_BYTES_PER_WEIGHT = 28
"""Of the matrix that is worked at."""
_GPU_BASE_BYTES = 2_000_000_000
"""The libraries and what CUDA takes of the host."""
_BASE_BYTES = 700_000_000
"""The libraries."""
_GPU_ROWS = 1 << 14
"""Output channels that a GPU works at together (`codebooks/start.py`)."""


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
    seconds = sum(seconds_by_step(checkpoint, plan, options, samples, CORE if on_cpu else H100).values())
    sizes = [(layer.spec.out_features, layer.spec.in_features) for layer in plan.converted]
    largest = max((n * k for n, k in sizes), default=0)
    device_bytes = max((_matrix_bytes(n, k, on_cpu=on_cpu) for n, k in sizes), default=0)
    states = disk = 0
    if samples is not None:
        is_full = options.preset is Preset.FULL
        versions = 2 if is_full else 1
        states = 2 * versions * samples.tokens * _hidden(checkpoint)  # bfloat16
        disk = max(0, states - versions * states_bytes // 4)
        device_bytes += versions * max(map(_block_bytes, _blocks(plan)), default=0) // (1 if on_cpu else 2)
        widest = max((max(n, k) for n, k in sizes), default=0)
        longest = max(BATCH_TOKENS, *map(len, samples.samples))
        device_bytes += (_ACTIVATIONS if on_cpu else _ACTIVATIONS // 2) * longest * widest
        if is_full:
            device_bytes += max((_moment_bytes(k, on_cpu=on_cpu) for _, k in sizes), default=0)
    if on_cpu:
        return Cost(seconds / torch.get_num_threads(), _BASE_BYTES + device_bytes + states - disk, disk)
    return Cost(seconds, _GPU_BASE_BYTES + 2 * largest + states - disk, disk, device_bytes)


def seconds_by_step(
    checkpoint: Checkpoint, plan: Plan, options: QuantizeOptions, samples: SampleSet | None, rates: Rates
) -> dict[str, float]:
    """Return seconds on one core or a GPU by the steps that scripts/gpu/bench_quantize_block.py measures."""
    sizes = [(layer.spec.out_features, layer.spec.in_features) for layer in plan.converted]
    is_full = samples is not None and options.preset is Preset.FULL
    found = {"codebooks": sum(rates.matrix + n * k * _seconds_per_weight(k, rates, is_full=is_full) for n, k in sizes)}
    if samples is None:
        return found
    tokens = samples.tokens
    versions, passes, moved = (2, _PASSES, _PASSES_TO_STAGES) if is_full else (1, 2.0, 2)
    seen = sum(_weights(layer) * _share(checkpoint, layer) for layer in plan.converted)
    found["forward"] = 2 * tokens * seen * versions * passes / rates.forward
    nbytes = 2 * versions * tokens * _hidden(checkpoint) * len(list(_blocks(plan)))
    found["states"] = nbytes * (moved + 1) / rates.states  # and back
    if is_full:
        inputs = list(_inputs(checkpoint, plan))
        found["moments"] = sum(2 * 2 * tokens * part * k * k for k, part in inputs) / rates.moments
        found["factor"] = sum(k**3 / 3 for k, _ in inputs) / rates.factor
        found["target"] = sum(6 * n * k * k for n, k in sizes) / rates.target
    return found


def _seconds_per_weight(k: int, rates: Rates, *, is_full: bool) -> float:
    """Return what codes and tables of a layer with K inputs cost."""
    return rates.full + rates.full_per_input * k if is_full else rates.nearest


def _matrix_bytes(n: int, k: int, *, on_cpu: bool) -> int:
    """Return what a matrix takes while it is quantized."""
    return _BYTES_PER_WEIGHT * n * k if on_cpu else 12 * n * k + 32 * min(n, _GPU_ROWS) * k


def _moment_bytes(k: int, *, on_cpu: bool) -> int:
    """Return what two moments of K inputs take while one of them is factored."""
    return k * k * (4 * 2 + ((8 if k <= 8192 else 4) if on_cpu else 3 * 8))


def _weights(layer: LayerPlan) -> int:
    return layer.spec.out_features * layer.spec.in_features


def _share(checkpoint: Checkpoint, layer: LayerPlan) -> float:
    """Return through what part of the tokens a layer goes: an expert only where it is chosen."""
    if not is_expert(layer.module):
        return 1.0
    found = [_setting(checkpoint, key) for key in ("num_experts_per_tok", "num_experts", "num_local_experts")]
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
