"""What a task asks a node for, and how far all of them are: arithmetic, without Ray."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoint_edits import write_case
from paths import ROOT
from tiny_models import write_llama

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster.access import path_on
from convert_w4a8.cluster.attempts import Attempts, Bars
from convert_w4a8.cluster.nodes import Cluster, Node
from convert_w4a8.cluster.shards import PROCESS_BYTES, ShardsOnCluster, device_here, threads_of
from convert_w4a8.conversion.jobs import MEMORY_BYTES
from convert_w4a8.conversion.layer import layer_memory
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.shard import ShardTask, shard_tasks
from convert_w4a8.errors import ClusterError, ConvertError, DiskError
from convert_w4a8.options import Options

NOBODY = cast("Cluster", None)


def node(cpus: float, gpus: float = 0) -> Node:
    """Return a node."""
    return Node("0", "10.0.0.1", cpus, gpus, 10**10)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[ShardTask]:
    """Return tasks of small files, which layers straddle."""
    source = write_case("awq-mixtral-w1-w2-w3", tmp_path_factory.mktemp("sizes") / "in").path
    return shard_tasks(make_plan(open_checkpoint(source), Options(max_shard_size=60_000)))


def test_no_room_for_an_attempt_is_the_disks_fault(tasks: list[ShardTask], tmp_path: Path) -> None:
    """In one line, after which `--resume` continues."""
    (tmp_path / "states").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        Attempts(tmp_path / "states", Bars(tasks, tasks, lambda _nbytes: None)).make(tasks[0], 0)


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [((1,), 1), ((2,), 2), ((2, 2), 2), ((3,), 3), ((4,), 4), ((6,), 3), ((8, 8), 4), ((0, 16), 4), ((5,), 1), ((), 4)],
)
def test_few_cpus_stay_idle(cpus: tuple[int, ...], expected: int) -> None:
    """The largest number of threads up to four that leaves the fewest; or what somebody asks for."""
    nodes = [node(count) for count in cpus]
    assert threads_of(nodes, None) == expected
    assert threads_of(nodes, 7) == 7


def test_memory_is_that_of_layers_side_by_side(tasks: list[ShardTask]) -> None:
    """As `run_jobs` lets them, or of the largest one; with what a process takes."""
    write = ShardsOnCluster(NOBODY)
    for task in tasks:
        layers = [layer_memory(layer) for layer in task.layers]
        assert sum(layers) < MEMORY_BYTES
        assert write._memory(task) == PROCESS_BYTES + sum(layers)
    heavy = ShardsOnCluster(NOBODY, bytes_per_weight=1 << 16)
    task = max(tasks, key=lambda task: len(task.layers))
    specs = [layer.spec for layer in task.layers]
    largest = max(spec.nbytes + (spec.out_features * spec.in_features << 16) for spec in specs)
    assert largest > MEMORY_BYTES
    assert heavy._memory(task) == PROCESS_BYTES + largest


MEASURE = """
import sys
from pathlib import Path
import torch
from convert_w4a8.calibration.matrix import BYTES_PER_WEIGHT
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization
from convert_w4a8.calibration.run import quantize_shard
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster.shards import ShardsOnCluster
from convert_w4a8.conversion.jobs import use_workers
from convert_w4a8.conversion.shard import shard_tasks

model, out, workers = sys.argv[1:]
(task,) = shard_tasks(plan_quantization(open_checkpoint(Path(model)), QuantizeOptions()))
with use_workers(int(workers)):
    quantize_shard(task, Path(out), torch.device("cpu"), lambda _nbytes: None)
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
said = ShardsOnCluster(None, bytes_per_weight=BYTES_PER_WEIGHT)._memory(task)
print(1024 * int(lines["VmHWM"].split()[0]), said)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure the memory of a process")
def test_a_worker_takes_no_more_than_is_said(tmp_path: Path) -> None:
    """The most that a process of its own had, with all that it imports and compiles; and not much less."""
    (tmp_path / "model").mkdir()
    model = write_llama(tmp_path / "model", layers=1, hidden_size=1024, intermediate_size=8192)
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path), "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    took, said = map(int, result.stdout.split())
    assert took <= said <= 3 * took


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 2, ("cuda", 1)), ("cuda", 2, ("cuda", 1)), ("cpu", 2, ("cpu", 0)), ("auto", 0, ("cpu", 0))],
)
def test_gpus_are_asked_for(device: str, gpus: int, expected: tuple[str, int]) -> None:
    """One a task, where there are any and nobody wants to do without."""
    assert ShardsOnCluster(NOBODY, device=device)._device_on([node(4), node(4, gpus)]) == expected


