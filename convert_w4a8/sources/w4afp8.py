"""W4AFP8 checkpoints of DeepSeek, Kimi and GLM models, as TensorRT-LLM's and SGLang's tools write them.

Experts are INT4: `weight` int8 [N, K/2], two values −8 … 7 a byte in two's complement, the even input channel in the
low nibble; `weight_scale_inv` [N, K/128], by which they are multiplied. Every other quantized layer is FP8: `weight`
float8_e4m3fn [N, K], `weight_scale_inv` [N/128, K/128]; it is carried over (`carried.py`). config.json has
`quant_method` w4afp8, or hf_quant_config.json has `quant_algo` MIXED_PRECISION. The experts' `input_scale`, for static
activations, is left out: W4A8 computes it for each token.
"""

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import Packing, W4Linear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.carried import INVERSE
from convert_w4a8.sources.checks import (
    check_content,
    check_rank_two,
    check_scales,
    check_tensor,
    collect_parts,
    describe_each,
)

NAME = "w4afp8"

ROLES = ("weight", INVERSE)
ANCHOR = INVERSE

_GROUP = 128
_SHORT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What the tools call an expert's projections in the names of input scales."""
_SIGNS = -0x77777778  # 0x88888888 as int32


def matches(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of this format, by its configuration."""
    config = checkpoint.quantization_config
    if config.get("quant_method") != "modelopt":
        return config.get("quant_method") == "w4afp8"
    quantization = config.get("quantization")
    mixed = isinstance(quantization, dict) and quantization.get("quant_algo") == "MIXED_PRECISION"
    return mixed and any(name.endswith(f".{ANCHOR}") for name in checkpoint.tensors)


def find_layers(checkpoint: Checkpoint, problems: list[Problem]) -> list[LayerSpec]:
    """Return the INT4 layers, from headers alone; what cannot be read is appended to `problems`."""
    modules = (module for module in checkpoint.modules_with(ANCHOR) if not _is_fp8(checkpoint, module))
    return describe_each(modules, lambda module: _describe(checkpoint, module), problems)


def _is_fp8(checkpoint: Checkpoint, module: str) -> bool:
    info = checkpoint.tensors.get(f"{module}.weight")
    return info is not None and info.dtype == "F8_E4M3"


def _describe(checkpoint: Checkpoint, module: str) -> LayerSpec:
    parts: dict[str, TensorInfo] = dict(collect_parts(checkpoint, module, ROLES))
    if "weight" not in parts:
        raise ConvertError(module, f"has a {ANCHOR} but no weight", "download or write the checkpoint again")
    n, columns = check_rank_two(parts["weight"], "I8")
    k = 2 * columns
    if k % 8:
        raise ConvertError(f"{module}.weight", f"has {columns} columns, not K/2", "check the checkpoint")
    check_tensor(module, parts, ANCHOR, ("F16", "BF16", "F32"), (n, -(-k // _GROUP)), f"[N, K/{_GROUP}]")
    expert, _, leaf = module.rpartition(".")
    for name in (f"{module}.input_scale", f"{expert}.{_SHORT.get(leaf, leaf)}.input_scale"):
        if name in checkpoint.tensors:
            parts["input_scale"] = checkpoint.tensors[name]
    return LayerSpec(module, NAME, n, k, _GROUP, symmetric=True, act_order=False, parts=parts)


def read_zeros(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: all zero-points are 8."""
    return None


def read_g_idx(spec: LayerSpec, read: Reader) -> torch.Tensor | None:  # noqa: ARG001  (part of the Source interface)
    """Return None: the groups are contiguous."""
    return None


def read_layer(spec: LayerSpec, read: Reader) -> W4Linear:
    """Read one layer's tensors.

    Raises:
        ConvertError: their content contradicts the headers.

    """
    weight, scale = spec.parts["weight"], spec.parts[ANCHOR]
    w = W4Linear(
        packed=read(weight).contiguous().view(torch.int32) ^ _SIGNS,  # two's complement to value + 8
        packing=Packing.PACK_QUANTIZED,
        scales=check_scales(scale, read(scale)).t().contiguous(),
        zeros=None,
        g_idx=None,
        group_size=spec.group_size,
    )
    return check_content(weight, scale, w)
