"""Models that are not quantized to 4 bits yet, in BF16, FP16 or FP32: what `w4a8 quantize` starts from.

Some are published in FP8 only, as DeepSeek's: `weight` float8_e4m3fn [N, K] and `weight_scale_inv` [N/128, K/128], by
which blocks of 128 × 128 are multiplied. Of these the weights in BF16 are meant, as DeepSeek's own program writes them.

Their layers are the matrices of decoder blocks. Experts may lie in one tensor for all, as transformers 5 holds them
(`fused_experts.py`). This is no format that `w4a8-convert` takes: `sources.find_source` leaves it out.
"""

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of, find_mixtures, is_embedding, is_lm_head, is_router, linear_module
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding.dequantize import FP8_BLOCK, dequantize_fp8
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, DenseLinear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.carried import INVERSE
from convert_w4a8.sources.checks import check_rank_two, check_tensor
from convert_w4a8.sources.fused_experts import dense_stack, split_dense

NAME = "unquantized"
ROLES = ("weight", INVERSE)
ANCHOR = "weight"
DTYPES = ("BF16", "F16", "F32")
DEQUANTIZES_FP8 = True


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says of no quantization, or of FP8 in blocks."""
    settings = checkpoint.quantization_config
    in_blocks = settings.get("quant_method") == "fp8" and settings.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]
    return not settings or in_blocks


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the linear layers of all decoder blocks, from headers alone; what cannot be read is a problem."""
    mixtures = find_mixtures(checkpoint.tensors.values(), checkpoint.config)
    found: list[LayerSpec] = []
    for info in checkpoint.tensors.values():
        if block_of(info.name) is None:
            continue
        module, _, role = info.name.rpartition(".")
        if info.dtype == "F8_E4M3" and role == "weight" and f"{module}.{INVERSE}" in checkpoint.tensors:
            try:
                found.append(_fp8_spec(checkpoint, module))
            except ConvertError as error:
                problems.append(error.problem)
            continue
        if info.dtype not in DTYPES:
            continue
        if dense_stack(info) is not None:
            try:
                found.extend(_spec(module, part) for module, part in split_dense(info, checkpoint.config))
            except ConvertError as error:
                problems.append(error.problem)
            continue
        linear = linear_module(info)
        if linear and not (is_lm_head(linear) or is_embedding(linear) or is_router(linear, mixtures)):
            found.append(_spec(linear, info))
    return found


def _spec(module: str, info: TensorInfo) -> LayerSpec:
    n, k = info.shape
    return LayerSpec(module, NAME, n, k, GROUP_SIZE, True, False, {"weight": info}, dense=True)


def _fp8_spec(checkpoint: Checkpoint, module: str) -> LayerSpec:
    parts = {role: checkpoint.tensors[f"{module}.{role}"] for role in ROLES}
    n, k = check_rank_two(parts["weight"], "F8_E4M3")
    blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    check_tensor(module, parts, INVERSE, ("F32", "BF16", "F16"), blocks, "a scale for each block")
    return LayerSpec(module, NAME, n, k, GROUP_SIZE, True, False, parts, dense=True)


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: there are no zero-points."""
    return None


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: there are no groups yet."""
    return None


def read_layer(spec: LayerSpec, read: Reader) -> DenseLinear:
    """Read one layer's weight."""
    weight = read(spec.parts["weight"])
    if INVERSE not in spec.parts:
        return DenseLinear(weight)
    return DenseLinear(dequantize_fp8(weight, read(spec.parts[INVERSE])))
