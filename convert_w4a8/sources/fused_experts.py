"""Experts of a block in one tensor, as Hugging Face's models hold them and compressed-tensors can pack them.

`experts.gate_up_proj` [E, 2·I, H] and `experts.down_proj` [E, H, I]: the packed weights and their scales have one more
dimension, and are called `experts.gate_up_proj.weight_packed` or `experts.gate_up_proj_packed`. Each expert's rows lie
side by side in the file, so each of its projections is a part of these tensors: gate is the first half of the rows.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import ConvertError

_LEAVES: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""What a tensor of all experts holds → the projections, in the order of its rows."""
_STACK = re.compile(rf"^(?P<stack>.+\.experts\.(?:{'|'.join(_LEAVES)}))(?:\.weight)?_(?P<role>\w+)$")
_DENSE_STACK = re.compile(rf"^(?P<stack>.+\.experts\.(?:{'|'.join(_LEAVES)}))(?:\.weight)?$")
_OTHER_LAYOUTS = frozenset({"gpt_oss", "llama4", "llama4_text"})
"""Models that hold the transposed weights, [E, H, 2·I], or the rows of gate and up by turns."""
REMEDY = "save the model with each expert's projections as layers of their own"


def stacks(checkpoint: Checkpoint, roles: tuple[str, ...]) -> dict[str, dict[str, TensorInfo]]:
    """Return module → role → tensor for the packed weights of all experts in one tensor."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        match = _STACK.match(name)
        if match and f"weight_{match['role']}" in roles:
            found.setdefault(match["stack"], {})[f"weight_{match['role']}"] = info
    return {stack: parts for stack, parts in found.items() if "weight_packed" in parts}


def split_experts(
    stack: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, TensorInfo]]]:
    """Yield (module, role → its part of the tensors) for each projection of each expert.

    config: the model's, whose hidden size tells whether the tensors are laid out as is read here.

    Raises:
        ConvertError: they are not.

    """
    parent, _, leaf = stack.rpartition(".")
    packed = parts["weight_packed"]
    _check_layout(packed, leaf, 8, "[E, N, K/8]", config)
    count = packed.shape[0]
    if "weight_g_idx" in parts:
        raise ConvertError(parts["weight_g_idx"].name, "reorders the input channels of experts in one tensor", REMEDY)
    leaves = _LEAVES[leaf]
    for role, info in parts.items():
        # The rows of a tensor are output channels, of packed zero-points eight in one.
        if role != "weight_shape" and (len(info.shape) < 2 or info.shape[0] != count or info.shape[1] % len(leaves)):
            raise ConvertError(info.name, f"is {info.dtype} {list(info.shape)}, beside {list(packed.shape)}", REMEDY)
    for expert in range(count):
        for half, name in enumerate(leaves):
            yield (
                f"{parent}.{expert}.{name}",
                {
                    role: _whole(info) if role == "weight_shape" else _rows(info.part(expert), half, len(leaves))
                    for role, info in parts.items()
                },
            )


def dense_stack(info: TensorInfo) -> str | None:
    """Return the module of a tensor with the unquantized weights of all experts; None for other tensors."""
    match = _DENSE_STACK.match(info.name) if len(info.shape) == 3 else None
    return match and match["stack"]


def split_dense(info: TensorInfo, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield (module, its part of the tensor) for each projection of each expert of an unquantized `dense_stack`.

    Raises:
        ConvertError: the tensor is not laid out as is read here.

    """
    stack = dense_stack(info)
    assert stack is not None
    parent, _, leaf = stack.rpartition(".")
    _check_layout(info, leaf, 1, "[E, N, K]", config)
    leaves = _LEAVES[leaf]
    if info.shape[1] % len(leaves):
        raise ConvertError(info.name, f"is {info.dtype} {list(info.shape)}, whose rows are no two halves", REMEDY)
    for expert in range(info.shape[0]):
        for half, name in enumerate(leaves):
            yield f"{parent}.{expert}.{name}", _rows(info.part(expert), half, len(leaves))


def _check_layout(info: TensorInfo, leaf: str, per_word: int, formula: str, config: Mapping[str, Any]) -> None:
    """Raise ConvertError unless a tensor of all experts, `per_word` inputs a word, is laid out as is read here."""
    text = next((config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), config)
    hidden = text.get("hidden_size", config.get("hidden_size"))
    if len(info.shape) != 3 or 0 in info.shape:
        raise ConvertError(info.name, f"is {info.dtype} {list(info.shape)}, not {formula}", REMEDY)
    _, rows, words = info.shape
    types = {str(config.get("model_type")), str(text.get("model_type"))}
    if types & _OTHER_LAYOUTS or (rows if leaf == "down_proj" else words * per_word) != hidden:
        reason = f"is {list(info.shape)}, which is not laid out as the experts of a block with hidden_size {hidden}"
        raise ConvertError(info.name, reason, REMEDY)


def _rows(info: TensorInfo, half: int, halves: int) -> TensorInfo:
    size = info.shape[0] // halves
    return info.part(half * size, (half + 1) * size)


def _whole(info: TensorInfo) -> TensorInfo:
    """Return a tensor marked as one of several layers."""
    return info.part(0, info.shape[0]) if info.shape and info.shape[0] else info
