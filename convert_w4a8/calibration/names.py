"""Which tensors of a checkpoint are which parameters of transformers' modules, and which layers lie where in a block.

transformers 5 holds the experts of a block in one tensor; checkpoints have a tensor for each projection of each
expert, or that same tensor. Mixtral's checkpoints have names of their own.
"""

from collections.abc import Iterator

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, read_tensor
from convert_w4a8.encoding.dequantize import dequantize_fp8

FP8 = "F8_E4M3"
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters of transformers' experts → the projections whose rows they hold, one below the other."""


def is_stack(name: str) -> bool:
    """Whether a parameter of transformers' model holds a projection of all experts."""
    parent, _, leaf = name.rpartition(".")
    return leaf in STACKS and parent.endswith("experts")


def find_tensor(checkpoint: Checkpoint, block: str, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Read the tensor for a parameter `name` of a block of transformers' model; None where there is none.

    block: the block's name in the checkpoint. shape: the parameter's.
    """
    info = tensor_of(checkpoint, block, name)
    if info is not None:
        return read_weight(checkpoint, info) if info.shape == shape else None
    experts, _, leaf = name.rpartition(".")
    if not is_stack(name) or len(shape) != 3:
        return None
    stack: torch.Tensor | None = None
    for expert in range(shape[0]):
        parts = [tensor_of(checkpoint, block, f"{experts}.{expert}.{part}.weight") for part in STACKS[leaf]]
        row = 0
        for part in parts:
            if part is None or len(part.shape) != 2 or part.shape[1] != shape[2] or row + part.shape[0] > shape[1]:
                return None
            if stack is None:
                stack = torch.empty(shape, dtype=torch.bfloat16 if part.dtype == FP8 else TORCH_DTYPES[part.dtype])
            stack[expert, row : row + part.shape[0]] = read_weight(checkpoint, part)
            row += part.shape[0]
        if row != shape[1]:
            return None
    return stack


def read_weight(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    """Read a tensor; FP8 in blocks becomes BF16."""
    scale = checkpoint.tensors.get(f"{info.name}_scale_inv") if info.dtype == FP8 else None
    return read_tensor(info) if scale is None else dequantize_fp8(read_tensor(info), read_tensor(scale))


def tensor_of(checkpoint: Checkpoint, block: str, name: str) -> TensorInfo | None:
    """Return the tensor that is called `name` within a block, by transformers' names or the checkpoint's."""
    return next((info for ours in _spellings(name) if (info := checkpoint.tensors.get(f"{block}.{ours}"))), None)


def _spellings(name: str) -> Iterator[str]:
    yield name
    if name.startswith("mlp."):
        name = name.replace("mlp.", "block_sparse_moe.", 1)
        yield name
        for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            if ".experts." in name and f".{ours}." in name:
                yield name.replace(f".{ours}.", f".{theirs}.")
