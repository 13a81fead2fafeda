"""How long the decode kernels take to compile when a model is served for the first time, `bench_compile.py`.

    python scripts/gpu/bench_compile.py [--shapes 6144x4096 ...] [--tokens 1 2 4 ...] [--engines MODEL] [--json FILE]

A process with an empty cache of Triton's runs the plugin's operators once for every layer's shape and number of tokens,
which is what vLLM does while it captures CUDA graphs; then another one with the cache that the first has left. The
time is that of all first calls, without starting Python. What is not the decode kernel's by its size is left out.

--engines: whole starts of vLLM, of random checkpoints of a model's shapes (four layers: a kernel is compiled once for
all), compiled and with CUDA graphs, with empty caches of Triton's and vLLM's and then with those that are left. The
plugin with and without its kernels start side by side.

--serve: eager engines of such models, with an empty cache, and how many of our kernels they compile while they start,
and later, for prompts of many lengths: none.

--no-compiler: the operators where there is no C compiler: whether they do as CUTLASS does, and what they warn of. Not a
whole engine: vLLM 0.25.1 does not start without one, since its sampler is Triton's.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import vllm_engine
from make_random_checkpoint import SHAPES as MODELS
from make_random_checkpoint import ensure
from results import VLLM_PACKAGES, add_options, save

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
"""Llama-8B's."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
KINDS = {"plugin": {}, "plugin without its kernels": {"W4A8_LUT_DECODE": "cutlass"}}
"""How an engine is started, and the environment variables of it."""
OURS = tuple(f"_{name}_kernel" for name in ("gemm", "prepare", "grouped", "activate", "quantize_pairs", "combine"))
PROMPTS = (1, 2, 3, 9, 17, 33, 65, 100, 129, 144, 200, 257, 300, 385, 449, 511, 513, 700, 1025)
"""Lengths of prompts, each of which is a step."""
COMPILERS = ("cc", "gcc", "clang", "c++", "g++")


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, or call the operators, in this process."""
    if "llm" in payload:
        return start_engine(payload)
    return compare_with_cutlass(payload) if payload.get("no_compiler") else call_operators(payload)


def hear() -> list[str]:
    """Return a list that gets what the plugin warns of."""
    import logging

    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "w4a8" in record.getMessage().lower())
    logging.getLogger("vllm").addHandler(handler)
    return heard


def compare_with_cutlass(payload: dict[str, Any]) -> dict[str, Any]:
    """Return whether the plugin's operators give CUTLASS's bytes for each size, and what the plugin warned of."""
    import torch
    from contestants import vllm_quantize
    from random_layers import Layers
    from vllm import _custom_ops as ops

    from convert_w4a8.vllm_plugin import gemm as plugin

    heard = hear()
    same = []
    for n, k in payload["shapes"]:
        layers = Layers(n, k, 1)
        weights = (layers.packed[0].view(k // 8, n), layers.tables[0].flatten(), layers.channel)
        for m in payload["tokens"]:
            tokens, scale = vllm_quantize(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
            names = ("a", "a_token_scales", "b_q", "b_group_scales", "b_channel_scales")
            given = dict(zip(names, (tokens, scale, *weights), strict=True))
            same.append(
                torch.equal(plugin.gemm(tokens, scale, *weights), ops.cutlass_w4a8_mm(b_group_size=128, **given))
            )
    return {"same": all(same), "warnings": heard}


def start_engine(payload: dict[str, Any]) -> dict[str, Any]:
    """Return how long an engine takes to start, how many of eight tokens it makes, and what the plugin warned of."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that warnings are heard here
    from vllm import LLM, SamplingParams

    heard = hear()
    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    seconds = time.perf_counter() - start
    settings = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    compiled = ours_in(Path(os.environ["TRITON_CACHE_DIR"]))
    for length in payload["prompts"]:
        (output,) = llm.generate([{"prompt_token_ids": [7] * length}], settings, use_tqdm=False)
    found = {"start_s": seconds, "tokens": len(output.outputs[0].token_ids), "warnings": heard}
    later = ours_in(Path(os.environ["TRITON_CACHE_DIR"])) - compiled
    return found | {"compiled": compiled, "compiled_later": later}


def ours_in(cache: Path) -> int:
    """Return how many of this package's decode kernels there are in a cache of Triton's."""
    return sum(len(list(cache.rglob(f"{name}.cubin"))) for name in OURS)


def call_operators(payload: dict[str, Any]) -> dict[str, Any]:
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


