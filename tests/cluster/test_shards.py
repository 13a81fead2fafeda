"""Conversions on clusters of real processes: the bytes of a local one, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
import torch
from checkpoint_edits import edit_tensors, snapshot, write_case
from ray_nodes import Nodes, digests

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.cluster.nodes import Cluster
from convert_w4a8.cluster.record import as_dict, as_text
from convert_w4a8.cluster.shards import Convert, ShardsOnCluster
from convert_w4a8.cluster.tasks import Runner, Task
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.conversion.shard import convert_shard
from convert_w4a8.errors import ClusterError, ConvertError, W4A8Error
from convert_w4a8.options import Options

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
CPU = torch.device("cpu")
SMALL = 400_000
"""Bytes of an output file."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint that becomes a dozen of files."""
    return write_case("awq-mixtral-w1-w2-w3", tmp_path_factory.mktemp("cluster") / "in").path


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the digests of a local conversion."""
    out = tmp_path_factory.mktemp("local") / "out"
    checkpoint = open_checkpoint(source)
    carry_out(checkpoint, make_plan(checkpoint, Options(max_shard_size=SMALL)), out, device=CPU)
    found = digests(out)
    assert len(found) > 8
    return found


def convert(
    source: Path,
    out: Path,
    nodes: Nodes,
    function: Convert = convert_shard,
    *,
    resume: bool = False,
    progress: Callable[[int], None] = lambda _nbytes: None,
    **keywords: Any,
) -> Cluster:
    """Convert on a cluster with a thread a task; return what knows what ran where."""
    for path in Path(os.environ[ray_nodes.MARKS]).iterdir():
        path.unlink()
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(max_shard_size=SMALL))
    cluster = Cluster(nodes.ray)
    write = ShardsOnCluster(cluster, device="cpu", workers=1, function=function, progress=progress, **keywords)
    carry_out(checkpoint, plan, out, device=CPU, resume=resume, progress=progress, write=write)
    return cluster


def finished(out: Path) -> int:
    """Return how many files the journal of an interrupted conversion has."""
    journal = work_path(out) / "journal"
    return journal.read_bytes().count(b'{"file"') if journal.exists() else 0


def test_four_workers_on_two_nodes(source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path) -> None:
    """Give the bytes of a local conversion; what ran where is known, and nothing is left."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    cluster = convert(source, tmp_path / "out", nodes, ray_nodes.beside_another, progress=seen.append)
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sum(seen) == open_checkpoint(source).nbytes
    assert sorted(ran.task for ran in cluster.ran) == [name for name in sorted(expected) if "safetensors" in name][:-1]
    assert {ran.attempts for ran in cluster.ran} == {1}
    said = as_dict(cluster.ran)
    assert len(said["nodes"]) == 2
    assert sum(node["tasks"] for node in said["nodes"].values()) == len(said["tasks"]) == len(cluster.ran)
    assert as_text(cluster.ran).startswith("ray ")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_is_killed_once(source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path) -> None:
    """In the middle of a file: it is begun again elsewhere, and what was half-written is nowhere."""
    seen: list[int] = []
    cluster = convert(source, tmp_path / "out", nodes, ray_nodes.killed_once, progress=seen.append)
    assert digests(tmp_path / "out") == expected
    assert {ran.task[:11]: ran.attempts for ran in cluster.ran if ran.attempts > 1} == {"model-00002": 2}
    assert sum(seen) == open_checkpoint(source).nbytes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_task_that_is_always_killed(source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path) -> None:
    """Is given up after some attempts, in one line; what is finished is kept."""
    with pytest.raises(ClusterError, match="was begun 4 times and lost each time") as caught:
        convert(source, tmp_path / "out", nodes, ray_nodes.killed)
    assert "\n" not in str(caught.value)
    assert "its process was killed" in str(caught.value)
    assert "--resume continues from there" in caught.value.__notes__[0]
    assert finished(tmp_path / "out") > 0
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", nodes, resume=True)
    assert digests(tmp_path / "out") == expected


