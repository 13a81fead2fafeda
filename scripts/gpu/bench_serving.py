"""Time to first token and per output token: W4A16 (the source) against our W4A8, `bench_serving.py`.

A random checkpoint of Llama-8B's shapes is made below `--dir` (13 GB; kept there, else removed). Each engine runs in a
process of its own, one after the other, compiled with CUDA graphs and scheduled as vLLM comes, without prefix caching.
All requests of a batch arrive together. TTFT and TPOT are means over the requests, by the engine's own clock: arrival
to first token, and first to last token divided by the tokens between. Medians of `--repeats` runs with fresh random
prompts after one warm-up; "faster" is W4A16's time / ours − 1. Which kernel vLLM chose is taken from its log.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from make_random_checkpoint import FORMATS, SHAPES, ensure
from results import add_options

CASES: tuple[tuple[int, int], ...] = ((1, 512), (8, 512), (32, 512), (64, 512), (128, 512), (1, 8192))
"""Batch size and prompt tokens."""
NEW_TOKENS = 128
CUTLASS = "lut:cutlass"
"""The plugin without its decode kernel."""


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Time all cases on one engine in this process."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    generator = random.Random(0)

    def timed(batch: int, length: int, tokens: int) -> tuple[float, float, float]:
        """Return mean TTFT and mean TPOT in ms, and the wall time of the batch in s."""
        prompts = [
            {"prompt_token_ids": [generator.randrange(payload["vocabulary"]) for _ in range(length)]}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        stats = [output.metrics for output in outputs]
        first = statistics.fmean(found.first_token_latency for found in stats)
        each = statistics.fmean((found.last_token_ts - found.first_token_ts) / (tokens - 1) for found in stats)
        return 1e3 * first, 1e3 * each, seconds

    cases = []
    for batch, length in payload["cases"]:
        timed(batch, length, 8)
        runs = [timed(batch, length, NEW_TOKENS) for _ in range(payload["repeats"])]
        ttft, tpot, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
        cases.append({"batch": batch, "prompt": length, "ttft_ms": ttft, "tpot_ms": tpot, "batch_s": seconds})
    return {"cases": cases, "start_s": round(started, 1)}


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=[*FORMATS, CUTLASS],
        default=("w4a16", "stock", CUTLASS, "lut"),
        help="the baseline, and what is compared with it",
    )
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="four layers, one repeat, batch 1 and 16")
    add_options(parser)
    args = parser.parse_args()
    shape, cases = SHAPES[args.shape], CASES
    if args.quick:
        cases, args.repeats = CASES[:2], 1
    # Keys and values in BF16 of all requests of the largest case, and a little.
    cached = max(batch * (length + NEW_TOKENS + 16) for batch, length in cases)
    token_bytes = 2 * 2 * shape.kv_heads * shape.head_dim * shape.layers
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    found: dict[str, Any] = {}
    try:
        directories = ensure(args.shape, root, 4 if args.quick else None)
        for kind in args.kinds:
            llm = {
                "model": str(directories[kind.partition(":")[0]]),
                "dtype": "bfloat16",
                "skip_tokenizer_init": True,
                "max_model_len": max(length for _, length in cases) + 2 * NEW_TOKENS,
                "max_num_seqs": 128,
                "max_num_batched_tokens": 8192,
                "kv_cache_memory_bytes": int(1.2 * cached * token_bytes) + 2**28,
                "gpu_memory_utilization": 0.5,
                "enable_prefix_caching": False,
                "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]},
                "disable_log_stats": False,  # or requests have no metrics
                "generation_config": "vllm",
            }
            payload = {"llm": llm, "cases": cases, "repeats": args.repeats, "vocabulary": shape.vocabulary}
            environment = {"W4A8_LUT_DECODE": "cutlass"} if kind == CUTLASS else {}
            found[kind] = vllm_engine.run_worker(__file__, payload, environment=environment)
            kernels = ", ".join(found[kind]["kernels"])
            print(f"{kind}: start {found[kind]['start_s']} s, all {found[kind]['wall_s']} s; {kernels}", flush=True)
    finally:
        if args.dir is None:
            shutil.rmtree(root)
    base, *others = args.kinds
    rows = [
        {
            "kind": kind,
            "batch": a["batch"],
            "prompt": a["prompt"],
            **{f"{name}_base": a[name] for name in ("ttft_ms", "tpot_ms", "batch_s")},
            **{name: b[name] for name in ("ttft_ms", "tpot_ms", "batch_s")},
            **{f"{name}_gain": a[f"{name}_ms"] / b[f"{name}_ms"] - 1 for name in ("ttft", "tpot")},
        }
        for kind in others
        for a, b in zip(found[base]["cases"], found[kind]["cases"], strict=True)
    ]
    times = ("ttft_ms_base", "ttft_ms", "tpot_ms_base", "tpot_ms")
    cells = [
        (
            row["kind"],
            row["batch"],
            row["prompt"],
            *(f"{row[name]:.2f}" for name in times),
            *(f"{100 * row[name]:+.0f} %" for name in ("ttft_gain", "tpot_gain")),
        )
        for row in rows
    ]
    header = ("kind", "batch", "prompt", f"TTFT ms {base}", "TTFT ms", f"TPOT ms {base}", "TPOT ms")
    text = vllm_engine.table((*header, "TTFT faster", "TPOT faster"), cells)
    chosen = {kind: result["kernels"] for kind, result in found.items()}
    text += "".join(f"\n{kind}: {', '.join(names)}" for kind, names in chosen.items())
    settings = {"shape": args.shape, "quick": args.quick, "new_tokens": NEW_TOKENS, "kernels": chosen}
    vllm_engine.finish(args, f"How fast is serving, beside {base}?", rows, text, **settings)
    return 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
