"""Time what vLLM does with the weights after loading: the stock checkpoint against ours, `bench_load_time.py`.

Random checkpoints of Llama-8B's shapes and of one block of Command A's are made below `--dir` (13 GB; kept with
`--keep`). Each engine runs in a process of its own, eager (which is the faster path for the stock checkpoint: compiled,
its scale quantization is compiled first), with the GPU idle before and after every layer's
`process_weights_after_loading`. Engine start is all of `LLM(...)`: reading, loading, processing, profiling.
"""

import argparse
import json
import os
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

KINDS = ("stock", "lut")


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Start one engine in this process and return how long each layer's processing took."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that what is replaced here is what runs
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    layers: list[dict[str, Any]] = []
    total = 0.0
    process_model = base_loader.process_weights_after_loading

    def timed(method: Any, layer: Any) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        type(method).process_weights_after_loading(method, layer)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if hasattr(layer, "input_size_per_partition"):
            size = f"{sum(layer.output_partition_sizes)} x {layer.input_size_per_partition}"
        else:
            size = f"{layer.local_num_experts} experts"
        layers.append({"size": size, "ms": 1e3 * seconds})

    def timed_model(model: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal total
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if any(name.endswith("weight_packed") for name, _ in module.named_parameters(recurse=False)):
                # On the instance, shared or not, so that vLLM's loop calls it.
                method.process_weights_after_loading = lambda layer, method=method: timed(method, layer)
        torch.cuda.synchronize()
        start = time.perf_counter()
        process_model(model, *args, **kwargs)
        torch.cuda.synchronize()
        total += time.perf_counter() - start

    base_loader.process_weights_after_loading = timed_model
    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    del llm
    return {"layers": layers, "total_ms": 1e3 * total, "start_s": started}


def by_size(layers: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Group the layers' times by size, in order of appearance."""
    sizes: dict[str, list[float]] = {}
    for layer in layers:
        sizes.setdefault(layer["size"], []).append(layer["ms"])
    return sizes


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-8b", "command-a-block"])
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="four layers of each model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    results: dict[str, Any] = {}
    rows = []
    try:
        for name in args.shapes:
            shape = SHAPES[name]
            if args.quick:
                shape = replace(shape, layers=min(4, shape.layers))
            if not (root / name).is_dir():
                start = time.perf_counter()
                make(shape, root / name, KINDS)
                print(f"{name}: checkpoints made in {time.perf_counter() - start:.1f} s", flush=True)
            found = {}
            for kind in KINDS:
                llm = {
                    "model": str(root / name / kind),
                    "enforce_eager": True,
                    "skip_tokenizer_init": True,
                    "max_model_len": 1024,
                    "max_num_seqs": 8,
                    "gpu_memory_utilization": 0.6,
                    "generation_config": "vllm",
                }
                found[kind] = vllm_engine.run_worker(__file__, {"llm": llm})
                print(f"{name} {kind}: engine start {found[kind]['start_s']:.1f} s", flush=True)
            results[name] = found
            stock, ours = (by_size(found[kind]["layers"]) for kind in KINDS)
            for size, times in stock.items():
                pair = statistics.median(times), statistics.median(ours[size])
                rows.append((name, f"{size} (median of {len(times)})", *pair, max(times), max(ours[size])))
            totals = [found[kind]["total_ms"] for kind in KINDS]
            rows.append((name, "whole model", *totals, *totals))
            starts = [1e3 * found[kind]["start_s"] for kind in KINDS]
            rows.append((name, "engine start", *starts, *starts))
    finally:
        if not args.keep and args.dir is None:
            shutil.rmtree(root)
    text = vllm_engine.table(
        ("model", "N x K", "stock ms", "plugin ms", "plugin/stock", "stock max", "plugin max"),
        [
            (name, what, f"{a:.2f}", f"{b:.2f}", f"{100 * b / a:.2f} %", f"{worst_a:.1f}", f"{worst_b:.1f}")
            for name, what, a, b, worst_a, worst_b in rows
        ],
    )
    vllm_engine.finish({"quick": args.quick, "models": results}, text, args.json)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Path(sys.argv[3]).write_text(json.dumps(worker(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        sys.exit(main())
