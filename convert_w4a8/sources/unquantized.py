"""Models that are not quantized yet, in BF16, FP16 or FP32: what `w4a8 quantize` starts from.

Their layers are the matrices of decoder blocks. Experts may lie in one tensor for all, as transformers 5 holds them
(`fused_experts.py`). This is no format that `w4a8-convert` takes: `sources.find_source` leaves it out.
"""

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of, find_mixtures, is_embedding, is_lm_head, is_router, linear_module
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, DenseLinear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.fused_experts import dense_stack, split_dense

NAME = "unquantized"
ROLES = ("weight",)
ANCHOR = "weight"
DTYPES = ("BF16", "F16", "F32")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says of no quantization."""
    return not checkpoint.quantization_config


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the linear layers of all decoder blocks, from headers alone; what cannot be read is a problem."""
    mixtures = find_mixtures(checkpoint.tensors.values(), checkpoint.config)
    found: list[LayerSpec] = []
    for info in checkpoint.tensors.values():
        if info.dtype not in DTYPES or block_of(info.name) is None:
            continue
        if dense_stack(info) is not None:
            try:
                found.extend(_spec(module, part) for module, part in split_dense(info, checkpoint.config))
            except ConvertError as error:
                problems.append(error.problem)
            continue
        module = linear_module(info)
        if module and not (is_lm_head(module) or is_embedding(module) or is_router(module, mixtures)):
            found.append(_spec(module, info))
    return found


def _spec(module: str, info: TensorInfo) -> LayerSpec:
    n, k = info.shape
    return LayerSpec(module, NAME, n, k, GROUP_SIZE, True, False, {"weight": info}, dense=True)


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: there are no zero-points."""
    return None


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: there are no groups yet."""
    return None


def read_layer(spec: LayerSpec, read: Reader) -> DenseLinear:
    """Read one layer's weight."""
    return DenseLinear(read(spec.parts["weight"]))
