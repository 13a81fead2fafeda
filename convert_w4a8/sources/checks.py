"""Checks of headers, settings and contents that input formats share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, W4Linear
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.sources.fused_experts import REMEDY

_LARGEST_SCALE = 65504.0
"""FP16's largest number. No weight of a model is as large; a BF16 scale with a wrong bit may be."""
_OUTLIER = 1e6
"""So many times the median scale of a tensor is no weight, but a wrong bit in an exponent."""
_SAMPLE = 4096
"""Scales of which the median is taken."""
_PAGE = 4096
"""Bytes that a file system leaves out together where nothing was written."""
_LOOKED_AT = 10_000
"""Pages that begin with 0, which are looked at one by one: more are not a few holes, but what somebody made."""
_DOWNLOAD_AGAIN = "compare its checksum and download it again; if it was written so, quantize the model again"


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


def describe_each(
    modules: Iterable[str], describe: Callable[[str], LayerSpec], problems: list[Problem]
) -> list[LayerSpec]:
    """Return what `describe` says of modules; where it raises ConvertError, that is appended to `problems`."""
    layers = []
    for module in modules:
        try:
            layers.append(describe(module))
        except ConvertError as error:
            problems.append(error.problem)
    return layers


def check_bits(module: str, bits: object) -> None:
    """Raise ConvertError unless a layer has 4 bits."""
    if not isinstance(bits, int | float):
        raise ConvertError(module, f"has {bits!r} bits, which is no number", "repair the configuration")
    if bits != 4:
        raise ConvertError(
            module,
            f"has {bits!r} bits; the kernel's weights have 4",
            "quantize this layer to 4 bits, or leave it in 16",
        )


def resolve_groups(module: str, group_size: int, in_features: int) -> tuple[int, int]:
    """Return (group_size, number of groups), with −1, and what is larger than K, resolved to all of K.

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
    return min(group_size, in_features), -(-in_features // group_size)


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
    if len(info.shape) == 3 and ".experts" in info.name:
        reason = f"is {info.dtype} {list(info.shape)}, experts in one tensor, of which {dtype} codes are not read"
        raise ConvertError(info.name, reason, REMEDY)
    if info.dtype != dtype or len(info.shape) != 2 or 0 in info.shape:
        raise ConvertError(
            info.name, f"is {info.dtype} {list(info.shape)}, not a {dtype} matrix", "check the checkpoint"
        )
    return info.shape[0], info.shape[1]


def check_content(codes: TensorInfo, scales: TensorInfo, w: W4Linear) -> W4Linear:
    """Return a layer unchanged; `codes` and `scales` are two of its tensors.

    Raises:
        ConvertError: one of them is all 0 without meaning a layer of zeros, as a download leaves it that reserved its
            space and never came; or whole pages of the codes are. A scale of 0 for some groups is no damage: they are
            dead.

    """
    few = w.packed.flatten()[:1024]
    if not bool(few.any()) and not bool(w.packed.any()) and (w.zeros is None or bool(w.zeros.any())):
        raise ConvertError(codes.name, "holds nothing but zeros", _DOWNLOAD_AGAIN)
    if not bool(w.scales.any()) and not bool((few == few[0]).all()):
        raise ConvertError(scales.name, "holds nothing but zeros, for codes that mean something", _DOWNLOAD_AGAIN)
    hole = _find_hole(codes, w)
    if hole is not None:
        raise ConvertError(codes.name, f"has a hole of zeros: {_PAGE} bytes, {hole:,} bytes into it", _DOWNLOAD_AGAIN)
    return w


def _find_hole(codes: TensorInfo, w: W4Linear) -> int | None:
    """Return where a page of the file is all 0 within a layer's codes, in bytes from their beginning; None if nowhere.

    A code of 0 is the smallest value, −8 where there are no zero-points: no layer has thousands side by side. Where the
    zero-points are 0 as well, it is 0, and so it is where the scales are. Reads one word of each page, and the others
    where that is 0.
    """
    first = -codes.start % _PAGE  # pages are those of the file
    if codes.dtype != "I32" or first % 4 or not w.packed.is_contiguous():  # 0 is another code in bytes
        return None
    words = w.packed.flatten()[first // 4 :]
    pages = words[: len(words) // (_PAGE // 4) * (_PAGE // 4)].view(-1, _PAGE // 4)
    for page in (pages[:, 0] == 0).nonzero().flatten()[:_LOOKED_AT].tolist():
        start = first // 4 + page * (_PAGE // 4)
        if not bool(pages[page].any()) and _means_something(w, torch.arange(start, start + _PAGE // 4)):
            return int(4 * start)
    return None


def _means_something(w: W4Linear, words: torch.Tensor) -> bool:
    """Whether codes of 0 in these words are values other than 0, for more than half of them."""
    width = w.packed.shape[1]
    at = dict(zip(w.packing.axes, (words[:, None] // width, words[:, None] % width), strict=True))
    at[w.packing.along] = at[w.packing.along] * 8 + torch.arange(8)
    groups = at["k"] // w.group_size if w.g_idx is None else w.g_idx[at["k"]].long()
    values = w.scales[groups, at["n"]] != 0
    if w.zeros is not None:
        values &= w.zeros[groups, at["n"]] != 0
    return int(values.sum()) * 2 > values.numel()


def check_scales(info: TensorInfo, scales: torch.Tensor) -> torch.Tensor:
    """Return the scales unchanged. They may be negative: AutoRound takes the sign with which a group fits best.

    Raises:
        ConvertError: one of them is NaN, infinite or absurdly large, by itself or beside the others.

    """
    if not bool(torch.isfinite(scales).all()):
        raise ConvertError(info.name, "holds NaN or infinite scales", _DOWNLOAD_AGAIN)
    largest = float(scales.abs().max())
    if largest > _LARGEST_SCALE:
        raise ConvertError(info.name, f"holds a scale of {largest:.3g}", _DOWNLOAD_AGAIN)
    if largest > 1:  # a scale is some hundredths, as weights are: beside tiny ones of dead groups it may look large
        median = _median_scale(scales)
        if largest > _OUTLIER * median > 0:
            raise ConvertError(
                info.name, f"holds a scale of {largest:.3g}, where the median is {median:.3g}", _DOWNLOAD_AGAIN
            )
    return scales


def _median_scale(scales: torch.Tensor) -> float:
    """Return the median of the scales that are not 0, of a sample; 0.0 if all are."""
    flat = scales.flatten()
    some = flat[:: max(1, len(flat) // _SAMPLE)].float().abs()
    some = some[some > 0]
    return float(some.median()) if len(some) else 0.0


def real_zeros(zeros: torch.Tensor) -> torch.Tensor | None:
    """Return zero-points uint8 [G, N] contiguous, or None where all are 8, that is, where there are none."""
    return None if bool((zeros == 8).all()) else zeros.contiguous()


def real_g_idx(info: TensorInfo, g_idx: torch.Tensor, spec: LayerSpec) -> torch.Tensor | None:
    """Return g_idx int32 [K], or None where it says only k // group_size.

    So does one that was never filled in, −1 or 0 throughout, where the settings know of no activation order: AutoGPTQ's
    kernels take it so.

    Raises:
        ConvertError: an index names no group, or they do not spread the input channels evenly over the groups.

    """
    contiguous = torch.arange(spec.in_features, dtype=g_idx.dtype) // spec.group_size
    if torch.equal(g_idx, contiguous):
        return None
    if not spec.act_order and (bool((g_idx == -1).all()) or not bool(g_idx.any())):
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
