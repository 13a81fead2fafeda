"""What a training trains and costs, from sizes alone: the headers of a checkpoint, or a model's shape.

What an H100 does in a second was measured with blocks of Llama 8B (docs/benchmarks/results/distill-block.json, with
which tests/distillation/test_prediction.py compares the numbers here).
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of, is_expert
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.distillation.curvature import LOOK
from convert_w4a8.distillation.data import rows_of
from convert_w4a8.distillation.graphs import MOST_SHAPES, MOST_WEIGHTS
from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.mix import TrainingData
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.stored import key_of, row_bytes
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TILE_K
from convert_w4a8.targets import find_target

OPERATIONS = 600e12
"""Of matrix products in BF16 that an H100 does in a second."""
PER_WEIGHT = {Preset.TABLES: 0.012e-9, Preset.WEIGHTS: 0.055e-9}
"""Seconds a step of all that is done once a weight, however many tokens there are: looking up, sums, Adam. Most of it
every GPU does for all weights, where several have a model together."""
PER_CHANNEL = 12e-12
"""Seconds of all that is done with activations, a token and an input or output channel of a layer, …"""
PER_CHANNEL_AGAIN = 5e-12
"""… and of doing its forward part a second time, where blocks are computed twice."""
PER_LOGIT = 15e-12
"""Seconds of the loss, for each token and each of the vocabulary."""
ACTIVATIONS = 2.4
"""Bytes that are kept for the backward pass, a token and an input or output channel of a layer."""
_LOGIT_BYTES = 10
"""The logits of both models in BF16, their gradient, and copies of those that count."""
_GRAPH_LOGIT_BYTES = 6
"""The logits of both models in BF16, and their gradient, that each further shape of batches keeps as CUDA graphs."""
_LOSS_BYTES = 600_000_000
"""What the loss takes in float32, and the libraries."""
_LAYER_BYTES = 12
"""Of the layer that is worked at, a weight: its values, and their gradient in float32."""
_KEPT = {Preset.TABLES: 2.5, Preset.WEIGHTS: 18.5}
"""Bytes a quantized weight: its code, and for each of 16 an entry's three values, gradient and two moments. With latent
weights, also these, their gradient and moments."""
_CURVATURE = 0.25
"""Bytes a quantized weight of the curvature along the entries, where springs are as stiff (`curvature`)."""
_CODES = 1.0
"""Bytes a weight of codes, which GPUs that have a model together do not keep beside latent weights."""
_GATHERED = {Preset.TABLES: 1.75, Preset.WEIGHTS: 4.75}
"""Bytes a weight of a block that is brought together for its passes where the model is spread over GPUs: its code or
latent weight, and three numbers for each of 16, …"""
_REDUCED = {Preset.TABLES: 0.25, Preset.WEIGHTS: 4.25}
"""… and of its gradients, which are summed over GPUs."""
_SAVED = {Preset.TABLES: 0.25, Preset.WEIGHTS: 1.25}
"""Bytes a weight of what a block's forward pass has rounded and chosen, which the backward pass needs."""
LINK = 270e9
"""Bytes a second to and from each GPU of a host: 60 % of NVLink's 450 GB/s, not measured here."""


