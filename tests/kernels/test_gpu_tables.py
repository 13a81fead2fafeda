"""Triton's table expansion against the reference: interpreted without a GPU, compiled with one."""

import importlib
from collections.abc import Callable

import pytest
import torch
from paths import GOLDEN_CUT
from safetensors.torch import load_file

from convert_w4a8.kernels.tables import reference

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.tables.gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_tables_have_the_bytes_of_vllm(case: str) -> None:
    """The same vectors that pin the reference."""
    vectors = load_file(GOLDEN_CUT)
    scale = vectors[f"{case}.fp8_group_scale"].t().contiguous().view(torch.float8_e4m3fn)
    entries = KERNELS.expand_tables(scale.to(DEVICE))
    assert torch.equal(entries.cpu().view(torch.uint8).flatten(), vectors[f"{case}.lut_scale_bytes"])


def test_every_scale_byte_expands_like_its_reference() -> None:
    """All 256, NaN and products beyond 448 too."""
    scale = torch.arange(256, dtype=torch.uint8).view(4, 64).view(torch.float8_e4m3fn)
    found = KERNELS.expand_tables(scale.to(DEVICE))
    assert found.shape == (4, 64, 8)
    assert torch.equal(found.cpu().view(torch.uint8), reference.expand_tables(scale).view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (1, 1024), (5, 413)], ids=str)
def test_tables_of_odd_sizes(shape: tuple[int, int], assert_untouched: Callable[[], None]) -> None:
    """Counts that are no multiple of a block; a transposed scale is read in its logical order."""
    data = (torch.arange(shape[0] * shape[1]) * 37 % 256).to(torch.uint8).view(shape[::-1])
    found = KERNELS.expand_tables(data.to(DEVICE).view(torch.float8_e4m3fn).t())
    assert_untouched()
    expected = reference.expand_tables(data.view(torch.float8_e4m3fn).t())
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))