class Gpus:
    """A cluster, of whose nodes it is known which GPUs they have."""

    def __init__(self, found: dict[str, list[str]]) -> None:
        self._found = found

    def expected_nodes(self) -> list[Node]:
        """Return nodes."""
        return self.nodes()

    def nodes(self) -> list[Node]:
        """Return nodes."""
        return [Node(name, name, 4, len(gpus), 10**10) for name, gpus in self._found.items()]

    def gpus(self) -> dict[str, list[str]]:
        """Return what nodes with GPUs have."""
        return {name: gpus for name, gpus in self._found.items() if gpus}


@pytest.mark.parametrize(
    ("device", "found", "expected"),
    [
        ("auto", {"a": [], "b": []}, "cpu"),
        ("cpu", {"a": ["NVIDIA H100"], "b": ["NVIDIA H200"]}, "cpu"),
        ("auto", {"a": [], "b": ["NVIDIA H100"] * 2, "c": ["NVIDIA H100"]}, "cuda (NVIDIA H100)"),
        ("cuda", {"a": ["NVIDIA H100"], "b": ["NVIDIA H200"]}, None),
        ("auto", {"a": ["NVIDIA H100", "NVIDIA L4"]}, None),
    ],
)
def test_one_kind_of_device_quantizes(device: str, found: dict[str, list[str]], expected: str | None) -> None:
    """GPUs of several kinds are refused, and each node's are named: their codes and tables differ."""
    write = ShardsOnCluster(cast("Cluster", Gpus(found)), device=device)
    if expected is not None:
        assert write.kind_of_device() == expected
        assert write.device_type == expected.partition(" ")[0]
        return
    with pytest.raises(ClusterError, match=r"GPUs of several kinds.*a: NVIDIA H100") as caught:
        write.kind_of_device()
    assert all(name in str(caught.value) for name in found)


def test_a_device_of_a_node_that_cannot_be_used() -> None:
    """Is the node's fault, after which `--resume` continues: no such GPU, none that works, or another kind."""
    assert device_here("cpu", None) == device_here("cpu", "cpu") == torch.device("cpu")
    with pytest.raises(ClusterError, match="cannot be used on this node"):
        device_here("cuda:99", None)
    with pytest.raises(ClusterError, match=r"is cpu on this node, not cuda \(NVIDIA H100\)"):
        device_here("cpu", "cuda (NVIDIA H100)")


def test_a_gpu_by_number_is_refused() -> None:
    """Ray gives tasks theirs."""
    with pytest.raises(ConvertError, match="does not go with --ray"):
        ShardsOnCluster(NOBODY, device="cuda:1")


@pytest.mark.parametrize("wanted", [slice(None), slice(3, None), slice(0, 0)], ids=["all", "some", "none"])
def test_every_byte_counts_once(wanted: slice, tasks: list[ShardTask]) -> None:
    """Though layers lie in several files, and attempts begin again."""
    seen: list[int] = []
    bars = Bars(tasks, tasks[wanted], seen.append)
    for task in tasks[wanted]:
        for done in (1, 10**4, 10**3, 10**9, 0):
            before = sum(seen)
            bars.reach(task.shard.file_name, done)
            assert sum(seen) >= before
        bars.finish(task.shard.file_name)
        bars.finish(task.shard.file_name)
    layers: dict[str, Any] = {layer.module: layer.spec.nbytes for task in tasks for layer in task.layers}
    copied = sum(tensor.info.nbytes for task in tasks for tensor in task.tensors)
    assert sum(seen) == sum(layers.values()) + copied


def test_results_of_a_path_that_is_relative(tmp_path: Path) -> None:
    """Are not asked for on nodes: commands make paths absolute, where Ray is used."""
    assert path_on(None, Path("in")) == Path("in")
    assert path_on("local", Path("in")).is_absolute()
    assert path_on("local", tmp_path) == tmp_path
