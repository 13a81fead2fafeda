"""Checks of headers, settings and contents that input formats share."""

from collections.abc import Mapping
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import GROUP_SIZE, W4Linear
from convert_w4a8.sources.base import LayerSpec

_LARGEST_SCALE = 65504.0
"""FP16's largest number. No weight of a model is as large; a BF16 scale with a wrong bit may be."""
_DOWNLOAD_AGAIN = "the checkpoint is damaged: download it again"


def setting(
    config: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    default: Any,
    subject: str = "quantization_config",
) -> Any:
    """Return config[key] if it has the right type, `default` if it is absent or null.

    Raises:
        ConvertError: the value has another type.

    """
    value = config.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise ConvertError(f"{subject}: {key}", f"is {value!r}, not {wanted}", "repair the configuration")
    return value


def collect_parts(checkpoint: Checkpoint, module: str, roles: tuple[str, ...]) -> Mapping[str, TensorInfo]:
    """Return role → tensor for the roles that a module has."""
    tensors = checkpoint.tensors
    return {role: tensors[name] for role in roles if (name := f"{module}.{role}") in tensors}


def check_bits(module: str, bits: object) -> None:
    """Raise ConvertError unless a layer has 4 bits."""
    if bits != 4:
        raise ConvertError(
            module,
            f"has {bits!r} bits; the kernel's weights have 4",
            "quantize this layer to 4 bits, or leave it in 16",
        )


def resolve_groups(module: str, group_size: int, in_features: int) -> tuple[int, int]:
    """Return (group_size, number of groups), with −1 resolved to all of K.

    The last group may be short (GPTQModel writes such files), in layers that the kernel cannot take anyway.

    Raises:
        ConvertError: the group size is none, or does not divide in_features.

    """
    if group_size == -1:
        return in_features, 1
    if group_size <= 0 or (in_features % group_size and in_features % GROUP_SIZE == 0):
        raise ConvertError(
            module, f"group_size {group_size} does not divide in_features = {in_features}", "repair the configuration"
        )
    return group_size, -(-in_features // group_size)


def check_tensor(
    module: str,
    parts: Mapping[str, TensorInfo],
    role: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    formula: str,
) -> None:
    """Raise ConvertError unless a layer has this tensor, with one of these dtypes and this shape (by `formula`)."""
    info = parts.get(role)
    if info is None:
        raise ConvertError(f"{module}.{role}", "is missing", "download or write the checkpoint again")
    if info.dtype not in dtypes or info.shape != shape:
        raise ConvertError(
            info.name,
            f"is {info.dtype} {list(info.shape)}, not {' or '.join(dtypes)} {list(shape)} = {formula}",
            "check that the configuration belongs to this checkpoint",
        )


def check_rank_two(info: TensorInfo, dtype: str) -> tuple[int, int]:
    """Return the shape of a matrix.

    Raises:
        ConvertError: the tensor is not a non-empty matrix of this dtype.

    """
    if info.dtype != dtype or len(info.shape) != 2 or 0 in info.shape:
        raise ConvertError(
            info.name, f"is {info.dtype} {list(info.shape)}, not a {dtype} matrix", "check the checkpoint"
        )
    return info.shape[0], info.shape[1]


def check_content(codes: TensorInfo, scales: TensorInfo, w: W4Linear) -> W4Linear:
    """Return a layer unchanged; `codes` and `scales` are two of its tensors.

    Raises:
        ConvertError: one of them is all 0 without meaning a layer of zeros, as a download leaves it that reserved its
            space and never came. A scale of 0 for some groups is no damage: they are dead.

    """
    few = w.packed.flatten()[:1024]
    if not bool(few.any()) and not bool(w.packed.any()) and (w.zeros is None or bool(w.zeros.any())):
        raise ConvertError(codes.name, "holds nothing but zeros", _DOWNLOAD_AGAIN)
    if not bool(w.scales.any()) and not bool((few == few[0]).all()):
        raise ConvertError(scales.name, "holds nothing but zeros, for codes that mean something", _DOWNLOAD_AGAIN)
    return w


def check_scales(info: TensorInfo, scales: torch.Tensor, *, signed: bool = False) -> torch.Tensor:
    """Return the scales unchanged.

    signed: whether the format's tools may write negative scales, as this one does (a negated scale turns the values
        −7 … 8 into −8 … 7).

    Raises:
        ConvertError: one of them is NaN, infinite, absurdly large or, unless `signed`, negative.

    """
    if not bool(torch.isfinite(scales).all()):
        raise ConvertError(info.name, "holds NaN or infinite scales", _DOWNLOAD_AGAIN)
    if float(scales.abs().max()) > _LARGEST_SCALE:
        raise ConvertError(info.name, f"holds a scale of {float(scales.abs().max()):.3g}", _DOWNLOAD_AGAIN)
    if not signed and bool((scales < 0).any()):
        raise ConvertError(info.name, "holds negative scales", _DOWNLOAD_AGAIN)
    return scales


def real_zeros(zeros: torch.Tensor) -> torch.Tensor | None:
    """Return zero-points uint8 [G, N] contiguous, or None where all are 8, that is, where there are none."""
    return None if bool((zeros == 8).all()) else zeros.contiguous()


def real_g_idx(info: TensorInfo, g_idx: torch.Tensor, spec: LayerSpec) -> torch.Tensor | None:
    """Return g_idx int32 [K], or None where it says only k // group_size.

    Raises:
        ConvertError: an index names no group, or they do not spread the input channels evenly over the groups.

    """
    contiguous = torch.arange(spec.in_features, dtype=g_idx.dtype) // spec.group_size
    if torch.equal(g_idx, contiguous):
        return None
    groups = -(-spec.in_features // spec.group_size)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ConvertError(info.name, f"names groups {low} … {high}, but there are {groups}", _DOWNLOAD_AGAIN)
    if not torch.equal(g_idx.sort().values, contiguous):
        raise ConvertError(info.name, f"does not name each group {spec.group_size} times", _DOWNLOAD_AGAIN)
    return g_idx


def unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 [..., W] into uint8 [..., 8·W] nibbles, low nibble first."""
    data = words.contiguous().view(torch.uint8)
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)
