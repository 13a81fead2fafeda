"""Decode steps of an engine, without a profiler: what its process does in one, and how long the GPU works and waits.

Calls of vLLM's engine core are wrapped in its process, and CUDA events recorded between them. A step of the GPU is
`model`, the graph and what prepares it; `sampling`, with lm_head; and `idle`, from there to the first work of the next.
A step of the host is `schedule`, `launch` of model and sampling, `wait` for the tokens of the step before, `update` of
the requests, and `other`; `cpu` is what its thread computes of that, `launch_cpu` while it launches. Where the host
never waits, the GPU waits for the host. The GPU's clock, its power and whether that was capped are read beside it. Then
the thread's stack is read every millisecond of another run: the share of that in each function. The engine needs
`VLLM_ALLOW_INSECURE_SERIALIZATION=1` in its environment: functions of this module run in its process.
"""

import inspect
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import step_traces
import vllm_engine

QUESTION = "What do host and GPU do in a decode step?"
STEPS = 64
"""The last steps of a run, which count."""
HOST = ("schedule", "launch", "wait", "update", "other")
GPU = ("model", "sampling", "idle")
PLACES = 120
POWER_CAP = 0x4
"""NVML's reason for a lower clock."""


class Recorder:
    """Keeps what each step of an engine core takes: seconds of the host's parts, and CUDA events of the GPU's."""

    def __init__(self, core: Any) -> None:
        from vllm.v1.executor.uniproc_executor import AsyncOutputFuture

        self.steps: list[dict[str, Any]] = []
        self.clocks: list[tuple[int, float, int]] = []
        self.stacks: Counter[str] = Counter()
        self.reads, self.samples = threading.Event(), threading.Event()
        self._wrap(core, "step_fn", begins=True)
        self._wrap(core.scheduler, "schedule", part="schedule")
        self._wrap(core.model_executor, "execute_model", part="launch", events=("begin", "model"))
        self._wrap(core.model_executor, "sample_tokens", part="launch", events=("", "sampling"))
        self._wrap(core.scheduler, "update_from_output", part="update")
        self._wrap(AsyncOutputFuture, "result", part="wait")
        threading.Thread(target=self._read_clocks, daemon=True).start()
        threading.Thread(target=self._read_stacks, args=(threading.get_ident(),), daemon=True).start()

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
            start, used = time.perf_counter(), time.thread_time()
            if begins:
                self.steps.append({"start": start, "used": used})
            record(events[0])
            result = original(*args, **kwargs)
            record(events[1])
            if part == "schedule" and self.steps:
                self.steps[-1]["tokens"] = result.total_num_scheduled_tokens
            if part and self.steps:
                self.steps[-1][part] = self.steps[-1].get(part, 0.0) + time.perf_counter() - start
                cpu = f"{part}_cpu"
                self.steps[-1][cpu] = self.steps[-1].get(cpu, 0.0) + time.thread_time() - used
            return result

        setattr(owner, name, wrapper)

    def _read_clocks(self) -> None:
        import torch
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        while True:
            self.reads.wait()
            mhz = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
            capped = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & POWER_CAP
            self.clocks.append((mhz, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, 100 * bool(capped)))
            time.sleep(0.02)

    def _read_stacks(self, thread: int) -> None:
        while True:
            self.samples.wait()
            frame = sys._current_frames().get(thread)  # noqa: SLF001 - there is no other way
            self.stacks["all"] += 1
            if frame is not None:
                self.stacks[f"in {_place(frame)} line {frame.f_lineno}"] += 1
            names = set()
            while frame is not None:
                names.add(_place(frame))
                frame = frame.f_back
            self.stacks.update(names)
            time.sleep(0.001)

    def begin(self) -> None:
        """Forget what there was, and read clocks."""
        self.steps, self.clocks = [], []
        self.reads.set()

    def end(self, batch: int) -> dict[str, float]:
        """Return means of the last steps of so many tokens: microseconds of each part, the GPU's clock and power."""
        import torch

        self.reads.clear()
        torch.cuda.synchronize()
        events = ("begin", "model", "sampling")
        pairs = [pair for pair in pairwise(self.steps) if all(step.get("tokens") == batch for step in pair)]
        found: dict[str, list[float]] = {name: [] for name in ("step", *GPU, *HOST, "cpu", "launch_cpu")}
        for step, after in pairs[-STEPS:]:
            times = [1e6 * step.get(name, 0.0) for name in HOST]
            found["step"].append(1e6 * (after["start"] - step["start"]))
            found["cpu"].append(1e6 * (after["used"] - step["used"]))
            found["launch_cpu"].append(1e6 * step.get("launch_cpu", 0.0))
            for name, us in zip(HOST, times, strict=True):
                found[name].append(found["step"][-1] - sum(times) if name == "other" else us)
            moments = (*(step[event] for event in events), after["begin"])
            for name, (first, second) in zip(GPU, pairwise(moments), strict=True):
                found[name].append(1e3 * first.elapsed_time(second))
        means = {f"{name}_us": statistics.fmean(values) for name, values in found.items()}
        clocks = self.clocks[len(self.clocks) // 2 :]
        gpu = [statistics.fmean(values) for values in zip(*clocks, strict=True)] if clocks else []
        return means | dict(zip(("mhz", "watts", "capped_percent"), gpu, strict=False))


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"


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


def sample(worker: Any) -> str:
    """Begin to read stacks, or end it and return what was read: the share of each place, as JSON."""
    recorder = worker.step_recorder
    if not recorder.samples.is_set():
        recorder.stacks.clear()
        recorder.samples.set()
        return "{}"
    recorder.samples.clear()
    return json.dumps({place: count / recorder.stacks["all"] for place, count in recorder.stacks.most_common(PLACES)})


def timed(llm: Any, batch: int) -> dict[str, Any]:
    """Return the batch, the means of its steps, and the places of the stacks."""
    step_traces.run(llm, batch, STEPS)
    llm.collective_rpc(begin)
    step_traces.run(llm, batch, 2 * STEPS)
    (found,) = llm.collective_rpc(end, args=(batch,))
    llm.collective_rpc(sample)
    step_traces.run(llm, batch, 2 * STEPS)
    (places,) = llm.collective_rpc(sample)
    return {"batch": batch, **json.loads(found), "places": json.loads(places)}


def row_of(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's row for one batch."""
    return {"batch": found["batch"], "kind": kind} | {
        name: value for name, value in found.items() if name not in ("batch", "places")
    }


def places_of(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each place of the stacks."""
    return [f"{share:.1%} {place}" for place, share in found["places"].items()]


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows, by batch."""
    return vllm_engine.table_of_numbers(sorted(rows, key=lambda row: row["batch"]))
