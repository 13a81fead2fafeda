"""What a task asks a node for, and how far all of them are: arithmetic, without Ray."""

from pathlib import Path
from typing import Any, cast

import pytest
from checkpoint_edits import write_case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster.connection import Cluster, Node
from convert_w4a8.cluster.shards import PROCESS_BYTES, ShardsOnCluster, _Bars, threads_of
from convert_w4a8.conversion.jobs import MEMORY_BYTES
from convert_w4a8.conversion.layer import layer_memory
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.shard import ShardTask, shard_tasks
from convert_w4a8.errors import ConvertError
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


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 2, ("cuda", 1)), ("cuda", 2, ("cuda", 1)), ("cpu", 2, ("cpu", 0)), ("auto", 0, ("cpu", 0))],
)
def test_gpus_are_asked_for(device: str, gpus: int, expected: tuple[str, int]) -> None:
    """One a task, where there are any and nobody wants to do without."""
    assert ShardsOnCluster(NOBODY, device=device)._device_on([node(4), node(4, gpus)]) == expected


def test_a_gpu_by_number_is_refused() -> None:
    """Ray gives tasks theirs."""
    with pytest.raises(ConvertError, match="does not go with --ray"):
        ShardsOnCluster(NOBODY, device="cuda:1")


@pytest.mark.parametrize("wanted", [slice(None), slice(3, None), slice(0, 0)], ids=["all", "some", "none"])
def test_every_byte_counts_once(wanted: slice, tasks: list[ShardTask]) -> None:
    """Though layers lie in several files, and attempts begin again."""
    seen: list[int] = []
    bars = _Bars(tasks, tasks[wanted], seen.append)
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
    from convert_w4a8.cli.ray import path_on

    assert path_on(None, Path("in")) == Path("in")
    assert path_on("local", Path("in")).is_absolute()
    assert path_on("local", tmp_path) == tmp_path
