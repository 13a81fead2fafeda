"""Memory stays bounded: a layer takes what it is said to take, and what runs together stays under the limit."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import write_case

import convert_w4a8
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion import jobs, shard
from convert_w4a8.conversion.layer import convert_layer, layer_memory
from convert_w4a8.conversion.plan import LayerPlan, Plan, make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.options import Options, ScalesMode

CASE = "gptq-qwen3-moe-sharded"
SCRIPT = Path(__file__).parent / "measure_memory.py"
LEAST, MOST = 0.8, 4.0
"""How much of what is measured `layer_memory` may say: hardly less, and not so much that layers wait in vain."""


# What one layer takes.


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Measure layers of all kinds: bytes that converting one took, and bytes that `layer_memory` says."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc to measure the memory of a process")
    environment = {**os.environ, "PYTHONPATH": str(Path(convert_w4a8.__file__).parents[1])}  # the same package
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, tuple[int, int]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gptq-kept", "awq-new", "awq-new-small", "gptq-act-order", "ct-int8", "dense", "gptq-in-bf16"],
)
def test_a_layer_takes_as_much_as_is_said(kind: str, measured: dict[str, tuple[int, int]]) -> None:
    """The most that a process took beyond what it had, from reading the layer to the last part of its tensors."""
    took, said = measured[kind]
    assert took > 10 << 20  # it stands out
    assert LEAST * took <= said <= MOST * took


# What runs together.


class Watch:
    """Stands before `convert_layer`: knows which layers are under way, and lets the first ones wait for each other."""

    def __init__(self, together: int) -> None:
        self.most = 0
        self.sums: list[tuple[int, int]] = []
        """(layers under way, memory that they are said to take), whenever one begins."""
        self._running: list[LayerPlan] = []
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(together)
        self._waiting = together

    def __call__(self, layer: LayerPlan, *arguments: Any) -> Any:
        """Convert a layer."""
        with self._lock:
            self._running.append(layer)
            self.most = max(self.most, len(self._running))
            self.sums.append((len(self._running), sum(map(layer_memory, self._running))))
            waits, self._waiting = self._waiting > 0, self._waiting - 1
        try:
            if waits:
                self._barrier.wait(20)  # fails if fewer than these may run together
            time.sleep(0.005)  # as long as another would need to begin
            return convert_layer(layer, *arguments)
        finally:
            with self._lock:
                self._running.remove(layer)


@dataclass
class Conversion:
    """A model of 32 layers that are to be converted, and how."""

    plan: Plan
    run: Callable[[int], Watch]
    """Convert it under the eyes of a Watch, in which so many layers wait for each other."""

    @property
    def largest(self) -> int:
        """What the largest layer is said to take."""
        return max(map(layer_memory, self.plan.layers))


@pytest.fixture
def conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    """Plan a conversion where there are cores for all, and copies take next to nothing."""
    checkpoint = open_checkpoint(write_case(CASE, tmp_path / "in").path)
    plan = make_plan(checkpoint, Options(scales=ScalesMode.REFERENCE, max_shard_size=200_000))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(shard, "CHUNK_BYTES", 1)  # else a copy takes more than many of these layers

    def run(together: int) -> Watch:
        watch = Watch(together)
        monkeypatch.setattr(shard, "convert_layer", watch)
        carry_out(checkpoint, plan, tmp_path / "out", device=torch.device("cpu"))
        assert len(watch.sums) == len(plan.layers) == 32
        return watch

    return Conversion(plan, run)


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_few_layers_are_in_memory_at_a_time(
    workers: int, conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers there are, as many are under way as there are workers, and no more."""
    monkeypatch.setattr(jobs, "_MAX_WORKERS", workers)
    assert conversion.run(workers).most == workers


def test_as_many_layers_as_there_are_cores(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    """More would only take memory."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert conversion.run(2).most == 2


def test_layers_that_run_together_fit_into_the_limit(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory is for two, two run of six that could."""
    monkeypatch.setattr(jobs, "_MAX_WORKERS", 6)
    limit = 2 * conversion.largest + 100
    monkeypatch.setattr(jobs, "MEMORY_BYTES", limit)
    watch = conversion.run(2)
    assert conversion.largest < max(nbytes for _, nbytes in watch.sums) <= limit


def test_a_layer_that_is_larger_than_the_limit_runs_alone(
    conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer must always be possible."""
    monkeypatch.setattr(jobs, "MEMORY_BYTES", min(map(layer_memory, conversion.plan.layers)) - 1)
    assert conversion.run(1).most == 1
