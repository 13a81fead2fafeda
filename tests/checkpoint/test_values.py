"""NaN and infinities, found in bytes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES
from convert_w4a8.checkpoint.values import not_finite

FLOATS = {name: dtype for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}


@pytest.mark.parametrize("dtype", [dtype for dtype in FLOATS.values() if dtype.itemsize <= 2], ids=str)
def test_every_value_is_what_torch_says(dtype: torch.dtype) -> None:
    """All bit patterns of 8 and 16 bits, alone."""
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    patterns = torch.arange(1 << 8 * dtype.itemsize).to(integers)
    values = patterns.view(dtype).double()
    expected = list(zip(values.isnan().tolist(), values.isinf().int().tolist(), strict=True))
    data = patterns.view(torch.uint8).view(len(patterns), -1)
    assert [not_finite(one, DTYPE_NAMES[dtype]) for one in data] == expected


@pytest.mark.parametrize("name", FLOATS)
@given(data=st.data())
def test_any_values_together(name: str, data: st.DataObject) -> None:
    """Signs, NaN and infinities in any order and number."""
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 3e38, -3e38, 1e-40])
    values = torch.tensor(data.draw(st.lists(special | st.floats(width=32), max_size=9)), dtype=torch.float64)
    tensor = values.to(FLOATS[name])
    wide = tensor.double()
    expected = bool(wide.isnan().any()), int(wide.isinf().sum())
    assert not_finite(tensor.view(torch.uint8), name) == expected


@pytest.mark.parametrize("name", [name for name in TORCH_DTYPES if name not in FLOATS])
def test_integers_are_numbers(name: str) -> None:
    """Whatever their bits."""
    assert not_finite(torch.full((64,), 255, dtype=torch.uint8), name) == (False, 0)
