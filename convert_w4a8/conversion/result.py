"""What a conversion did."""

from dataclasses import dataclass

from convert_w4a8.conversion.plan import LayerPlan, Plan
from convert_w4a8.quantization.layer import LayerStats


@dataclass(frozen=True)
class LayerResult:
    """What became of one quantized layer. `stats` is None where it was kept in BF16."""

    plan: LayerPlan
    stats: LayerStats | None


@dataclass(frozen=True)
class Result:
    """A finished conversion: what was done to each layer, bytes read and written, seconds.

    warnings: those that only reading all tensors tells; the plan has others.
    """

    plan: Plan
    layers: tuple[LayerResult, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[tuple[LayerPlan, LayerStats], ...]:
        """The layers that became W4A8, with their statistics."""
        return tuple((layer.plan, layer.stats) for layer in self.layers if layer.stats is not None)