def test_a_slow_task_is_begun_a_second_time(
    source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    """On the other node, when nothing else is left to do; the slow one is killed."""
    started = time.monotonic()
    cluster = convert(source, tmp_path / "out", nodes, ray_nodes.stuck_once, patience=1.0)
    assert digests(tmp_path / "out") == expected
    assert next(ran.attempts for ran in cluster.ran if ran.task.startswith("model-00003-")) == 2
    assert time.monotonic() - started < 60


def test_a_damaged_input_is_one_line(nodes: Nodes, tmp_path: Path) -> None:
    """As it is without Ray, with the node that found it; nothing is left."""
    path = write_case("gptq-v1", tmp_path / "in").path
    name = "model.layers.0.mlp.down_proj.scales"
    edit_tensors(path, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(ConvertError, match=name) as caught:
        convert(path, tmp_path / "out", nodes)
    assert not isinstance(caught.value, ClusterError)
    assert any(note.startswith("on node ") for note in caught.value.__notes__)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_local_conversion_is_continued_on_a_cluster(
    source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    """Only what is missing is done there."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(max_shard_size=SMALL))
    before = snapshot(source)

    def interrupted(tasks: Any, writer: Any) -> None:
        for task in tasks[:3]:
            result = convert_shard(task, writer.directory, CPU)
            writer.note(result.file_name, result.pieces, result.notes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(checkpoint, plan, tmp_path / "out", device=CPU, write=interrupted)
    seen: list[int] = []
    cluster = convert(source, tmp_path / "out", nodes, resume=True, progress=seen.append)
    assert digests(tmp_path / "out") == expected
    assert len(cluster.ran) == len(plan.shards) - 3
    assert sum(seen) == checkpoint.nbytes
    assert snapshot(source) == before


def test_a_killed_driver_is_continued_without_a_cluster(
    source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    """What was finished is kept; workers of the dead driver end, and write nothing any more that counts."""
    arguments = [source, tmp_path / "out", nodes.cluster.address, SMALL]
    driver = subprocess.Popen(
        [sys.executable, "-P", "-c", "import ray_nodes; ray_nodes.main()", *map(str, arguments)],
        stderr=subprocess.PIPE,
        env=os.environ,
    )
    try:
        while finished(tmp_path / "out") < 2:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.communicate()
    count = finished(tmp_path / "out")
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Options(max_shard_size=SMALL))
    assert 2 <= count < len(plan.shards)
    assert not (tmp_path / "out").exists()
    carry_out(checkpoint, plan, tmp_path / "out", device=CPU, resume=True)
    assert digests(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_node_is_killed_half_way(
    source: Path, expected: dict[str, str], nodes: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Others do its work. It is a third node, so that the two are there for other tests. Ray prints nothing of it."""
    before = {node.id for node in Cluster(nodes.ray).nodes()}
    node = ray_nodes.add_node(nodes.cluster, 2)
    (new,) = {node.id for node in Cluster(nodes.ray).nodes()} - before

    def kill() -> None:
        deadline = time.monotonic() + 100
        while not ray_nodes.marks(f"begun-{new}") and time.monotonic() < deadline:
            time.sleep(0.02)
        ray_nodes.kill_node(node)

    killer = threading.Thread(target=kill)
    killer.start()
    cluster = convert(source, tmp_path / "out", nodes, ray_nodes.slow)
    killer.join()
    assert digests(tmp_path / "out") == expected
    assert capfd.readouterr() == ("", "")
    lost = ray_nodes.marks(f"begun-{new}")
    assert lost
    assert sum(ran.attempts - 1 for ran in cluster.ran) >= len(lost)
    assert cluster.name(new) not in {ran.node for ran in cluster.ran}


def test_a_node_with_another_version_is_named(source: Path, nodes: Nodes, tmp_path: Path) -> None:
    """Nothing is written."""
    other = tmp_path / "other" / "convert_w4a8"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (other / "version.py").write_text('__version__ = "0.0.7"\n')
    node = ray_nodes.add_node(nodes.cluster, 1, env_vars={"PYTHONPATH": str(other.parent)})
    try:
        with pytest.raises(ClusterError, match=r"node [\d.]+ \(\w+\): has w4a8-convert 0\.0\.7, here is"):
            convert(source, tmp_path / "out", nodes)
    finally:
        nodes.cluster.remove_node(node)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_task_takes_the_gpu_that_it_is_given(nodes: Nodes) -> None:
    """Whichever one its process had before. Ray is told of two that are not there."""
    node = ray_nodes.add_node(nodes.cluster, 2, num_gpus=2, env_vars={"CUDA_VISIBLE_DEVICES": "4,7"})
    try:
        calls = [
            Task(f"{number}", ray_nodes.gpu_for_a_while, lambda _number: (), cpus=1, memory=1 << 20, gpus=1)
            for number in range(6)
        ]
        found = [value for _, _, value in Runner(Cluster(nodes.ray)).run(calls)]
        assert {device for device, _, _ in found} == {"cuda:0", "cuda:1"}
        assert {visible for _, visible, _ in found} == {"4,7"}
        assert len({process for _, _, process in found}) < 6
        with pytest.raises(ClusterError, match="has GPUs for Ray, but none that torch can use"):
            ShardsOnCluster(Cluster(nodes.ray)).kind_of_device()
    finally:
        nodes.cluster.remove_node(node)


def test_what_fits_nowhere_is_refused(source: Path, nodes: Nodes, tmp_path: Path) -> None:
    """Ray would wait for ever."""
    with pytest.raises(ClusterError, match=r"needs 1 CPU, .* of memory; the largest node offers 2 CPUs, 8.59 GB"):
        convert(source, tmp_path / "out", nodes, bytes_per_weight=1 << 20)
    cluster = Cluster(nodes.ray)
    with pytest.raises(W4A8Error, match="no node of the cluster has a GPU"):
        ShardsOnCluster(cluster, device="cuda")._device_on(cluster.nodes())
    assert list(tmp_path.iterdir()) == []


KILLED = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("signal_number", [None, *KILLED])
def test_a_local_ray_leaves_no_process(
    signal_number: int | None, source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Whether the command ends, is asked to, or is killed. Ray itself prints nothing; what is finished is kept.

    And modules in the working directory are run by no process.
    """
    for name in ("torch", "ray", "numpy", "convert_w4a8", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('RUN', 'a')\nraise SystemExit('run')\n")
    started = f"W4A8_TEST_OF={tmp_path}"
    command = [sys.executable, "-P", "-m", "convert_w4a8", "convert", source, "out"]
    options = ["--max-shard-size", SMALL, "--device", "cpu", "--workers", 1, "--json", "--ray"]
    with subprocess.Popen(
        [*map(str, command + options)],
        cwd=tmp_path,
        env={**os.environ, "W4A8_TEST_OF": str(tmp_path), "PYTHONPATH": ray_nodes.python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if signal_number is not None:
            while finished(tmp_path / "out") < 1:
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            process.send_signal(signal_number)
        stdout, stderr = process.communicate()
    if signal_number is None:
        assert (process.returncode, stderr) == (0, "")
        assert len(json.loads(stdout)["ray"]["tasks"]) == sum("safetensors" in name for name in expected) - 1
        assert digests(tmp_path / "out") == expected
    elif signal_number == signal.SIGTERM and process.returncode:  # else it was done before
        assert process.returncode == 128 + signal.SIGTERM, stderr
        assert "--resume continues from there" in stderr
        assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "RUN").exists()
    deadline = time.monotonic() + 20
    while left := [pid for pid in Path("/proc").glob("[0-9]*") if started in environment(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    if process.returncode:
        assert finished(tmp_path / "out") > 0
        checkpoint = open_checkpoint(source)
        plan = make_plan(checkpoint, Options(max_shard_size=SMALL))
        carry_out(checkpoint, plan, tmp_path / "out", device=CPU, resume=True)
        assert digests(tmp_path / "out") == expected


def environment(process: Path) -> str:
    """Return the environment of a process; "" where it is gone."""
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""
