"""Attempts that are lost, in every way that Ray tells of, without Ray: what a runner does about them."""

import pickle
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from failing_import import fail_import
from ray_stand_in import GB, LOST, Dropped, RayTaskError, StandIn, task

from convert_w4a8.cluster.answers import entry
from convert_w4a8.cluster.greetings import check_version, greeting
from convert_w4a8.cluster.nodes import Node
from convert_w4a8.cluster.record import Ran, as_dict, as_text
from convert_w4a8.cluster.tasks import ATTEMPTS, Runner, Task
from convert_w4a8.errors import ClusterError, ConvertError, DiskError, PlanError, Problem
from convert_w4a8.version import __version__


def run(stand_in: Any, *tasks: Task, **keywords: Any) -> list[tuple[str, int, Any]]:
    """Carry out tasks; return their names, the attempts that count, and results."""
    return [(each.name, number, value) for each, number, value in Runner(stand_in, **keywords).run(tasks)]


@pytest.mark.parametrize("kind", LOST.values(), ids=LOST)
def test_an_attempt_that_is_lost_is_made_again(kind: type[Exception]) -> None:
    """Whatever Ray says of it."""
    stand_in, dropped = StandIn([kind(), kind(), {"value": 7}]), Dropped()
    assert run(stand_in, task(), drop=dropped) == [("model-00001-of-00001.safetensors", 2, 7)]
    assert dropped == [("model-00001-of-00001.safetensors", 0), ("model-00001-of-00001.safetensors", 1)]
    assert [asked["call"] for asked in stand_in.asked] == [(len, (f"{n}",)) for n in range(3)]
    assert [asked["num_cpus"] for asked in stand_in.asked] == [1, 1, 1]
    assert stand_in.ran == [Ran("model-00001-of-00001.safetensors", "10.0.0.1", 1.0, 3)]


def test_after_too_little_memory_more_is_asked_for() -> None:
    """Twice as much, so that fewer run side by side; never more than a node for it has, for which Ray would wait."""
    nodes = [Node("a" * 9, "10.0.0.1", 4, 0, 8 * GB), Node("b" * 9, "10.0.0.2", 0, 0, 64 * GB)]
    stand_in = StandIn([*[LOST["OutOfMemoryError"]() for _ in range(3)], {"value": 7}], nodes)
    run(stand_in, task(memory=3 * GB))
    assert [asked["memory"] for asked in stand_in.asked] == [3 * GB, 6 * GB, 8 * GB, 8 * GB]


@pytest.mark.parametrize("kind", LOST.values(), ids=LOST)
def test_attempts_are_bounded(kind: type[Exception]) -> None:
    """Then there is one line, of an error after which `--resume` continues."""
    stand_in = StandIn([kind() for _ in range(ATTEMPTS)])
    with pytest.raises(DiskError, match=rf"was begun {ATTEMPTS} times and lost each time \(.+\); look at") as caught:
        run(stand_in, task(), where=lambda _task, _number: "a" * 9)
    assert "\n" not in str(caught.value)
    assert "on node 10.0.0.1" in str(caught.value)
    assert len(stand_in.asked) == ATTEMPTS


def test_a_bug_keeps_its_traceback() -> None:
    """It is not tried again."""
    stand_in = StandIn([RayTaskError("Traceback ...")])
    with pytest.raises(RayTaskError, match="Traceback"):
        run(stand_in, task())
    assert len(stand_in.asked) == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ConvertError", ConvertError),
        ("DiskError", DiskError),
        ("ClusterError", ClusterError),
        ("PlanError", PlanError),
    ],
)
def test_errors_of_ours_come_back_as_they_were(kind: str, expected: type[Exception]) -> None:
    """With their notes, and the node; other attempts end."""
    answer = {"problems": [("a", "b", "c")], "kind": kind, "notes": ["first"]}
    stand_in, dropped = StandIn([answer, None]), Dropped()
    with pytest.raises(expected) as caught:
        run(stand_in, task(), task("other"), drop=dropped)
    assert type(caught.value) is expected
    problems = caught.value.problems if isinstance(caught.value, PlanError) else (caught.value.problem,)  # type: ignore[attr-defined]
    assert problems == (Problem("a", "b", "c"),)
    assert caught.value.__notes__ == ["first", "on node 10.0.0.1"]
    assert dropped == [("other", 0)]


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_a_node_that_came_later_with_another_version(version: str | None) -> None:
    """Is named, too."""
    with pytest.raises(ClusterError, match=r"node 10\.0\.0\.1: has "):
        run(StandIn([{"version": version}]), task())
    check_version("10.0.0.1", __version__)


def test_a_node_that_cannot_import_what_it_needs() -> None:
    """Is named, in one line, though the version is ours."""
    with pytest.raises(ClusterError, match=r"node 10\.0\.0\.1: cannot import .*libcudart"):
        run(StandIn([{"broken": "OSError: libcudart.so: cannot open shared object file"}]), task())


class Broken:
    """Cannot be unpickled where it arrives, as a function whose module fails to import."""

    def __reduce__(self) -> Any:
        """Return what fails."""
        return int, ("libcudart",)


