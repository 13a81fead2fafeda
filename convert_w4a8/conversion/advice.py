"""Warnings: what converts, but cannot be served as it is, what is not carried over, and infinities."""

from collections.abc import Iterable, Mapping

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import is_expert, merged_name
from convert_w4a8.sources import LayerSpec
from convert_w4a8.text import counted

_LISTED = 6


def size_warnings(layers: Iterable[tuple[str, LayerSpec]]) -> Iterable[str]:
    """Yield what converts, but cannot be served: layers (name in the output, spec) of a size that vLLM refuses."""
    merged: dict[str, int] = {}
    experts = []
    for module, spec in layers:
        if not is_expert(module):
            name = merged_name(module)
            merged[name] = merged.get(name, 0) + spec.out_features
        elif spec.out_features % 256 or spec.in_features % 256:
            experts.append(module)
    wide = {name: width for name, width in merged.items() if width % 128}
    if wide:
        name, width = next(iter(wide.items()))
        yield (
            f"{counted(len(wide), 'layer')} of a width that is no multiple of 128, which vLLM's kernel needs:"
            f" {name} has N = {width}"
        )
    if experts:
        yield (
            f"{counted(len(experts), 'expert layer')} of a size that is no multiple of 256, which vLLM's kernel needs:"
            f" {experts[0]}"
        )


def left_out_warnings(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what of the input is neither read nor copied."""
    if checkpoint.left_out:
        listed = ", ".join(checkpoint.left_out[:_LISTED])
        more = len(checkpoint.left_out) - _LISTED
        yield f"not carried over: {listed}" + (f" and {more} more" if more > 0 else "")


def infinity_warnings(infinities: Mapping[str, int]) -> tuple[str, ...]:
    """Return what there is to say of tensors that hold so many infinities, by name."""
    if not infinities:
        return ()
    name, count = next(iter(infinities.items()))
    values = "an infinity" if count == 1 else f"{count:,} infinities"
    others = len(infinities) - 1
    more = f", and {counted(others, 'other tensor')} too" if others else ""
    return (f"{name} holds {values}{more}: as a mask may, but a weight may not",)
