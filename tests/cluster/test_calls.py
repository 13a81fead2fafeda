"""Calibration with data on a cluster: matrices and experts go to nodes, and the bytes stay the same."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from ray_nodes import Nodes, digests
from tiny_models import samples_of, write_llama, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.cluster import connection
from convert_w4a8.cluster.connection import Cluster
from convert_w4a8.cluster.tensors import packed, unpacked

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@needs_ray
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", ["fast", "full"])
@pytest.mark.parametrize("write", [write_llama, write_qwen3_moe])
def test_calibration_on_a_cluster(
    nodes: Nodes, write: Callable[..., Path], preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data, matrices and experts are quantized on nodes, to the same bytes."""
    cluster = Cluster(nodes.ray)
    monkeypatch.setattr(connection, "connect", lambda _address: nullcontext(cluster))
    model = write(tmp_path / "in", layers=1)
    tables = "scale" if preset == "fast" else "free"
    options = QuantizeOptions(preset=preset, tables=tables)  # type: ignore[arg-type]
    samples = samples_of([200, 150, 200], masked=[10, 0, 20])
    api.quantize(model, tmp_path / "here", options, samples=samples, device="cpu")
    assert cluster.ran == []
    api.quantize(model, tmp_path / "there", options, samples=samples, ray="auto", device="cpu")
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
    assert cluster.ran


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(2, 0, 1).view(torch.float8_e4m3fn),
        torch.arange(12.0).view(3, 4)[:, 1:3].bfloat16(),
    ],
    ids=str,
)
def test_tensors_travel_as_they_lie_in_memory(value: torch.Tensor) -> None:
    """Bytes, dtype, shape and the order of dimensions are kept."""
    (found,) = unpacked(packed([value]), torch.device("cpu"))
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert found.contiguous().view(-1).view(torch.uint8).equal(value.contiguous().view(-1).view(torch.uint8))
    order = sorted(range(value.dim()), key=value.stride)
    assert sorted(range(value.dim()), key=found.stride) == order
