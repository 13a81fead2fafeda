"""Time what vLLM does with the weights after loading: the stock checkpoint against ours, `bench_load_time.py`.

Random checkpoints of Llama-8B's shapes and of one block of Command A's are made below `--dir` (13 GB; kept there, else
removed). Each engine runs in a process of its own, one after the other, eager (which is the faster path for the stock
checkpoint: compiled, its scale quantization is compiled first), with the GPU idle before and after every layer's
`process_weights_after_loading`. `load_model` is making the model, reading the files from the page cache, and
processing; engine start is all of `LLM(...)`. Ours goes first: what the first engine of a machine does in addition
(vLLM inspects the model class) counts against it.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine
from make_random_checkpoint import SHAPES, ensure

KINDS = ("lut", "stock")


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Start one engine in this process and return how long each layer's processing took."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that what is replaced here is what runs
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    layers: list[dict[str, Any]] = []
    found: dict[str, Any] = {"layers": layers}
    process_model, load_model = base_loader.process_weights_after_loading, base_loader.BaseModelLoader.load_model

    def timed(method: Any, layer: Any) -> None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        type(method).process_weights_after_loading(method, layer)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if hasattr(layer, "output_partition_sizes"):
            size = f"{sum(layer.output_partition_sizes)} x {layer.input_size_per_partition}"
        else:
            size = f"{layer.local_num_experts} experts"
        layers.append({"size": size, "ms": 1e3 * seconds})

    def timed_processing(model: Any, *args: Any, **kwargs: Any) -> None:
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if any(name.endswith("weight_packed") for name, _ in module.named_parameters(recurse=False)):
                # On the instance, shared or not, so that vLLM's loop calls it.
                method.process_weights_after_loading = lambda layer, method=method: timed(method, layer)
        torch.cuda.synchronize()
        start = time.perf_counter()
        process_model(model, *args, **kwargs)
        torch.cuda.synchronize()
        found["processing_ms"] = 1e3 * (time.perf_counter() - start)

    def timed_loading(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        model = load_model(*args, **kwargs)
        torch.cuda.synchronize()
        found["load_model_ms"] = 1e3 * (time.perf_counter() - start)
        return model

    base_loader.process_weights_after_loading = timed_processing
    base_loader.BaseModelLoader.load_model = timed_loading
    start = time.perf_counter()
    LLM(**payload["llm"])
    found["engine_start_ms"] = 1e3 * (time.perf_counter() - start)
    if not layers or "load_model_ms" not in found:
        raise RuntimeError("vLLM did not call what this script times: it was written for vLLM 0.25.1 to 0.33.0")
    return found


def by_size(layers: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Group the layers' times by size, in order of appearance."""
    sizes: dict[str, list[float]] = {}
    for layer in layers:
        sizes.setdefault(layer["size"], []).append(layer["ms"])
    return sizes


def rows_of(name: str, found: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return one model's rows: what, stock ms, plugin ms, their ratio, and the slowest layer of each."""
    stock, ours = (by_size(found[kind]["layers"]) for kind in ("stock", "lut"))
    rows: list[tuple[Any, ...]] = []
    for size, times in stock.items():
        mine = ours[size]
        pair = statistics.median(times), statistics.median(mine)
        rows.append((f"{size}, median of {len(times)}", *pair, f"{max(times):.1f}", f"{max(mine):.1f}"))
    layers = [sum(layer["ms"] for layer in found[kind]["layers"]) for kind in ("stock", "lut")]
    rows.append(("all layers", *layers, "", ""))
    for what, key in (
        ("processing, whole model", "processing_ms"),
        ("load_model", "load_model_ms"),
        ("engine start", "engine_start_ms"),
    ):
        rows.append((what, *(found[kind][key] for kind in ("stock", "lut")), "", ""))
    return [
        (name, what, f"{a:.2f}", f"{b:.2f}", f"{100 * b / a:.2f} %", worst_a, worst_b)
        for what, a, b, worst_a, worst_b in rows
    ]


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-8b", "command-a-block"])
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--quick", action="store_true", help="four layers of each model")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    results: dict[str, Any] = {}
    rows = []
    try:
        for name in args.shapes:
            directories = ensure(name, root, 4 if args.quick else None)
            results[name] = {}
            for kind in KINDS:
                llm = {
                    "model": str(directories[kind]),
                    "enforce_eager": True,
                    "skip_tokenizer_init": True,
                    "max_model_len": 1024,
                    "max_num_seqs": 8,
                    "max_num_batched_tokens": 1024,
                    "kv_cache_memory_bytes": 2 * 2**30,
                    "gpu_memory_utilization": 0.5,
                    "generation_config": "vllm",
                }
                found = results[name][kind] = vllm_engine.run_worker(__file__, {"llm": llm})
                print(f"{name} {kind}: process {found['wall_s']} s; {', '.join(found['kernels'])}", flush=True)
            rows += rows_of(name, results[name])
    finally:
        if args.dir is None:
            shutil.rmtree(root)
    header = ("model", "N x K", "stock ms", "plugin ms", "plugin/stock", "stock max", "plugin max")
    text = vllm_engine.table(header, rows)
    vllm_engine.finish({"quick": args.quick, "models": results}, text, args.json)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Path(sys.argv[3]).write_text(json.dumps(worker(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        sys.exit(main())