@dataclass(frozen=True)
class Sizes:
    """The size of a model.

    weights: quantized ones. active: those that a token goes through: of experts, the chosen ones. channels: outputs of
    all layers. width: inputs and outputs that a token has of the layers of all blocks. block, layer: weights of the
    largest block, and of the largest layer, of experts each by itself. others: trained parameters beside the layers,
    norms and biases. fixed: parameters that are not trained. hidden: channels between the `blocks` blocks. embeddings:
    parameters of these and of lm_head, which are fixed if nothing else is said.
    """

    weights: int
    active: int
    channels: int
    width: int
    block: int
    layer: int
    others: int
    fixed: int
    hidden: int
    blocks: int
    vocabulary: int
    embeddings: int = 0


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    trained: numbers that are trained. gpu_memory: bytes of each device, if it were a GPU like an H100.
    seconds_per_step, seconds: on such a GPU, measurements included. state: bytes that every measurement writes beside
    the output. logits: bytes of the teacher's on the disk; 0 where they are not stored.
    """

    trained: int
    gpu_memory: int
    seconds_per_step: float
    seconds: float
    state: int
    logits: int

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {f"predicted_{key}": value for key, value in asdict(self).items()}


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """Return the size of a W4A8 checkpoint, from its headers."""
    tensors = checkpoint.tensors
    names = find_target(checkpoint).find_layers(checkpoint)
    chosen = _chosen(checkpoint)
    blocks: dict[Any, int] = defaultdict(int)
    weights = channels = layer = 0
    active = width = 0.0
    for name in names:
        rows, columns = tensors[f"{name}.weight_packed"].shape
        n, k = columns // 4, rows * TILE_K
        part = chosen if is_expert(name) else 1.0
        weights, channels, layer = weights + n * k, channels + n, max(layer, n * k)
        active, width = active + part * n * k, width + part * (n + k)
        blocks[block_of(name)] += n * k
    quantized = set(names)
    rest = [
        info for name, info in tensors.items() if name.rpartition(".")[0] not in quantized or name.endswith(".bias")
    ]
    others = sum(_count(info) for info in rest if len(info.shape) == 1 and info.dtype == "BF16")
    vocabulary, hidden = max((info.shape for info in rest if len(info.shape) == 2), default=(0, 0))
    return Sizes(
        weights=weights,
        active=int(active),
        channels=channels,
        width=int(width),
        block=max(blocks.values(), default=0),
        layer=layer,
        others=others,
        fixed=sum(map(_count, rest)) - others,
        hidden=hidden,
        blocks=len(blocks),
        vocabulary=vocabulary,
        embeddings=sum(_count(info) for info in rest if info.dtype == "BF16" and info.shape == (vocabulary, hidden)),
    )


def predict(
    start: Checkpoint,
    teacher: Checkpoint,
    data: TrainingData,
    options: DistillOptions,
    *,
    together: bool = True,
    top_k: int | None = None,
    gpus: int = 1,
    replicate: bool = False,
) -> Cost:
    """Predict what a training of a checkpoint takes.

    together: whether the teacher runs on the device of the student. top_k: its logits are stored, so many of each
    token, or all with 0; None: they are not. gpus: that share every batch; memory is that of each. replicate: each has
    the whole of both models.
    """
    whole, options = options, replace(options, batch_tokens=-(-options.batch_tokens // gpus))
    samples = {key_of(sample): sample for sample in (*data.samples, *data.held_out)} if top_k is not None else {}
    sizes, of_teacher = sizes_of(start), 2 * sum(map(_count, teacher.tensors.values())) if together else 0
    parts = 1 if replicate else gpus
    found = predict_cost(
        sizes,
        options,
        teacher_bytes=of_teacher if top_k is None else 0,
        held_out_tokens=sum(map(len, data.held_out)) * parts // gpus,
        stored_rows=None if top_k is None else sum(map(rows_of, samples.values())),
        top_k=top_k or 0,
        gpus=parts,
        shapes=_captured_shapes(start, sizes, options) if parts == 1 else 1,
    )
    if replicate:  # their gradients are added up
        bytes_ = 4 * found.trained
        step = found.seconds_per_step + (1 + _looks(options)) * bytes_ * 2 * (gpus - 1) / gpus / LINK
        seconds = found.seconds + (step - found.seconds_per_step) * options.steps
        found = replace(found, seconds_per_step=step, seconds=seconds, gpu_memory=found.gpu_memory + bytes_)
    if top_k is None or not together:
        return found
    return replace(found, gpu_memory=max(found.gpu_memory, _first_pass_memory(sizes, of_teacher, whole.batch_tokens)))


def _captured_shapes(start: Checkpoint, sizes: Sizes, options: DistillOptions) -> int:
    """Return how many shapes of batches are captured as CUDA graphs, at most; 1 where none is."""
    small = sizes.weights + sizes.others + sizes.fixed <= MOST_WEIGHTS
    return (
        MOST_SHAPES
        if small and not options.hidden_weight and not any(map(is_expert, find_target(start).find_layers(start)))
        else 1
    )


def _first_pass_memory(sizes: Sizes, teacher_bytes: int, tokens: int) -> int:
    """Return the bytes of the pass that stores logits: the teacher, its logits in BF16, and those that count."""
    shapes = MOST_SHAPES if teacher_bytes <= 2 * MOST_WEIGHTS else 1
    return teacher_bytes + 2 * (shapes + 1) * tokens * sizes.vocabulary + _LOSS_BYTES


def predict_cost(
    sizes: Sizes,
    options: DistillOptions,
    *,
    teacher_bytes: int,
    held_out_tokens: int = 0,
    stored_rows: int | None = None,
    top_k: int = 0,
    gpus: int = 1,
    shapes: int = 1,
) -> Cost:
    """Predict what a training takes.

    teacher_bytes: of a teacher on the same device; 0 where it is elsewhere, or stored. stored_rows: predictions that
    are stored of the teacher; None for none. gpus: over which both models are spread; each has a batch of its own.
    shapes: of batches, whose passes are kept as CUDA graphs, each with logits and gradients of its own.
    """
    if options.embeddings:
        sizes = replace(sizes, others=sizes.others + sizes.embeddings, fixed=sizes.fixed - sizes.embeddings)
    preset, tokens = options.preset, options.batch_tokens
    is_latent = preset is Preset.WEIGHTS
    trained = sizes.weights // (GROUP_SIZE // 8) + sizes.channels + sizes.others + (sizes.weights if is_latent else 0)
    kept = _KEPT[preset] * sizes.weights + 20 * sizes.channels + 16 * sizes.others + 2 * sizes.fixed + teacher_bytes
    per_token = ACTIVATIONS * sizes.width
    if options.recompute:
        per_token = per_token / max(1, sizes.blocks) + 2 * sizes.hidden * sizes.blocks
    looks = _looks(options)
    curvature = _CURVATURE * sizes.weights if looks else 0.0
    kept += curvature
    if gpus > 1 and is_latent:
        kept -= _CODES * sizes.weights
    memory = kept / gpus + tokens * (per_token + _LOGIT_BYTES * sizes.vocabulary)
    memory += _LOSS_BYTES + _LAYER_BYTES * sizes.layer
    memory += (shapes - 1) * (_GRAPH_LOGIT_BYTES * tokens * sizes.vocabulary + 4 * trained)
    if gpus > 1:  # two blocks at a time, one is computed, one comes; their gradients, as they are made and sent
        memory += 2 * (_GATHERED[preset] + _REDUCED[preset]) * sizes.block + 2 * sizes.fixed
        memory += _SAVED[preset] * (sizes.block if options.recompute else sizes.weights)
    passes: float = (1 if stored_rows is not None else 2) + 2 + (1 if options.recompute else 0)
    passes += looks * (4 if options.recompute else 3)
    seconds = 2 * passes * tokens * sizes.active / OPERATIONS
    seconds += 2 * (passes - 1) * tokens * sizes.hidden * sizes.vocabulary / OPERATIONS
    beside = PER_WEIGHT[preset] * sizes.weights + PER_LOGIT * tokens * sizes.vocabulary
    beside += (PER_CHANNEL + (PER_CHANNEL_AGAIN if options.recompute else 0.0)) * tokens * sizes.width
    seconds += (1 + looks) * beside
    if gpus > 1:  # gathered for each pass, and not hidden behind computing
        moved = (1 + looks) * ((2 + options.recompute) * _GATHERED[preset] + _REDUCED[preset]) + 2
        seconds += moved * sizes.weights * (gpus - 1) / gpus / LINK
    measured = (options.steps // options.every + 2) * held_out_tokens / gpus
    forward = 4 * (sizes.active + sizes.hidden * sizes.vocabulary) / OPERATIONS + PER_LOGIT * sizes.vocabulary
    forward += 2 * PER_CHANNEL_AGAIN * sizes.width
    return Cost(
        trained=trained,
        gpu_memory=int(memory),
        seconds_per_step=seconds,
        seconds=options.steps * seconds + measured * forward,
        state=16 * trained + int(curvature),
        logits=(stored_rows or 0) * row_bytes(sizes.vocabulary, top_k),
    )


def _looks(options: DistillOptions) -> float:
    """Return how many looks at the curvature there are to a step."""
    return 1 / LOOK if options.springs_of_curvature else 0.0


def _chosen(checkpoint: Checkpoint) -> float:
    """Return which part of the experts a token goes through."""
    chosen = checkpoint.number("num_experts_per_tok")
    counts = map(checkpoint.number, ("num_experts", "num_local_experts", "n_routed_experts"))
    count = next(filter(None, counts), None)
    return min(1.0, chosen / count) if chosen and count else 1.0


def _count(info: TensorInfo) -> int:
    return prod(info.shape)
