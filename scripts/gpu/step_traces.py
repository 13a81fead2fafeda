"""Decode steps of an engine, traced by torch.profiler in the engine's process, and told by class of kernels.

decode_steps.py says what is whose time. The engine needs `VLLM_ALLOW_INSECURE_SERIALIZATION=1` in its environment:
functions of this module run in its process. The profiler makes steps slower, by more and longer gaps between kernels.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import decode_steps
import vllm_engine

QUESTION = "Where does the time of a decode step go?"
STEPS = 32
PROMPT = 128


def begin_trace(worker: Any) -> None:
    """Start the profiler in the process of an engine's worker."""
    from torch.profiler import ProfilerActivity, profile

    worker.decode_trace = profile(activities=[ProfilerActivity.CUDA])
    worker.decode_trace.__enter__()


def end_trace(worker: Any) -> str:
    """Stop the profiler; return what the GPU ran, [name, first and last nanosecond], as JSON."""
    trace = worker.decode_trace
    trace.__exit__(None, None, None)
    found = trace.profiler.kineto_results.events()
    return json.dumps(
        [
            (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in found
            if str(event.device_type()).endswith("CUDA") and event.duration_ns() > 0
        ]
    )


def run(llm: Any, batch: int, tokens: int) -> None:
    """Have an engine generate so many tokens for each of so many requests."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7919 * i + 31 * j) % 30000 + 5 for j in range(PROMPT)]} for i in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)


def traced(llm: Any, batch: int) -> dict[str, Any]:
    """Return the batch and `kernels`: microseconds and launches a step of each kernel."""
    run(llm, batch, STEPS)
    llm.collective_rpc(begin_trace)
    run(llm, batch, 2 * STEPS)
    (events,) = llm.collective_rpc(end_trace)
    steps = decode_steps.last_steps([decode_steps.Event(*event) for event in json.loads(events)], STEPS, 2 * STEPS)
    return {"batch": batch, "kernels": decode_steps.times(steps, STEPS)}


def row_of(kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an engine's row for one batch: microseconds a step of each class of kernels, and of all but the gaps."""
    classes = decode_steps.by_class({name: tuple(each) for name, each in found["kernels"].items()})
    busy = sum(classes.values()) - classes[decode_steps.GAP]
    row = {"batch": found["batch"], "kind": kind, "busy_us": busy}
    return row | {f"{name}_us": us for name, us in classes.items()}


def kernels_of(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each kernel that takes more than a microsecond of a step."""
    kernels = sorted(found["kernels"].items(), key=lambda item: -item[1][0])
    return [f"{us:.1f} us, {count:.1f} x: {name[:120]}" for name, (us, count) in kernels if us > 1]


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of rows, by batch."""
    return vllm_engine.table_of_numbers(sorted(rows, key=lambda row: row["batch"]))
