"""What is kept in BF16 although nobody asked for it, and what is not carried over: a plan's warnings."""

from collections.abc import Iterable

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import is_expert, merged_name
from convert_w4a8.conversion.layers import Kept, LayerPlan
from convert_w4a8.targets.base import DENSE_MULTIPLE, EXPERT_MULTIPLE
from convert_w4a8.text import counted, shortened


def width_warnings(layers: Iterable[LayerPlan]) -> Iterable[str]:
    """Yield which layers are kept in BF16 since vLLM's kernels refuse their sizes on any number of GPUs."""
    wide: dict[str, str] = {}
    experts: list[str] = []
    for layer in layers:
        if layer.kept is not Kept.WIDTH:
            continue
        if is_expert(layer.module):
            experts.append(layer.module)
        else:
            wide.setdefault(merged_name(layer.module), str(layer.dequantize).rpartition(": ")[2])
    if wide:
        yield (
            f"{counted(len(wide), 'layer')} of a width that is no multiple of {DENSE_MULTIPLE}, which vLLM's kernel"
            f" needs: {next(iter(wide.values()))}; kept in BF16"
        )
    if experts:
        yield (
            f"{counted(len(experts), 'expert layer')} of a size that is no multiple of {EXPERT_MULTIPLE}, which vLLM's"
            f" kernel needs: {experts[0]}; kept in BF16"
        )


def left_out_warnings(checkpoint: Checkpoint) -> Iterable[str]:
    """Yield what of the input is neither read nor copied."""
    if checkpoint.left_out:
        yield f"not carried over: {shortened(checkpoint.left_out)}"