@pytest.mark.parametrize(
    ("version", "expected"),
    [(__version__, ValueError.__name__), ("0.0.1", "")],
)
def test_what_a_node_answers_that_cannot_begin(version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kept it from that; nothing is unpickled for another version."""
    context = SimpleNamespace(get_node_id=lambda: "a" * 9)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    answer = entry()(version, pickle.dumps(Broken()), [])
    assert (answer["node"], answer["version"]) == ("a" * 9, __version__)
    assert answer["broken"].startswith(expected)
    assert bool(answer["broken"]) == bool(expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("libcudart.so: cannot open\nmore"), r"cannot import .*OSError: libcudart\.so: cannot open\)"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), r"cannot import .*No module named 'torch'"),
        (ModuleNotFoundError("No module named 'convert_w4a8'", name="convert_w4a8"), "has no w4a8-convert"),
    ],
)
def test_a_greeting_where_imports_fail(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the node, and says what is wrong there."""
    fail_import("convert_w4a8.conversion.shard", error, monkeypatch)
    version, problem = greeting()(__version__, True)
    assert version == __version__
    if "has no" in expected:
        version = None
    with pytest.raises(ClusterError, match=f"node n1: {expected}"):
        check_version("n1", version, problem)


def test_the_last_large_node_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for ever for another; we wait a little."""
    stand_in = StandIn([None])
    monkeypatch.setattr("convert_w4a8.cluster.tasks.time.monotonic", iter(range(0, 10**6, 20)).__next__)

    def poll(_attempts: Sequence[tuple[Task, int]]) -> None:
        stand_in.all_nodes = [Node("b" * 9, "10.0.0.2", 4, 0, GB // 2)]

    with pytest.raises(ClusterError, match="needs 1 CPU, 1 GB of memory; the largest node offers 4 CPUs, 500 MB"):
        run(stand_in, task("large"), poll=poll, drop=(dropped := Dropped()))
    assert dropped == [("large", 0)]


def test_a_slow_attempt_is_joined_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another node, once nothing waits and it has taken long since it was known where; the first one counts."""
    nodes = [Node("a" * 9, "10.0.0.1", 4, 0, 8 * GB), Node("b" * 9, "10.0.0.2", 4, 0, 8 * GB)]
    stand_in = StandIn([{"value": 3}, None, {"value": 5}], nodes)
    monkeypatch.setattr("convert_w4a8.cluster.tasks.time.monotonic", iter(range(0, 10**6, 20)).__next__)
    found = run(
        stand_in, task("quick"), task("slow"), where=lambda _task, _number: "a" * 9, drop=(dropped := Dropped())
    )
    assert found == [("quick", 0, 3), ("slow", 1, 5)]
    assert stand_in.asked[2]["scheduling_strategy"] == ("b" * 9, True)
    assert dropped == [("slow", 0)]
    assert [ran.attempts for ran in stand_in.ran] == [1, 2]


def test_nobody_is_slow_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a single node there is nothing to be won."""
    stand_in = StandIn([{"value": 3}, None])
    monkeypatch.setattr("convert_w4a8.cluster.tasks.time.monotonic", iter(range(0, 10**6, 20)).__next__)
    polls: list[int] = []

    def poll(attempts: Sequence[tuple[Task, int]]) -> None:
        polls.append(len(attempts))
        if len(polls) == 50:
            stand_in.outcomes[1] = {"value": 4}

    run(stand_in, task("quick"), task("slow"), where=lambda _task, _number: "a" * 9, poll=poll)
    assert len(stand_in.asked) == 2


def test_what_fits_nowhere_is_not_begun() -> None:
    """A GPU that nobody has, more CPUs than a node has."""
    for each in (task(gpus=1), task(cpus=5), task(memory=9 * GB)):
        stand_in = StandIn([])
        with pytest.raises(ClusterError, match="needs "):
            run(stand_in, each)
        assert stand_in.asked == []


@pytest.mark.parametrize(("keywords", "remedy"), [({"cpus": 5}, "give fewer --workers"), ({"memory": 9 * GB}, "leave")])
def test_what_does_not_fit_here(keywords: dict[str, Any], remedy: str) -> None:
    """A Ray of this machine gets no larger nodes."""
    stand_in = StandIn([])
    stand_in.is_local = True
    with pytest.raises(ClusterError, match="leave out --ray") as caught:
        run(stand_in, task(**keywords))
    assert remedy in caught.value.problem.remedy
    assert "add a larger node" not in str(caught.value)


def test_so_many_are_under_way() -> None:
    """Two a CPU; the others wait here, so that what a driver holds does not grow with the model."""
    stand_in = StandIn([{"value": n} for n in range(100)])
    tasks = Runner(stand_in).run([task(f"{n}") for n in range(100)])  # type: ignore[arg-type]
    next(tasks)
    assert len(stand_in.asked) == 8
    assert len(list(tasks)) == 99


def test_large_tasks_do_not_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two a place where a task may run. And how far they are is looked at twice a second, however fast they end."""
    monkeypatch.setattr("convert_w4a8.cluster.tasks.time.monotonic", iter(n / 100 for n in range(10**6)).__next__)
    stand_in = StandIn([{"value": n} for n in range(100)])
    polls: list[int] = []
    runner = Runner(stand_in, poll=lambda attempts: polls.append(len(attempts)))  # type: ignore[arg-type]
    tasks = runner.run([task(f"{n}", cpus=2) for n in range(100)])
    next(tasks)
    assert len(stand_in.asked) == 4
    assert len(list(tasks)) == 99
    assert 1 <= len(polls) <= 3


def test_what_is_said() -> None:
    """By node, and how often something was begun again."""
    ran = [Ran("x", "n2", 1.5, 1), Ran("y", "n1", 2.0, 2, by_command=True)]
    assert as_dict(ran) == {
        "nodes": {"n1": {"tasks": 1, "seconds": 2.0}, "n2": {"tasks": 1, "seconds": 1.5}},
        "tasks": [
            {"task": "x", "node": "n2", "seconds": 1.5, "attempts": 1, "by_command": False},
            {"task": "y", "node": "n1", "seconds": 2.0, "attempts": 2, "by_command": True},
        ],
    }
    assert "n1: 1 task, 2 s (1 by this process)" in as_text(ran)
    assert "1 further attempt" in as_text(ran)
    assert as_text([]) == "ray        nothing was left to do"
