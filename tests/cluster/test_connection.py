"""Importing Ray and connecting to it, without Ray: what is said where that fails, and that nothing of it stays."""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from failing_import import fail_import

from convert_w4a8.cluster import connection, local
from convert_w4a8.cluster.connection import connect
from convert_w4a8.cluster.local import lean
from convert_w4a8.cluster.nodes import LocalCluster
from convert_w4a8.cluster.quiet import load_ray
from convert_w4a8.errors import ConvertError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModuleNotFoundError("No module named 'ray'", name="ray"), "which is not installed"),
        (ModuleNotFoundError("No module named 'msgpack'", name="msgpack"), r"imported \(No module named 'msgpack'\)"),
        (ImportError("_raylet.so: undefined symbol: x\nmore"), r"imported \(_raylet\.so: undefined symbol: x\)"),
    ],
)
def test_ray_that_cannot_be_imported(error: ImportError, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, which may be something that Ray needs."""
    fail_import("ray", error, monkeypatch)
    with pytest.raises(ConvertError, match=f"--ray: needs ray, which .*{expected.removeprefix('which ')}"):
        load_ray()


def test_threads_that_need_a_local_ray_at_the_same_time_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a calibration are made by threads."""
    monkeypatch.setattr(LocalCluster, "_greet", lambda _self: None)
    begun, connected = Barrier(4), list[object]()

    def connect_slowly() -> object:
        connected.append(object())
        time.sleep(0.1)
        return connected[-1]

    cluster = LocalCluster(connect_slowly)

    def need(_number: int) -> object:
        begun.wait(10)
        return cluster.ray

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(need, range(4))) == connected * 4
    assert len(connected) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_ray_prints_again_afterwards(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is silent while we use it, and not for the rest of the process; also where no connection comes about."""
    printed: list[str] = []
    worker = SimpleNamespace(print_to_stdstream=printed.append)

    def init(**_keywords: Any) -> None:
        worker.print_to_stdstream("init")
        if fails:
            raise RuntimeError("no")

    ray = ModuleType("ray")
    vars(ray).update(
        _private=SimpleNamespace(worker=worker),
        exceptions=SimpleNamespace(RayError=RuntimeError),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "a"),
        init=init,
        is_initialized=lambda: False,
        nodes=list,
        shutdown=lambda: worker.print_to_stdstream("shutdown"),
    )
    monkeypatch.setattr(connection, "load_ray", lambda: ray)
    logger = logging.getLogger("ray")
    level = logger.level
    try:
        with connect("cluster") as cluster:
            assert logger.level == logging.CRITICAL
            assert cluster.nodes() == []
            assert not fails
    except ConvertError:
        assert fails
    assert printed == []
    assert logger.level == level
    worker.print_to_stdstream("other")
    assert printed == ["other"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_ray_of_our_own_is_lean_while_it_begins(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only watches is not started, and settings of the user stay; afterwards all is as it was."""

    class Node:
        def start_monitor(self) -> str:
            return "monitor"

        def start_raylet(self) -> str:
            return "raylet"

    ray = ModuleType("ray")
    vars(ray)["_private"] = SimpleNamespace(node=SimpleNamespace(Node=Node))
    given, added = "RAY_raylet_client_num_connect_attempts", "RAY_enable_worker_prestart"
    monkeypatch.setenv(given, "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    before = dict(os.environ)
    try:
        with lean(ray) as keywords:
            assert Node().start_monitor() is None
            assert Node().start_raylet() == "raylet"
            assert not hasattr(Node, "start_api_server")
            assert keywords["num_cpus"] == 3
            assert os.environ[given] == "7"
            assert os.environ[added] == "0"
            assert 1 / (not fails)
    except ZeroDivisionError:
        assert fails
    assert Node().start_monitor() == "monitor"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("free", "expected"), [(64 << 20, 128 << 20), (8 << 30, 1 << 30), (1 << 40, 4 << 30), (None, 128 << 20)]
)
def test_the_store_of_a_ray_of_our_own_takes_a_part_of_shared_memory(
    free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration sends hundreds of MB; a system without such memory, and one with little, has what Ray needs."""

    def statvfs(_path: str) -> SimpleNamespace:
        if free is None:
            raise FileNotFoundError
        return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert local._store_bytes() == expected
