"""Calibration with data on a cluster: matrices and experts go to nodes, and the bytes stay the same."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
import torch
from ray_nodes import Nodes, digests
from ray_stand_in import GB, Held
from tiny_models import samples_of, write_llama, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.cluster import connection
from convert_w4a8.cluster.calls import CallsOnCluster
from convert_w4a8.cluster.nodes import Cluster, Node
from convert_w4a8.cluster.shards import PROCESS_BYTES
from convert_w4a8.cluster.tensors import _on_host, packed, unpacked
from convert_w4a8.errors import ConvertError

ASKED: list[Any] = []
"""What others were asked."""
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


def when_others_are_asked(name: str) -> str:
    """Return a name when others were asked for something."""
    while not ASKED:
        time.sleep(0.01)
    return name


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


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_lost_are_made_again(nodes: Nodes) -> None:
    """In order, here and there; what a call raises is raised, with the node."""
    for path in Path(os.environ[ray_nodes.MARKS]).iterdir():
        path.unlink()
    cluster = Cluster(nodes.ray)
    calls = CallsOnCluster(cluster, "cpu")
    found = calls(ray_nodes.doubled, ((f"call {n}", torch.tensor([float(n)]), os.getpid()) for n in range(9)))
    assert [each.item() for each in found] == [2.0 * n for n in range(9)]
    assert cluster.ran
    assert {ran.attempts for ran in cluster.ran} == {2}
    assert list(calls(ray_nodes.doubled, [])) == []
    with pytest.raises(ConvertError, match="refused: is refused") as error:
        list(calls(ray_nodes.doubled, [("first", torch.ones(1), os.getpid()), ("refused", torch.ones(1), os.getpid())]))
    assert "on node" in "".join(error.value.__notes__)


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_an_error_here_does_not_wait_for_others(nodes: Nodes) -> None:
    """Nobody needs what they do."""
    for path in Path(os.environ[ray_nodes.MARKS]).iterdir():
        path.unlink()
    calls = CallsOnCluster(Cluster(nodes.ray), "cpu")
    started = time.monotonic()
    with pytest.raises(ConvertError, match="here: is refused"):
        list(calls(ray_nodes.long_elsewhere, [("there", os.getpid()), ("here", os.getpid())]))
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("cpus", "local", "gigabytes", "slots", "reserved"),
    [
        ((4,), False, 2, 0, True),
        ((4,), True, 2, 0, False),
        ((4, 8), False, 2, 2, True),
        ((8,), True, 2, 1, True),
        ((6,), False, 2, 1, True),  # of two threads then
        ((8,), True, 63.5, 0, False),
        ((8,), True, 65, 0, False),  # more than there is
        ((4, 8), False, 65, 2, False),
    ],
    ids=str,
)
def test_what_the_command_needs_is_its_own(
    cpus: tuple[int, ...], local: bool, gigabytes: float, slots: int, reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs, as many as torch has threads, and memory; calls go to what is left, and are made here if that is all."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    nodes = [Node(letter * 9, "10.0.0.1", count, 0, 64 * GB) for letter, count in zip("ab", cpus, strict=False)]
    cluster = Held([{"value": packed("there")}] * 2, nodes, local=local)
    calls = CallsOnCluster(cluster, "cpu")  # type: ignore[arg-type]
    calls.hold(int(gigabytes * GB))
    assert calls._slots() == slots
    assert cluster.happened == [("reserved", 4, gigabytes * GB)] * reserved
    monkeypatch.setattr(sys.modules[__name__], "ASKED", cluster.asked if slots else [None])
    found = list(calls(when_others_are_asked, [("here",), ("here",)]))
    assert found == ["here", "there" if slots else "here"]
    assert len(cluster.asked) == bool(slots)
    assert all(asked["memory"] > PROCESS_BYTES for asked in cluster.asked)


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_memory_beside_a_gpu_is_reserved(nodes: Nodes) -> None:
    """Without CPUs; where it is not free, the command does without."""
    cluster = Cluster(nodes.ray)
    give_back = cluster.reserve(0, 1 << 20, 10)
    assert give_back is not None
    give_back()
    assert cluster.reserve(0, 1 << 50, 1) is None


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


@pytest.mark.parametrize("locks", [True, False])
def test_tensors_of_a_gpu_are_packed_into_one_piece(locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of locked memory, if the host locks any, one behind the other; those of the host stay where they are."""
    real, sizes = torch.empty, list[int]()

    class OnGpu(torch.Tensor):
        is_cuda = True

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory and not locks:
            raise RuntimeError("CUDA error: out of memory")
        assert pin_memory is locks
        sizes.append(size)
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    numbers = [torch.arange(count, dtype=torch.uint8) for count in (5, 0, 3, 7)]
    found = _on_host([part if part is numbers[2] else part.as_subclass(OnGpu) for part in numbers])
    assert sizes == [12]
    assert [part.tolist() for part in found] == [part.tolist() for part in numbers]
    assert found[2] is numbers[2]
    assert found[3].data_ptr() == found[0].data_ptr() + 5
