"""Decode steps of an engine, without a profiler: what its process does in one, and how long the GPU works and waits.

Calls of vLLM's engine core are wrapped in its process, and CUDA events recorded between them. A step of the GPU is
`model`, the graph and what prepares it; `sampling`, with lm_head; and `idle`, from there to the first work of the next.
A step of the host is `schedule`, `launch` of model and sampling, `wait` for the tokens of the step before, `update` of
the requests, and `other`. Where the host never waits, the GPU waits for the host. The GPU's clock, its power and
whether that was capped are read beside it. The engine needs `VLLM_ALLOW_INSECURE_SERIALIZATION=1` in its environment:
functions of this module run in its process.
"""

import inspect
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import step_traces
import vllm_engine

QUESTION = "What do host and GPU do in a decode step?"
STEPS = 64
"""The last steps of a run, which count."""
HOST = ("schedule", "launch", "wait", "update", "other")
GPU = ("model", "sampling", "idle")
POWER_CAP = 0x4
"""NVML's reason for a lower clock."""


class Recorder:
    """Keeps what each step of an engine core takes: seconds of the host's parts, and CUDA events of the GPU's."""

    def __init__(self, core: Any) -> None:
        from vllm.v1.executor.uniproc_executor import AsyncOutputFuture

        self.steps: list[dict[str, Any]] = []
        self.clocks: list[tuple[int, float, int]] = []
        self.reads = threading.Event()
        self._wrap(core, "step_fn", begins=True)
        self._wrap(core.scheduler, "schedule", part="schedule")
        self._wrap(core.model_executor, "execute_model", part="launch", events=("begin", "model"))
        self._wrap(core.model_executor, "sample_tokens", part="launch", events=("", "sampling"))
        self._wrap(core.scheduler, "update_from_output", part="update")
        self._wrap(AsyncOutputFuture, "result", part="wait")
        threading.Thread(target=self._read_clocks, daemon=True).start()

    def _wrap(
        self, owner: Any, name: str, part: str = "", events: Sequence[str] = ("", ""), *, begins: bool = False
    ) -> None:
        import torch

        original: Callable[..., Any] = getattr(owner, name)

        def record(event: str) -> None:
            if event and self.steps:
                self.steps[-1][event] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                self.steps[-1][event].record()

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            if begins:
                self.steps.append({"start": start})
            record(events[0])
            result = original(*args, **kwargs)
            record(events[1])
            if part == "schedule" and self.steps:
                self.steps[-1]["tokens"] = result.total_num_scheduled_tokens
            if part and self.steps:
                self.steps[-1][part] = self.steps[-1].get(part, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, wrapper)

    def _read_clocks(self) -> None:
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        while True:
            self.reads.wait()
            mhz = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
            capped = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & POWER_CAP
            self.clocks.append((mhz, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, 100 * bool(capped)))
            time.sleep(0.02)

    def begin(self) -> None:
        """Forget what there was, and read clocks."""
        self.steps, self.clocks = [], []
        self.reads.set()

    def end(self, batch: int) -> dict[str, float]:
        """Return means of the last steps of so many tokens: microseconds of each part; and the GPU's clock and power."""
        import torch

        self.reads.clear()
        torch.cuda.synchronize()
        events = ("begin", "model", "sampling")
        pairs = [pair for pair in pairwise(self.steps) if all(step.get("tokens") == batch for step in pair)]
        found: dict[str, list[float]] = {name: [] for name in ("step", *GPU, *HOST)}
        for step, after in pairs[-STEPS:]:
            times = [1e6 * step.get(name, 0.0) for name in HOST]
            found["step"].append(1e6 * (after["start"] - step["start"]))
            for name, us in zip(HOST, times, strict=True):
                found[name].append(found["step"][-1] - sum(times) if name == "other" else us)
            moments = (*(step[event] for event in events), after["begin"])
            for name, (first, second) in zip(GPU, pairwise(moments), strict=True):
                found[name].append(1e3 * first.elapsed_time(second))
        means = {f"{name}_us": statistics.fmean(values) for name, values in found.items()}
        clocks = self.clocks[len(self.clocks) // 2 :]
        gpu = [statistics.fmean(values) for values in zip(*clocks, strict=True)] if clocks else []
        return means | dict(zip(("mhz", "watts", "capped_percent"), gpu, strict=False))


def begin(worker: Any) -> None:
    """Record the steps of the engine core in whose process, and on whose behalf, this runs."""
    from vllm.v1.engine.core import EngineCore

    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), EngineCore):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError("no engine core called this")
    if not hasattr(worker, "step_recorder"):
        worker.step_recorder = Recorder(frame.f_locals["self"])
    worker.step_recorder.begin()


def end(worker: Any, batch: int) -> str:
    """Return what was recorded of steps of so many requests, as JSON."""
    return json.dumps(worker.step_recorder.end(batch))


def timed(llm: Any, batch: int) -> dict[str, Any]:
    """Return the batch and the means of its steps."""
    step_traces.run(llm, batch, STEPS)
    llm.collective_rpc(begin)
    step_traces.run(llm, batch, 2 * STEPS)
    (found,) = llm.collective_rpc(end, args=(batch,))
    return {"batch": batch, **json.loads(found)}


def row_of(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's row for one batch."""
    return {"batch": found["batch"], "kind": kind} | {name: value for name, value in found.items() if name != "batch"}


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows, by batch."""
    return vllm_engine.table_of_numbers(sorted(rows, key=lambda row: row["batch"]))
