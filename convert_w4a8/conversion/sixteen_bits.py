"""All of the output that is not W4A8, by kind, with sizes: what a plan says of it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert_w4a8.checkpoint.names import (
    find_stacked_mixtures,
    is_embedding,
    is_expert,
    is_lm_head,
    is_router,
    linear_module,
)
from convert_w4a8.checkpoint.safetensors_file import TensorSpec
from convert_w4a8.conversion.ignore import find_components
from convert_w4a8.conversion.layers import Kept, LayerPlan

_NAMES = 6
_COMPONENTS = 6
"""Parts of a model that are told apart."""
_NAMING = (Kept.TOGETHER, Kept.WIDTH)
"""Kinds of which every reason names another layer."""


@dataclass(frozen=True)
class Kind:
    """Tensors or layers that stay in 16 bits for the same reason.

    of_source: whether they are so in the source; otherwise they are dequantized. nbytes: in the output.
    names: the first ones.
    """

    kind: str
    of_source: bool
    count: int
    nbytes: int
    names: tuple[str, ...]


def find_kinds(
    layers: Iterable[LayerPlan],
    tensors: Sequence[TensorSpec],
    mixtures: Collection[str],
    config: Mapping[str, Any],
) -> tuple[Kind, ...]:
    """Return what stays in 16 bits: first the layers that are dequantized, then all tensors that are copied.

    mixtures: modules that have experts.
    """
    layers = tuple(layers)
    kept: dict[str, list[tuple[str, int]]] = {}
    for layer in layers:
        if layer.dequantize is not None:
            kind = str(layer.kept) if layer.kept in _NAMING else layer.dequantize
            kept.setdefault(kind, []).append((layer.module, sum(spec.nbytes for spec in layer.specs)))
    stacked = {name for names in find_stacked_mixtures(tensors, config).values() for name in names}
    modules = {tensor.name: tensor.name.removesuffix(".weight") for tensor in tensors}
    components = find_components(
        {module for tensor in tensors if (module := linear_module(tensor))},
        [layer.module for layer in layers if layer.dequantize is None],
    )
    roots = list(components)[:_COMPONENTS]
    copied: dict[str, list[tuple[str, int]]] = {}
    for tensor in tensors:
        root = next((root for root in roots if tensor.name.startswith(f"{root}.")), None)
        if root is not None:
            kind = root
        elif tensor.name in stacked:
            kind = "experts in one tensor for all"
        else:
            kind = _kind(tensor, mixtures)
        copied.setdefault(kind, []).append((modules[tensor.name], tensor.nbytes))
    return (*_kinds(kept, of_source=False), *_kinds(copied, of_source=True))


def _kinds(found: Mapping[str, Sequence[tuple[str, int]]], *, of_source: bool) -> list[Kind]:
    """Return kinds, the largest first, from the names and sizes of what belongs to them."""
    kinds = [
        Kind(kind, of_source, len(items), sum(size for _, size in items), tuple(name for name, _ in items[:_NAMES]))
        for kind, items in found.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.nbytes)


def _kind(tensor: TensorSpec, mixtures: Collection[str]) -> str:
    module = linear_module(tensor)
    if module is None:
        is_table = len(tensor.shape) == 2 and is_embedding(tensor.name.removesuffix(".weight"))
        return "embeddings" if is_table else "norms, biases and other tensors"
    if is_lm_head(module):
        return "lm_head"
    if is_router(module, mixtures):
        return "routers"
    return "experts" if is_expert(module) else "other linear layers"
