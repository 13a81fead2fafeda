"""Time what vLLM does with the weights after loading: the stock checkpoint against ours, `bench_load_time.py`.

Random checkpoints of Llama-8B's shapes and of one block of Command A's are made below `--dir` (13 GB; kept there, else
removed). Each engine runs in a process of its own, one after the other, eager (which is the faster path for the stock
checkpoint: compiled, its scale quantization is compiled first), with the GPU idle before and after every layer's
`process_weights_after_loading`. `load_model` is making the model, reading the files from the page cache, and
processing; engine start is all of `LLM(...)`.

So that whole starts compare, a small engine starts first and is not counted (the first engine of a machine does more:
vLLM inspects the model class), every file is read before, and the engines of a model take turns: stock, ours, ours
without its decode kernel, and all again the other way round. What is printed of a kind are medians over its engines.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import turns
import vllm_engine
from make_random_checkpoint import SHAPES, ensure
from results import VLLM_PACKAGES, add_options, save

WITHOUT = "lut:cutlass"
"""The plugin without its decode kernel."""
KINDS = ("stock", "lut", WITHOUT)
ORDER = (*KINDS, *reversed(KINDS))
COLUMNS = {"stock": "stock", "lut": "plugin", WITHOUT: "without"}
QUESTION = "How long does vLLM take to load a W4A8 model, with the plugin and without?"
LLM_OPTIONS = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 2 * 2**30,
    "gpu_memory_utilization": 0.5,
    "generation_config": "vllm",
}


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
            size = f"{sum(layer.output_partition_sizes)} × {layer.input_size_per_partition}"
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
    if payload["turn"]:
        turns.wait_for(Path(payload["turn"]))
    start = time.perf_counter()
    LLM(**payload["llm"])
    found["engine_start_ms"] = 1e3 * (time.perf_counter() - start)
    if not layers or "load_model_ms" not in found:
        raise RuntimeError("vLLM did not call what this script times: it was written for vLLM 0.25.1 to 0.33.0")
    return found


def run(directory: Path, kind: str = "stock", turn: Path | None = None) -> dict[str, Any]:
    """Start an engine in a process of its own; return what it found, and its process's seconds and kernels.

    turn: a file that the engine waits for, with everything imported.
    """
    environment = {"W4A8_LUT_DECODE": "cutlass"} if kind == WITHOUT else {}
    payload = {"llm": {"model": str(directory), **LLM_OPTIONS}, "turn": turn and str(turn)}
    return vllm_engine.run_worker(__file__, payload, environment=environment)


def engines(
    directories: Mapping[str, Mapping[str, Path]], order: Sequence[str], together: bool
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield each model and each kind of the order with a function that runs its engine.

    together: all import what they need at the same time, while one engine of each model, not counted, fills caches.
    """

    def start(name: str, turn: Path | None = None) -> dict[str, Any]:
        model, kind = name.split(" ")
        return run(directories[model][kind.partition(":")[0]], kind, turn)

    def fill_caches() -> None:
        with ThreadPoolExecutor() as pool:
            for result in [pool.submit(start, f"{model} lut") for model in directories]:
                result.exception()  # those that are counted say it again

    names = [f"{model} {kind}" for model in directories for kind in order]
    in_turn = ((name, partial(start, name)) for name in names)
    for name, result in turns.by_turns(names, start, before=fill_caches) if together else in_turn:
        model, kind = name.split(" ")
        yield model, kind, result


def read_files(directory: Path) -> None:
    """Bring a checkpoint into the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def by_size(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Group the layers' times of all runs by size, in order of appearance."""
    sizes: dict[str, list[float]] = {}
    for layer in (layer for run in runs for layer in run["layers"]):
        sizes.setdefault(layer["size"], []).append(layer["ms"])
    return sizes


def rows_of(name: str, found: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one model's rows: what, medians of each kind that there is, plugin / stock, and the largest times."""

    def row(what: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
        made: dict[str, Any] = {"model": name, "what": what}
        made |= {f"{COLUMNS[kind]}_ms": statistics.median(each) for kind, each in times.items()}
        if "lut" in times:
            made["ratio"] = made["plugin_ms"] / made["stock_ms"]
        return made | {f"{COLUMNS[kind]}_max_ms": max(each) for kind, each in times.items() if kind != WITHOUT}

    sizes = {kind: by_size(runs) for kind, runs in found.items()}
    rows = [
        row(f"layer {size}, median of {len(times)}", {kind: each[size] for kind, each in sizes.items()})
        for size, times in sizes["stock"].items()
    ]
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "all layers": lambda run: sum(layer["ms"] for layer in run["layers"]),
        "the first layer": lambda run: run["layers"][0]["ms"],
        "all layers, and vLLM's walk over all modules": lambda run: run["processing_ms"],
        "whole `load_model`": lambda run: run["load_model_ms"],
        "engine start, eager": lambda run: run["engine_start_ms"],
    }
    for what, measure in measures.items():
        rows.append(row(what, {kind: [measure(run) for run in runs] for kind, runs in found.items()}))
    return rows


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-8b", "command-a-block"])
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--layers", type=int, help="so many layers of each model at most (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="four layers of each model, each kind once, none uncounted"
    )
    parser.add_argument("--together", action="store_true", help="processes import side by side, then take turns")
    add_options(parser)
    args = parser.parse_args()
    if args.together and not args.quick:
        parser.error("--together goes with --quick: each kind once")
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    order = KINDS if args.quick else ORDER
    rows: list[dict[str, Any]] = []
    failed = 0
    try:
        if not args.quick:
            print(f"not counted: {run(ensure('tiny', root)['stock'])['wall_s']} s", flush=True)
        layers = args.layers or (4 if args.quick else None)
        directories = {name: ensure(name, root, layers) for name in args.shapes}
        for made in directories.values():
            for kind in ("stock", "lut"):
                read_files(made[kind])
        results: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name, kind, result in engines(directories, order, args.together):
            try:
                found = result()
            except RuntimeError as error:  # the others are worth having
                print(f"{name} {kind}: {error}", flush=True)
                failed = 1
                continue
            results.setdefault(name, {}).setdefault(kind, []).append(found)
            times = ", ".join(
                f"{what} {found[f'{what}_ms'] / 1e3:.2f} s" for what in ("processing", "load_model", "engine_start")
            )
            print(f"{name} {kind}: {times}; {', '.join(found['kernels'])}", flush=True)
            rows = [row for model, runs in results.items() if "stock" in runs for row in rows_of(model, runs)]
            save(args, QUESTION, rows, packages=VLLM_PACKAGES, settings={"order": order})
    finally:
        if args.dir is None:
            shutil.rmtree(root)
    names = ("stock_ms", "plugin_ms", "without_ms", "stock_max_ms", "plugin_max_ms")
    cells = [
        (row["model"], row["what"], *(f"{row[name]:.2f}" if name in row else "" for name in names)) for row in rows
    ]
    header = ("model", "what", *(name.removesuffix("_ms").replace("_", " ") for name in names))
    vllm_engine.finish(args, QUESTION, rows, vllm_engine.table(header, cells), order=order)
    return failed


if __name__ == "__main__":
    vllm_engine.start(worker, main)
