"""Tensors that would be copied although they are no 16-bit weights: quantized in a way that nothing here reads.

Copied, they would lie in the output as they are, beside settings that do not speak of them.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import Problem
from convert_w4a8.sources.base import LayerSpec

_QUANTIZED = re.compile(
    r"(?:^|\.)(?:qweight\w*|qzeros|g_idx|scaled_zeros|weight_(?:packed|scale|scale_inv|scale_2|global_scale|zero_point"
    r"|zeros|g_idx|format|codes|blocks|scales|bits)|quant_map|nested_absmax|absmax|quant_state\..+|SCB|s_group"
    r"|s_channel|B_24|B_meta)$"
    r"|_proj\d?_(?:packed|qweight|qzeros|blocks|scales?|scale_inv|zero_point|g_idx|shape)$"
)
"""Names of tensors that tools write for quantized weights."""
_MARLIN = ("B", "s")
"""The tensors of a layer in Marlin's own layout."""
_BESIDE = frozenset({"bias", "weight", "k_scale", "v_scale", "q_scale", "output_scale"})
"""What may stand beside the tensors of a quantized layer; a plain weight is refused as a second claim to its name."""
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
"""What codes are packed in. Indices are of 64 bits, masks are booleans."""
_HARMLESS = re.compile(
    r"(?:position|token_type)_ids$|relative_position\w*$|(?:^|[._])mask(?:ed_bias)?$|tid2eid$|\.bias$"
)
"""Tables and masks of models in integers."""
_IN_MARLIN = "is in Marlin's own layout"
_BESIDE_CODES = "stands beside the INT4 weights of a layer, and what it does to them is not known"
_REMEDIES = {
    _IN_MARLIN: "give the GPTQ checkpoint that it was made from",
    _BESIDE_CODES: "save the model without it, or remove it if it does nothing",
}
_REMEDY = "leave these layers in 16 bits, or give a checkpoint in one of the formats that are read"


def leftover_problems(checkpoint: Checkpoint, specs: Sequence[LayerSpec], known: Collection[str]) -> Iterator[Problem]:
    """Yield tensors that are quantized, or belong to a quantized layer, in a way that is not read; one for each kind.

    known: names of the tensors that are accounted for.
    """
    modules = {spec.name for spec in specs}
    found: dict[str, list[TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        reason = None if name in known else _reason(checkpoint, info, modules)
        if reason is not None:
            found.setdefault(reason, []).append(info)
    for reason, infos in found.items():
        first = infos[0]
        more = f", as {len(infos) - 1:,} more" if len(infos) > 1 else ""
        what = f"{first.dtype} {list(first.shape)} {reason}{more}"
        yield Problem(first.name, what, _REMEDIES.get(reason, _REMEDY))


def leftover_notes(checkpoint: Checkpoint, known: Collection[str]) -> Iterator[str]:
    """Yield the integers that are copied as they are, since some models have tables of them."""
    tables = [info for name, info in checkpoint.tensors.items() if name not in known and _is_table(info)]
    if tables:
        more = f" and {len(tables) - 1:,} more" if len(tables) > 1 else ""
        yield f"copied as it is: {tables[0].name}, {tables[0].dtype} {list(tables[0].shape)}{more}"


def _is_table(info: TensorInfo) -> bool:
    return info.dtype in _INTEGERS and len(info.shape) > 1 and not _HARMLESS.search(info.name)


def _reason(checkpoint: Checkpoint, info: TensorInfo, modules: Collection[str]) -> str | None:
    module, _, role = info.name.rpartition(".")
    if role in _MARLIN and all(f"{module}.{other}" in checkpoint.tensors for other in _MARLIN):
        return _IN_MARLIN
    if module in modules and role not in _BESIDE:
        return _BESIDE_CODES
    if info.dtype.startswith("F8"):
        return "is quantized in a way that is not read"
    if _QUANTIZED.search(info.name) or (_is_table(info) and (role == "weight" or ".experts." in info.name)):
        return "is part of a quantized weight that is not read"
    return None
