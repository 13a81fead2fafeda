"""Where the time of a decode step goes, kernel by kernel: `profile_decode.py [--kinds w4a16 lut ...] [--batch 1 8 64]`.

The checkpoints and ways to serve them are those of bench_serving.py. All engines start side by side and are traced one
after the other, compiled with CUDA graphs, in processes of their own as vLLM comes: the last steps of each batch, with
torch.profiler in the engine's process. decode_steps.py says what is whose time. The profiler makes steps slower:
`step_us` is the time of a step without it.
"""

import argparse
import fcntl
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import bench_serving
import decode_steps
import vllm_engine
from make_random_checkpoint import SHAPES, ensure
from results import add_options

STEPS = 32
PROMPT = 128


def begin_trace(worker: Any) -> None:
    """Start the profiler in the process of an engine's worker."""
    from torch.profiler import ProfilerActivity, profile

    worker.decode_trace = profile(activities=[ProfilerActivity.CUDA])
    worker.decode_trace.__enter__()


def end_trace(worker: Any) -> str:
    """Stop the profiler; return what the GPU ran, [name, first and last nanosecond], as JSON."""
    import json

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


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Trace decode steps of one engine, when all engines have started and no other is being traced."""
    from vllm import LLM, SamplingParams

    meeting = Path(payload["meeting"])
    try:
        llm = LLM(**payload["llm"])
    finally:
        (meeting / payload["name"]).touch()
    deadline = time.monotonic() + payload["wait"]
    while len(list(meeting.iterdir())) < payload["engines"] and time.monotonic() < deadline:
        time.sleep(0.2)

    def run(batch: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(7919 * i + 31 * j) % 30000 + 5 for j in range(PROMPT)]} for i in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    found = []
    with (meeting.parent / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for batch in payload["batches"]:
            run(batch, STEPS)
            step_us = (run(batch, 5 * STEPS) - run(batch, STEPS)) / (4 * STEPS) * 1e6
            llm.collective_rpc(begin_trace)
            run(batch, 2 * STEPS)
            (events,) = llm.collective_rpc(end_trace)
            steps = decode_steps.last_steps(
                [decode_steps.Event(*event) for event in json.loads(events)], STEPS, 2 * STEPS
            )
            found.append({"batch": batch, "step_us": step_us, "kernels": decode_steps.times(steps, STEPS)})
    return {"batches": found}


def trace(args: argparse.Namespace, kind: str, directory: Path, meeting: Path) -> dict[str, Any]:
    """Run one engine, and return what `worker` found."""
    cases, how = [(batch, PROMPT) for batch in args.batch], bench_serving.KINDS[kind]
    llm = bench_serving.engine(args.model, args.layers, cases, how, directory)
    llm["gpu_memory_utilization"] = 0.15  # of several engines; only a check, since the cache's size is said
    payload = {"llm": llm, "batches": args.batch, "meeting": str(meeting), "name": kind}
    payload |= {"engines": len(args.kinds), "wait": args.wait}
    # Functions of this script run in the engine's process.
    env = bench_serving.environment(args.model, cases, how) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return vllm_engine.run_worker(__file__, payload, how.timeout + args.wait, env, how.plugins)


def row_of(kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's row for one batch: microseconds a step of each class of kernels."""
    classes = decode_steps.by_class({name: tuple(each) for name, each in found["kernels"].items()})
    row = {"batch": found["batch"], "kind": kind, "step_us": found["step_us"], "traced_us": sum(classes.values())}
    return row | {f"{name}_us": us for name, us in classes.items()}


def kernels_of(found: dict[str, Any]) -> list[str]:
    """Return a line for each kernel that takes more than a microsecond of a step."""
    kernels = sorted(found["kernels"].items(), key=lambda item: -item[1][0])
    return [f"{us:.1f} us, {count:.1f} x: {name[:120]}" for name, (us, count) in kernels if us > 1]


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of rows, by batch."""
    header = [name.removesuffix("_us") for name in rows[0]]
    by_batch = sorted(rows, key=lambda row: row["batch"])
    return vllm_engine.table(
        header, [[f"{value:.0f}" if isinstance(value, float) else value for value in row.values()] for row in by_batch]
    )


def main() -> int:
    """Run the engines, print the kernels of a step by their time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-8b", help="whose shapes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many of its layers (default: all)")
    parser.add_argument(
        "--kinds", nargs="+", choices=bench_serving.KINDS, default=["w4a16", "lut"], help="(default: %(default)s)"
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoints are made, or were made before")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--top", type=int, default=16, help="kernels that are printed")
    parser.add_argument("--wait", type=float, default=300, help="seconds for other engines to start (default: 300)")
    add_options(parser)
    args = parser.parse_args()
    directories = ensure(args.model, args.dir, args.layers)
    rows: list[dict[str, Any]] = []
    kernels: dict[str, list[str]] = {}
    failed = 0
    question = "Where does the time of a decode step go?"
    with tempfile.TemporaryDirectory(prefix="w4a8-profile-") as place, ThreadPoolExecutor() as pool:
        meeting = Path(place) / "started"
        meeting.mkdir()
        runs = {
            kind: pool.submit(trace, args, kind, directories[bench_serving.KINDS[kind].format], meeting)
            for kind in args.kinds
        }
        for kind, run in runs.items():
            try:
                batches = run.result()["batches"]
            except RuntimeError as error:  # the others are worth having
                print(f"{kind}: {error}", flush=True)
                failed = 1
                continue
            for found in batches:
                rows.append(row_of(kind, found))
                kernels[f"{kind}, batch {found['batch']}"] = kernels_of(found)
                print(f"\n{kind}, batch {found['batch']}:", *kernels_of(found)[: args.top], sep="\n")
            vllm_engine.finish(args, question, rows, text_of(rows), model=args.model, kernels=kernels)
    return failed


if __name__ == "__main__":
    vllm_engine.start(worker, main)
