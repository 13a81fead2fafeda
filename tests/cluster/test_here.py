"""The process of the command as one that carries out tasks: beside nodes, alone, and with a Ray that is not needed."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import ray_nodes
import torch
from checkpoint_edits import write_case
from ray_stand_in import GB, LOST, Dropped, Held, task

from convert_w4a8.api import convert
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.cluster import connection, nodes
from convert_w4a8.cluster.attempts import Attempts, Bars
from convert_w4a8.cluster.here import Here
from convert_w4a8.cluster.local import LocalRay
from convert_w4a8.cluster.nodes import Node
from convert_w4a8.cluster.tasks import Runner, Task
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.conversion.shard import convert_shard
from convert_w4a8.errors import ClusterError, ConvertError
from convert_w4a8.options import Options

NODE = Node("a" * 9, "10.0.0.1", 4, 0, 8 * GB)
SMALL = 400_000


def ours(name: str, function: Callable[..., Any], **keywords: Any) -> Task:
    """Return a task that this process may carry out by a function."""
    return Task(name, len, lambda number: (number,), **{"cpus": 1, "memory": GB, "here": function, **keywords})


def run(cluster: Any, *tasks: Task, check: Callable[[], None] = lambda: None, **keywords: Any) -> list[tuple[str, Any]]:
    """Carry out tasks, here, too, with a CPU and a gigabyte; return their names and results."""
    here = Here.on(cluster, 1, GB)
    assert here is not None
    return [(each.name, value) for each, _, value in Runner(cluster, here=here, **keywords).run(tasks, check)]


@pytest.mark.parametrize("local", [False, True])
def test_alone(local: bool) -> None:
    """Where a node has room for one, this process is it: nothing is sent, and no other Ray is asked for CPUs."""
    cluster = Held([], [Node("" if local else NODE.id, "10.0.0.1", 1, 0, 8 * GB)], local=local)
    found = run(cluster, ours("a", lambda number: number + 7), ours("b", lambda number: number + 8))
    assert found == [("a", 7), ("b", 8)]
    assert cluster.asked == []
    assert [ran.by_command for ran in cluster.ran] == [True, True]
    assert cluster.happened == ([] if local else [("reserved", 1, GB), "given back"])


def test_beside_others() -> None:
    """So many are sent as there is room for beside this process, and the rest it does itself."""
    release = threading.Event()

    def wait(_number: int) -> str:
        assert release.wait(10)
        return "here"

    cluster = Held([{"value": "there"}, {"value": "there"}, None], [Node(NODE.id, "10.0.0.1", 3, 0, 8 * GB)])
    tasks = Runner(cluster, here=Here.on(cluster, 1, GB)).run([ours(name, wait) for name in "abcd"])  # type: ignore[arg-type]
    assert next(tasks)[2] == next(tasks)[2] == "there"
    assert len(cluster.asked) == 3
    assert cluster.happened == [("reserved", 1, GB)]
    cluster.outcomes[2] = {"value": "there"}
    release.set()
    assert sorted(value for _, _, value in tasks) == ["here", "there"]
    assert cluster.happened[1:] == ["given back"]
    assert sum(ran.by_command for ran in cluster.ran) == 1


def test_checks_come_before_anything_is_sent() -> None:
    """A task has begun here meanwhile; what it has is dropped where they fail, and nothing counts."""
    begun, dropped = threading.Event(), Dropped()

    def begin(_number: int) -> None:
        begun.set()
        while not dropped:  # as a file does, whose directory is gone
            time.sleep(0.01)
        raise ClusterError("a", "is gone", "look at others")

    def check() -> None:
        assert begun.wait(10)
        raise ClusterError("node 10.0.0.2", "cannot see IN", "mount it")

    cluster = Held([])
    with pytest.raises(ClusterError, match="cannot see IN"):
        run(cluster, ours("a", begin), ours("b", begin), check=check, drop=dropped)
    assert dropped == [("a", 0)]
    assert (cluster.asked, cluster.ran) == ([], [])
    assert cluster.happened[-1] == "given back"


def test_an_error_here_is_one_of_the_task() -> None:
    """With the node, as those of others."""

    def fail(_number: int) -> None:
        raise ConvertError("a", "b", "c")

    with pytest.raises(ConvertError, match="a: b") as caught:
        run(Held([]), ours("a", fail))
    assert caught.value.__notes__ == ["on node 10.0.0.1"]


def test_what_is_too_large_is_for_others() -> None:
    """A task that ran out of memory is asked for with more than this process holds, which goes then."""
    cluster = Held([LOST["OutOfMemoryError"](), {"value": 5}], [Node(NODE.id, "10.0.0.1", 2, 0, 8 * GB)])
    found = run(cluster, ours("a", lambda _number: 3), task("b"))
    assert sorted(found) == [("a", 3), ("b", 5)]
    assert [asked["memory"] for asked in cluster.asked] == [GB, 2 * GB]
    assert cluster.happened == [("reserved", 1, GB), "given back"]


@pytest.mark.parametrize(
    ("nodes", "free"),
    [([NODE], False), ([Node("b" * 9, "10.0.0.2", 4, 0, 8 * GB)], True), ([Node(NODE.id, "n", 0, 0, 8 * GB)], True)],
    ids=["busy", "elsewhere", "head without CPUs"],
)
def test_only_with_cpus_that_ray_gives(nodes: list[Node], free: bool) -> None:
    """Otherwise this process plans, and no more."""
    assert Here.on(Held([], nodes, free=free), 1, GB) is None  # type: ignore[arg-type]


def test_places_beside_it() -> None:
    """By CPUs and memory."""
    here = Here.on(Held([]), 2, 3 * GB)  # type: ignore[arg-type]
    assert here is not None
    others = [Node(f"{n}", "n", 6, 0, n * GB) for n in range(2, 11)]
    assert [here.places_beside([node], 2) for node in others] == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [here.places_beside([Node(NODE.id, "n", 6, 0, n * GB)], 2) for n in (5, 6, 9)] == [0, 1, 2]
    here.close()


@pytest.mark.parametrize(
    ("cpus", "gigabytes", "expected"),
    [
        (4, 2, "offers 4 CPUs and 2 GB for tasks, and this process needs 2 CPUs and 3 GB of memory; leave out --ray"),
        (1, 8, "offers 1 CPU and 8 GB for tasks, and this process needs 2 CPUs and 3 GB of memory; leave out --ray"),
        (4, 8, "does not give this process 2 CPUs and 3 GB of memory within 30 s; leave out --ray"),
    ],
)
def test_what_ray_does_not_give(cpus: int, gigabytes: int, expected: str) -> None:
    """Is said: a Ray that was started here may have less memory for tasks than was free before."""
    cluster = Held([], local=True, free=False)
    here = Here.on(cluster, 2, 3 * GB)  # type: ignore[arg-type]
    assert here is not None
    cluster.all_nodes = [Node(NODE.id, "local", cpus, 0, gigabytes * GB)]
    with pytest.raises(ClusterError, match=expected):
        here.hold()


def test_a_task_of_this_process_that_hangs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another node does the same, nothing else is begun here, and it is not waited for without end: that is said."""
    monkeypatch.setattr("convert_w4a8.cluster.here._END_SECONDS", 0.2)
    monkeypatch.setattr("convert_w4a8.cluster.tasks.SLOW", 0.0)
    hung, begun = threading.Event(), list[int]()

    def hang(number: int) -> None:
        begun.append(number)
        assert hung.wait(60)

    others = Node("b" * 9, "10.0.0.2", 1, 0, 8 * GB)
    cluster = Held([{"value": "b"}, {"value": "a"}], [Node(NODE.id, "10.0.0.1", 1, 0, 8 * GB), others])
    dropped, started = Dropped(), time.monotonic()
    found = run(cluster, ours("a", hang), task("b"), patience=0.1, drop=dropped)
    assert found == [("b", "b"), ("a", "a")]
    assert (begun, dropped) == ([0], [("a", 0)])
    assert time.monotonic() - started < 20
    assert "a task of this process has not ended for 0 s" in caplog.text
    assert cluster.happened[-1] == "given back"
    hung.set()


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_signal_while_a_task_begins(has_begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as it is; the attempt is dropped, whether it has begun, and is waited for, or never does."""
    begin, has_run, dropped = threading.Thread.start, threading.Event(), Dropped()

    def interrupted(thread: threading.Thread) -> None:
        if has_begun:
            begin(thread)
            assert has_run.wait(10)
        else:
            threads.append(thread)
        raise KeyboardInterrupt

    def work(_number: int) -> None:
        has_run.set()
        while not dropped:  # as a file does, whose directory is gone
            time.sleep(0.01)

    threads = list[threading.Thread]()
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    cluster = Held([], [Node("", "10.0.0.1", 1, 0, 8 * GB)], local=True)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(cluster, ours("a", work), drop=dropped)
    assert time.monotonic() - started < 5
    assert dropped == [("a", 0)]
    assert has_run.is_set() == has_begun
    for thread in threads:  # as a thread does that the system had begun when the signal came
        begin(thread)
        thread.join()
    assert has_run.is_set() == has_begun


@pytest.mark.parametrize("local", [False, True])
def test_a_signal_while_an_attempt_is_made(local: bool) -> None:
    """Here or for another node: its directory may be there, so it is dropped."""
    dropped = Dropped()

    def made(_number: int) -> tuple[int]:
        raise KeyboardInterrupt

    cluster = Held([], [NODE])
    here = Here.on(cluster, 1, GB) if local else None  # type: ignore[arg-type]
    tasks = [Task("a", len, made, cpus=1, memory=GB, here=len)]
    with pytest.raises(KeyboardInterrupt):
        list(Runner(cluster, here=here, drop=dropped).run(tasks))  # type: ignore[arg-type]
    assert dropped == [("a", 0)]


def test_a_second_signal_does_not_keep_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while a call is waited for."""
    cluster, has_run, release = Held([]), threading.Event(), threading.Event()
    here = Here.on(cluster, 1, GB)  # type: ignore[arg-type]
    assert here is not None

    def work() -> None:
        has_run.set()
        release.wait(10)

    here.begin(work, ())
    assert has_run.wait(10)

    def wait(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert_w4a8.cluster.here.wait", wait)
    with pytest.raises(KeyboardInterrupt):
        here.close()
    release.set()
    assert cluster.happened[-1] == "given back"


def test_attempts_are_dropped_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred that cannot be removed for a while, as where a file is open, none is waited for alone."""
    attempts = Attempts(tmp_path, cast("Bars", None))
    tasks = [(ours(f"model-{n}", len), 0) for n in range(100)]
    for each, number in tasks:
        attempts.path(each.name, number).parent.mkdir(parents=True)
    looked = list[float]()
    monkeypatch.setattr("convert_w4a8.cluster.attempts.shutil.rmtree", lambda *_args, **_keywords: None)
    monkeypatch.setattr("convert_w4a8.cluster.attempts.time.sleep", looked.append)
    attempts.drop(tasks)
    assert sum(looked) == pytest.approx(1.0)
    monkeypatch.undo()
    attempts.drop(tasks)
    assert list(next(tmp_path.iterdir()).iterdir()) == []


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@needs_ray
def test_a_ray_that_is_not_needed_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with CPUs for one process of tasks, which is the command's."""
    source = write_case("awq-mixtral-w1-w2-w3", tmp_path / "in").path

    def begin(_self: LocalRay) -> None:
        raise AssertionError

    monkeypatch.setattr(LocalRay, "begin", begin)
    for module in (connection, nodes):
        monkeypatch.setattr(module, "cores", lambda: 2)
    convert(source, tmp_path / "a", options=Options(max_shard_size=SMALL))
    convert(source, tmp_path / "b", options=Options(max_shard_size=SMALL), ray="local", workers=2, device="cpu")
    assert ray_nodes.digests(tmp_path / "a") == ray_nodes.digests(tmp_path / "b")


@needs_ray
def test_a_ray_that_cannot_be_started_gives_up_nothing_that_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not needed before files are written: the system is at fault then, not the command line."""
    source, out = write_case("awq-mixtral-w1-w2-w3", tmp_path / "in").path, tmp_path / "out"
    checkpoint = open_checkpoint(source)

    def interrupted(tasks: Any, writer: Any) -> None:
        for each in tasks[:3]:
            result = convert_shard(each, writer.directory, torch.device("cpu"))
            writer.note(result.file_name, result.pieces, result.notes)
        raise KeyboardInterrupt

    def fail(_self: LocalRay) -> str:
        raise ConvertError("--ray local", "cannot be started (no room)", "free memory and /dev/shm")

    options = Options(max_shard_size=SMALL)
    with pytest.raises(KeyboardInterrupt):
        carry_out(checkpoint, make_plan(checkpoint, options), out, device=torch.device("cpu"), write=interrupted)
    monkeypatch.setattr(LocalRay, "begin", lambda _self: None)
    monkeypatch.setattr(LocalRay, "address", fail)
    for module in (connection, nodes):
        monkeypatch.setattr(module, "cores", lambda: 8)
    with pytest.raises(ClusterError, match="cannot be started") as caught:
        convert(source, out, options=options, ray="local", workers=1, device="cpu", resume=True)
    assert "--resume continues from there" in caught.value.__notes__[0]
    assert len(list((work_path(out) / "checkpoint").glob("*.safetensors"))) >= 3


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a cluster that is one node with two CPUs, the head."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", ray_nodes.python_path())
    processes = ray_nodes.start_head(2, memory=ray_nodes.MEMORY)
    yield processes
    processes.shutdown()


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize(("workers", "by_others"), [(2, False), (1, True)])
def test_on_a_node_of_a_cluster(workers: int, by_others: bool, one_node: Any, tmp_path: Path) -> None:
    """The bytes are those of a conversion without Ray, whoever carries out which task."""
    source = write_case("awq-mixtral-w1-w2-w3", tmp_path / "in").path
    convert(source, tmp_path / "a", options=Options(max_shard_size=SMALL))
    command = [sys.executable, "-P", "-m", "convert_w4a8", "convert", source, tmp_path / "b", "--device", "cpu"]
    options = ["--json", "--max-shard-size", SMALL, "--workers", workers, "--ray", one_node.address]
    ended = subprocess.run([*map(str, command + options)], env=os.environ, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ray_nodes.digests(tmp_path / "a") == ray_nodes.digests(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "in"]
    tasks = json.loads(ended.stdout)["ray"]["tasks"]
    assert any(task["by_command"] for task in tasks)
    assert by_others or all(task["by_command"] for task in tasks)
    assert len({task["node"] for task in tasks}) == 1
