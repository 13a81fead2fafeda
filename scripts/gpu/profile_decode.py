"""Where the time of a decode step goes, kernel by kernel: `profile_decode.py CHECKPOINT [--batch 1] [--top 25]`.

One engine, compiled with CUDA graphs; the steps between the first and the last token are traced (torch.profiler), and
what the GPU ran is summed up by kernel: microseconds and launches a step. The rest of a step is the time in which no
kernel ran.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options

STEPS = 32


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Trace decode steps of one engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    llm = LLM(**payload["llm"])
    found = []
    for batch in payload["batches"]:
        prompts = [{"prompt_token_ids": [5 + i, 7, 11, 13 + i]} for i in range(batch)]

        def run(tokens: int, prompts: list[dict[str, Any]] = prompts) -> float:
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begin

        run(STEPS)
        step_us = (run(4 * STEPS) - run(2 * STEPS)) / (2 * STEPS) * 1e6
        kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for tokens, sign in ((2 * STEPS, 1), (STEPS, -1)):  # the difference leaves prefill out
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                run(tokens)
            for event in trace.key_averages():
                kernels[event.key][0] += sign * event.self_device_time_total / STEPS
                kernels[event.key][1] += sign * event.count / STEPS
        found.append({"batch": batch, "step_us": step_us, "kernels": dict(kernels)})
    return {"batches": found}


def main() -> int:
    """Run the engine, print the kernels of a step by their time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--top", type=int, default=25, help="kernels that are printed")
    add_options(parser)
    args = parser.parse_args()
    llm = {
        "model": str(args.checkpoint),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 4 << 30,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]},
        "generation_config": "vllm",
    }
    result = vllm_engine.run_worker(__file__, {"llm": llm, "batches": args.batch})
    rows, text = [], ""
    for found in result["batches"]:
        kernels = sorted(found["kernels"].items(), key=lambda item: -item[1][0])
        busy = sum(us for _, (us, _) in kernels)
        text += f"\nbatch {found['batch']}: step {found['step_us']:.0f} us, kernels {busy:.0f} us\n"
        for name, (us, count) in kernels[: args.top]:
            text += f"{us:9.1f} us {count:7.1f} x {us / max(count, 1e-9):7.2f}  {name[:110]}\n"
        rows += [
            {"batch": found["batch"], "kernel": name, "us": us, "launches": count, "step_us": found["step_us"]}
            for name, (us, count) in kernels
            if us > 0
        ]
    vllm_engine.finish(args, "Where does the time of a decode step go?", rows, text, checkpoint=args.checkpoint.name)
    return 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
