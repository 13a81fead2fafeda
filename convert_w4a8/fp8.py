"""FP8 E4M3: its numbers, and rounding to them."""

import torch

E4M3 = torch.float8_e4m3fn


E4M3_MAX = 448.0


E4M3_NAN = 0x7F
"""The bits of NaN without the sign. There are no infinities."""


CODE_MAX = 8
"""The largest magnitude of a code: that of minus eight."""


SCALE_MAX = E4M3_MAX / CODE_MAX
"""The largest FP8 group scale: 8·56 = 448."""


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest float8_e4m3fn (ties to even), saturating at ±448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
