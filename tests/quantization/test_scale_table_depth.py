"""How far down the table of relative errors has to reach: groups octaves below their channel's largest still count."""

import pytest
import torch

from convert_w4a8.quantization import scale_search
from convert_w4a8.quantization.envelope import error_table, magnitude_frequencies

GROUPS = 4096
CHANNELS = 16


def best_noise(scales: torch.Tensor) -> torch.Tensor:
    """Return the least noise that any candidate of the channel scale gives, float64 [N], each tried in full."""
    table = error_table(magnitude_frequencies(torch.ones(16, dtype=torch.float64) / 16))
    candidates = scale_search._scale_candidates(scale_search._TOP, scale_search._STEPS, scales.device)
    found = []
    for x in candidates[: scale_search._STEPS]:
        channel = scales.amax(dim=0) / x
        bits = table.best(scales / channel)
        found.append(scale_search.table_noise(scales, scale_search._signed(bits, scales), channel, table))
    return torch.stack(found).amin(dim=0)


@pytest.mark.parametrize("octaves", [1, 2, 3, 4, 4.5])
def test_groups_far_below_the_largest_decide_too(octaves: float) -> None:
    """One large group, and thousands a few octaves below it which together weigh more: theirs is the best scale."""
    generator = torch.Generator().manual_seed(int(octaves * 10))
    exponents = torch.rand(GROUPS, CHANNELS, generator=generator) * 0.3 + octaves
    scales = torch.exp2(-exponents - torch.rand(CHANNELS, generator=generator) * 3)
    scales[0] = scales.amax(dim=0) * 2.0**octaves
    table = error_table(magnitude_frequencies(torch.ones(16, dtype=torch.float64) / 16))
    chosen = scale_search.quantize_search(scales, table)
    assert (chosen.noise <= best_noise(scales) * 1.02).all()
