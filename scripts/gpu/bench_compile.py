"""How long the decode kernels take to compile when a model is served for the first time, `bench_compile.py`.

    python scripts/gpu/bench_compile.py [--shapes 6144x4096 ...] [--tokens 1 2 4 ...] [--json FILE]

A process with an empty cache of Triton's runs the plugin's operators once for every layer's shape and number of tokens,
which is what vLLM does while it captures CUDA graphs; then another one with the cache that the first has left. The
time is that of all first calls, without starting Python. What is not the decode kernel's by its size is left out.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
"""Llama-8B's."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Call the operators once for each size in this process; return seconds of the first and of second calls."""
    import torch
    from contestants import plugin_quantize
    from random_layers import Layers

    from convert_w4a8.vllm_plugin import gemm as plugin

    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for n, k in payload["shapes"]:
            layers = Layers(n, k, 1)
            weights = (layers.packed[0].view(k // 8, n), layers.tables[0].flatten(), layers.channel)
            for m in payload["tokens"]:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                if plugin.takes(m, n):
                    plugin.gemm(*plugin_quantize(x, 1), *weights)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "second_s": seconds[1]}


def main() -> int:
    """Run both processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="(default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    payload = {"shapes": [list(map(int, shape.split("x"))) for shape in args.shapes], "tokens": args.tokens}
    rows = []
    with tempfile.TemporaryDirectory(prefix="w4a8-triton-") as cache:
        for what in ("an empty cache", "the cache that it has left"):
            found = vllm_engine.run_worker(__file__, payload, environment={"TRITON_CACHE_DIR": cache})
            size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            seconds = found["first_s"] - found["second_s"]
            rows.append({"what": what, "compile_s": seconds, "cache_mb": size / 1e6, "kernels": count(Path(cache))})
    cells = [(row["what"], f"{row['compile_s']:.1f}", row["kernels"], f"{row['cache_mb']:.1f}") for row in rows]
    text = vllm_engine.table(("first calls with", "s", "kernels in it", "MB"), cells)
    question = "How long do the decode kernels take to compile at the first start?"
    vllm_engine.finish(args, question, rows, text, cores=len(os.sched_getaffinity(0)))
    return 0


def count(cache: Path) -> int:
    """Return the number of kernels in a cache of Triton's."""
    return len(list(cache.rglob("*.cubin")))


if __name__ == "__main__":
    vllm_engine.start(worker, main)
