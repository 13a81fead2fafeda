"""Layers that vLLM serves as one, of which some are INT4 and others FP8 or in 16 bits: no output can hold these."""

from collections.abc import Collection, Iterable, Sequence

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import fusion_key, is_expert, linear_modules
from convert_w4a8.errors import Problem
from convert_w4a8.sources import LayerSpec
from convert_w4a8.sources.carried import CarriedLayer, one_a_kind


def mixed_problems(
    checkpoint: Checkpoint, specs: Sequence[LayerSpec], carried: Sequence[CarriedLayer], known: Collection[str]
) -> Iterable[Problem]:
    """Yield what stands beside an FP8 layer in a merged layer, or among the experts of one, and is of another kind.

    known: the names of the tensors of `specs` and `carried`.
    """
    kinds: dict[str, dict[str, list[str]]] = {}
    for layer in carried:
        kinds.setdefault(fusion_key(layer.name), {}).setdefault(layer.kind, []).append(layer.name)
    plain = linear_modules(info for info in checkpoint.tensors.values() if info.name not in known)
    plain -= {layer.name for layer in carried}  # lm_head is always among them
    others = [*(("INT4", spec.name) for spec in specs), *(("16 bits", name) for name in plain)]
    for kind, name in others:
        if fusion_key(name) in kinds:
            kinds[fusion_key(name)].setdefault(kind, []).append(name)
    mixed: dict[tuple[str, str], list[str]] = {}
    for key, found in kinds.items():
        if len(found) > 1:
            said = "; ".join(f"{_leaves(names)}: {kind}" for kind, names in sorted(found.items()))
            reason = f"vLLM serves this as one layer, but its parts are of different kinds ({said})"
            mixed.setdefault((reason, "quantize them alike"), []).append(key)
    yield from one_a_kind(mixed)


def _leaves(names: Sequence[str]) -> str:
    if is_expert(names[0]):
        return f"{names[0].rpartition('.')[2]} of some experts" if len(names) == 1 else f"{len(names)} projections"
    return ", ".join(sorted(name.rpartition(".")[2] for name in names))
