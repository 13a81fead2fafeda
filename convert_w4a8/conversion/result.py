"""What a conversion did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convert_w4a8.conversion.plan import LayerPlan, Plan
from convert_w4a8.quantization.layer import LayerStats


@dataclass(frozen=True)
class LayerResult:
    """What became of one quantized layer. `stats` is None where it was kept in BF16.

    notes: what else was noted of it, as JSON.
    """

    plan: LayerPlan
    stats: LayerStats | None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How codes and tables were chosen, where it was not by the options' scales alone.

    name: in a few words. sentence: for the model card. rows: name and value, for its table.
    command: by which it is done, with MODEL and OUT. record: what the output's config.json says of it, as JSON.
    """

    name: str
    sentence: str
    rows: tuple[tuple[str, str], ...]
    command: str
    record: Mapping[str, Any]


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
