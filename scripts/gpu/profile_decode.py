"""Where the time of a decode step goes, kernel by kernel: `profile_decode.py [--kinds w4a16 lut ...] [--batch 1 8 64]`.

The checkpoints and ways to serve them are those of bench_serving.py. All engines start side by side and are traced one
after the other, compiled with CUDA graphs, in processes of their own as vLLM comes: the last steps of each batch, as
step_traces.py says.
"""

import argparse
import fcntl
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import bench_serving
import step_traces
import vllm_engine
from make_random_checkpoint import SHAPES, ensure
from results import add_options


def worker(payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Trace decode steps of one engine, when all engines have started and no other is being traced."""
    from vllm import LLM

    meeting = Path(payload["meeting"])
    try:
        llm = LLM(**payload["llm"])
    finally:
        (meeting / payload["name"]).touch()
    deadline = time.monotonic() + payload["wait"]
    while len(list(meeting.iterdir())) < payload["engines"] and time.monotonic() < deadline:
        time.sleep(0.2)

    found: dict[str, Any] = {"batches": []}
    with (meeting.parent / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for batch in payload["batches"]:
            found["batches"].append(step_traces.traced(llm, batch))
            yield found


def trace(args: argparse.Namespace, kind: str, directory: Path, meeting: Path) -> dict[str, Any]:
    """Run one engine, and return what `worker` found."""
    cases, how = [(batch, step_traces.PROMPT) for batch in args.batch], bench_serving.KINDS[kind]
    llm = bench_serving.engine(args.model, args.layers, cases, how, directory)
    llm["gpu_memory_utilization"] = 0.15  # of several engines; only a check, since the cache's size is said
    payload = {"llm": llm, "batches": args.batch, "meeting": str(meeting), "name": kind}
    payload |= {"engines": len(args.kinds), "wait": args.wait}
    # Functions of this script run in the engine's process.
    env = bench_serving.environment(args.model, cases, how) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return vllm_engine.run_worker(__file__, payload, how.timeout + args.wait, env, how.plugins)


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
                rows.append(step_traces.row_of(kind, found))
                kernels[f"{kind}, batch {found['batch']}"] = step_traces.kernels_of(found)
                print(f"\n{kind}, batch {found['batch']}:", *step_traces.kernels_of(found)[: args.top], sep="\n")
            vllm_engine.finish(
                args, step_traces.QUESTION, rows, step_traces.text_of(rows), model=args.model, kernels=kernels
            )
    return failed


if __name__ == "__main__":
    vllm_engine.start(worker, main)