def engine(
    directory: Path,
    caches: Path,
    kind: str,
    *,
    eager: bool = False,
    prompts: Sequence[int] = (3,),
    **environment: str,
) -> dict[str, Any]:
    """Start an engine with caches of its own and return what it found, or the end of its log."""
    llm = {
        "model": str(directory),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": max(TOKENS),
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 2**30,
        "gpu_memory_utilization": 0.3,  # is only checked to be free
        "generation_config": "vllm",
        "enforce_eager": eager,
        "compilation_config": {"cudagraph_capture_sizes": list(TOKENS)},
    }
    own = caches / kind.replace(" ", "-")
    places = {"TRITON_CACHE_DIR": str(own / "triton"), "VLLM_CACHE_ROOT": str(own / "vllm")}
    places["TORCHINDUCTOR_CACHE_DIR"] = str(own / "inductor")
    try:
        payload = {"llm": llm, "prompts": prompts}
        return vllm_engine.run_worker(__file__, payload, environment=places | KINDS[kind] | environment)
    except RuntimeError as error:  # the others are worth having
        print(error, flush=True)
        return {"failed": str(error)[-3000:]}


def without_compiler(directory: Path) -> str:
    """Return a PATH of links to every program there is but C compilers."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = directory / program.name
            if not link.exists() and not program.name.endswith(COMPILERS) and not link.is_symlink():
                link.symlink_to(program.resolve())
    return str(directory)


def starts(name: str, root: Path, caches: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of starting a model of random weights."""
    directory = ensure(name, root, 4)["lut"]
    for what in ("empty caches", "the caches that it has left"):
        with ThreadPoolExecutor(len(KINDS)) as pool:
            found = pool.map(lambda kind: engine(directory, caches, kind), KINDS)
        for kind, result in zip(KINDS, found, strict=True):
            yield {"what": f"{name}, {kind}, {what}", **result}


def call_without_compiler(payload: dict[str, Any], caches: Path) -> dict[str, Any]:
    """Return a row for the operators in a process that finds no C compiler."""
    path = without_compiler(Path(tempfile.mkdtemp(prefix="path-", dir=caches)))
    environment = {"PATH": path, "TRITON_CACHE_DIR": str(caches / "no-compiler")}
    found = vllm_engine.run_worker(__file__, payload | {"no_compiler": True}, environment=environment)
    same = "the bytes of CUTLASS" if found["same"] else "other bytes than CUTLASS"
    return {"what": f"the operators, without a C compiler: {same}", "warnings": found["warnings"]}


def serve(name: str, root: Path, caches: Path) -> dict[str, Any]:
    """Return a row for an eager engine that serves prompts of many lengths."""
    directory = ensure(name, root, 4)["lut"]
    return {"what": f"{name}, eager", **engine(directory, caches / name, "plugin", eager=True, prompts=PROMPTS)}


def main() -> int:
    """Run the processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, help="(default: %(default)s; or none)")
    parser.add_argument("--engines", choices=MODELS, help="start engines with such a model too")
    parser.add_argument("--no-compiler", action="store_true", help="call the operators without a C compiler too")
    parser.add_argument(
        "--serve", nargs="+", choices=MODELS, default=[], help="serve prompts of many lengths with such"
    )
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    add_options(parser)
    args = parser.parse_args()
    payload = {"shapes": [list(map(int, shape.split("x"))) for shape in args.shapes], "tokens": args.tokens}
    question = "How long do the decode kernels take to compile at the first start?"
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        """Write what there is: one that does not end takes nothing with it."""
        print({key: value for key, value in row.items() if key != "failed"}, flush=True)
        rows.append(row)
        save(args, question, rows, packages=VLLM_PACKAGES, settings={"cores": len(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory(prefix="w4a8-triton-") as directory:
        cache = Path(directory) / "operators"
        root = args.dir or Path(directory) / "checkpoints"
        for what in (
            ("the operators, an empty cache", "the operators, the cache that it has left") if args.tokens else ()
        ):
            found = vllm_engine.run_worker(__file__, payload, environment={"TRITON_CACHE_DIR": str(cache)})
            size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
            seconds = found["first_s"] - found["second_s"]
            keep({"what": what, "compile_s": seconds, "cache_mb": size / 1e6, "compiled": ours_in(cache)})
        for name in args.serve:
            keep(serve(name, root, Path(directory)))
        if args.no_compiler:
            keep(call_without_compiler(payload, Path(directory)))
        if args.engines:
            for row in starts(args.engines, root, Path(directory)):
                keep(row)
    cells = [
        (
            row["what"],
            f"{row['compile_s']:.1f}" if "compile_s" in row else "",
            f"{row['start_s']:.1f}" if "start_s" in row else "",
            row.get("compiled", ""),
            row.get("compiled_later", ""),
            "failed" if "failed" in row else "; ".join(row.get("warnings", [])),
        )
        for row in rows
    ]
    text = vllm_engine.table(
        ("first calls with", "compiling, s", "engine start, s", "kernels in it", "compiled later", "warnings"), cells
    )
    vllm_engine.finish(args, question, rows, text, cores=len(os.sched_getaffinity(0)))
    return 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
