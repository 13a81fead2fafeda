"""Time to first token and per output token: W4A16 (the source) against our W4A8, `bench_serving.py`.

A random checkpoint of Llama-8B's shapes is made below `--dir` in both formats (12 GB; `--keep` keeps it). Each engine
runs in a process of its own, compiled with CUDA graphs as vLLM comes, without prefix caching. All requests of a batch
arrive together. TTFT is the wall time of a run that generates one token per request; TPOT is what each further token
adds: (time for 1 + n tokens − TTFT) / n. Medians of `--repeats` runs with fresh random prompts after one warm-up.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine
from make_random_checkpoint import SHAPES, make

KINDS = ("w4a16", "lut")
CASES = ((1, 512), (16, 512), (64, 512), (1, 8192), (8, 8192))
"""Batch size and prompt tokens."""
NEW_TOKENS = 128


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Time all cases on one engine in this process."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    generator = random.Random(0)

    def timed(batch: int, length: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [generator.randrange(payload["vocabulary"]) for _ in range(length)]}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds

    cases = []
    for batch, length in payload["cases"]:
        timed(batch, length, 8)
        first = statistics.median(timed(batch, length, 1) for _ in range(payload["repeats"]))
        full = statistics.median(timed(batch, length, 1 + NEW_TOKENS) for _ in range(payload["repeats"]))
        tpot = (full - first) / NEW_TOKENS
        cases.append({"batch": batch, "prompt": length, "ttft_ms": 1e3 * first, "tpot_ms": 1e3 * tpot})
        print(cases[-1], flush=True)
    return {"cases": cases, "start_s": round(started, 1)}


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--kinds", nargs="+", choices=("w4a16", "stock", "lut"), default=KINDS)
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="eight layers, one repeat, batch 1 and 16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape, cases = SHAPES[args.shape], CASES
    if args.quick:
        shape, cases, args.repeats = replace(shape, layers=min(8, shape.layers)), CASES[:2], 1
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    found: dict[str, Any] = {}
    try:
        if not (root / args.shape).is_dir():
            make(shape, root / args.shape, tuple(args.kinds))
        for kind in args.kinds:
            llm = {
                "model": str(root / args.shape / kind),
                "skip_tokenizer_init": True,
                "max_model_len": max(length for _, length in cases) + 2 * NEW_TOKENS,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 8192,
                "gpu_memory_utilization": 0.85,
                "enable_prefix_caching": False,
                "generation_config": "vllm",
            }
            payload = {"llm": llm, "cases": cases, "repeats": args.repeats, "vocabulary": shape.vocabulary}
            found[kind] = vllm_engine.run_worker(__file__, payload)
            print(f"{kind}: start {found[kind]['start_s']} s, all {found[kind]['wall_s']} s", flush=True)
    finally:
        if not args.keep and args.dir is None:
            shutil.rmtree(root)
    base, ours = args.kinds[0], args.kinds[-1]
    rows = []
    for a, b in zip(found[base]["cases"], found[ours]["cases"], strict=True):
        numbers = [a["ttft_ms"], b["ttft_ms"], a["tpot_ms"], b["tpot_ms"]]
        faster = [f"{100 * (x / y - 1):+.0f} %" for x, y in (numbers[:2], numbers[2:])]
        rows.append((a["batch"], a["prompt"], *(f"{number:.2f}" for number in numbers), *faster))
    header = ("batch", "prompt", f"TTFT ms {base}", f"TTFT ms {ours}", f"TPOT ms {base}", f"TPOT ms {ours}")
    text = vllm_engine.table((*header, "TTFT faster", "TPOT faster"), rows)
    vllm_engine.finish({"shape": args.shape, "quick": args.quick, "engines": found}, text, args.json)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Path(sys.argv[3]).write_text(json.dumps(worker(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        sys.exit(main())
