"""Check that a model answers the same after vLLM's sleep mode: `check_sleep.py CHECKPOINT... [--json FILE]`.

Each checkpoint is served compiled, with CUDA graphs and `enable_sleep_mode`: greedy tokens and their log-probabilities
before, after sleep level 1 (weights go to the host and come back) and after level 2 (weights are thrown away and loaded
anew, `reload_weights`) must be identical. A stock checkpoint may be given to compare with.
"""

import argparse
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options

BATCH = 16


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one engine in this process; return what it answered at first, and after each level of sleep."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all requests are there before the first step
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(**payload["llm"])
    # vLLM wants the GPU to have no less free memory asleep than before; other processes take some meanwhile.
    torch.accelerator.get_memory_info = lambda *_: (0, 1 << 40)
    settings = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=1, detokenize=False)
    generator = random.Random(0)
    prompts = [{"prompt_token_ids": [generator.randrange(500) for _ in range(8 + i)]} for i in range(BATCH)]

    def answers() -> list[Any]:
        answered = []
        for output in llm.generate(prompts, settings, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            entries = zip(tokens, output.outputs[0].logprobs, strict=True)
            answered.append((tokens, [entry[token].logprob for token, entry in entries]))
        return answered

    answers()
    first = answers()
    found: dict[str, Any] = {"again": answers() == first}
    for level in (1, 2):
        start = time.perf_counter()
        try:
            llm.sleep(level=level)
            if level == 1:
                llm.wake_up()
            else:
                llm.wake_up(tags=["weights"])
                llm.collective_rpc("reload_weights")
                llm.wake_up(tags=["kv_cache"])
            found[f"level {level}"] = answers() == first
        except Exception as error:  # noqa: BLE001 - a level that fails is what this looks for
            found[f"level {level}"] = f"{type(error).__name__}: {error}"[:300]
        found[f"level {level}, s"] = round(time.perf_counter() - start, 2)
    return found


def serve(directory: Path) -> dict[str, Any]:
    """Run an engine and return its row."""
    llm = {
        "model": str(directory),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_sleep_mode": True,
        "max_model_len": 1024,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 2**28,
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, BATCH]},
        "seed": 0,
    }
    try:
        found = vllm_engine.run_worker(__file__, {"llm": llm}, 140)
    except RuntimeError as error:
        found = {"failed": str(error)[-2000:]}
    return {"checkpoint": str(directory), **found}


def main() -> int:
    """Run the engines side by side, print the table, return 1 if an answer changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    add_options(parser)
    args = parser.parse_args()
    with ThreadPoolExecutor(len(args.checkpoints)) as pool:
        rows = list(pool.map(serve, args.checkpoints))
    asked = ("again", "level 1", "level 2")
    cells = [(row["checkpoint"], *(row.get(name, "failed") for name in asked)) for row in rows]
    for row in rows:
        if "failed" in row:
            print(row["failed"])
    text = vllm_engine.table(("checkpoint", "the same again", "after level 1", "after level 2"), cells)
    vllm_engine.finish(args, "Does a model answer the same after vLLM's sleep mode?", rows, text)
    return 0 if all(row.get(name) is True for row in rows for name in asked) else 1


if __name__ == "__main__":
    vllm_engine.start(worker, main)
