"""Measure the decode GEMM over the LUT layout on a CUDA GPU, beside other kernels and the memory, in one run.

    python scripts/gpu/bench_decode.py [--shapes 6144x4096 ...] [--tokens 1 16 64 ...] [--only ours cutlass ...]
        [--vllm-ops _C_stable_libtorch.abi3.so] [--json FILE]

Every time is one call in a CUDA graph of calls with different weights, which exceed the L2 several times; launches are
included. `NAME_us` is all that a layer needs with BF16 activations, `NAME_before_us` the same without quantizing them,
where the kernel wants FP8. The floor is the layer's bytes (codes, and one for each group) at the rate of a reduction of
2 GiB. contestants.py is the table of kernels; one that cannot be loaded, fails or is wrong (compared with float64) has
no time, and `settings` says why.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from contestants import (
    CONTESTANTS,
    PEERS,
    Prepared,
    humming_layer,
    humming_tuning,
    load_vllm_ops,
)
from graph_timing import Call, bytes_per_microsecond, microseconds
from random_layers import Layers
from results import VLLM_PACKAGES, add_options, line, save

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "12288x33792", "1536x2048")
TOKENS = (1, 8, 16, 32, 64, 128)
LAUNCHES = 12
"""Calls of a CUDA graph at least."""
MULTIPLIED, QUANTIZED = 0.01, 0.06
"""The largest distance from float64, as a share of the result's length: of a product, and of one with activations that
were quantized to FP8."""
QUESTION = "How fast is a linear layer at small batches, beside other kernels and the memory?"

Row = dict[str, Any]


def main() -> None:
    """Measure, print, and exit with 1 where a result of ours is wrong."""
    args = parse()
    torch.manual_seed(0)
    rows: list[Row] = []
    reasons: dict[str, str] = {}
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    load_vllm_ops(args.vllm_ops)
    if names := [name for name in args.only if name.startswith("humming")]:
        compile_humming(names, shapes, args.tokens)
    for n, k in shapes:
        layers = Layers(n, k)
        rows += compare(layers, args.tokens, args.only, reasons)
        document = save(
            args, QUESTION, rows, packages=(*VLLM_PACKAGES, "humming-kernels"), settings={"missing": reasons}
        )
        del layers
        torch.cuda.empty_cache()
    print(*(f"{what}: {why}" for what, why in reasons.items()), line(document), sep="\n")
    if any(what.startswith("ours") and "error" in why for what, why in reasons.items()):
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=TOKENS, help="rows of activations (default: all of %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=tuple(CONTESTANTS), help="(default: all)")
    parser.add_argument(
        "--vllm-ops", type=Path, metavar="FILE", help="load vLLM's operators from there, not from the package"
    )
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    return args


def compare(layers: Layers, tokens: Sequence[int], names: Sequence[str], reasons: dict[str, str]) -> list[Row]:
    """Return the times of all kernels on one shape, a row for each number of tokens, and note what is missing."""
    floor = layers.nbytes / bytes_per_microsecond()
    rows: list[Row] = [{"n": layers.n, "k": layers.k, "m": m, "floor_us": floor} for m in tokens]
    activations = [torch.randn(m, layers.k, device=layers.device, dtype=torch.bfloat16) for m in tokens]
    for name in names:
        try:
            prepared = CONTESTANTS[name](layers, tokens)
        except Exception as error:  # noqa: BLE001 - one kernel's absence must not end the run
            reasons[f"{name} {layers.n}x{layers.k}"] = first_line(error)
            continue
        for row, x in zip(rows, activations, strict=True):
            try:
                race(name, prepared, x, row)
            except Exception as error:  # noqa: BLE001
                reasons[f"{name} {layers.n}x{layers.k} M={row['m']}"] = first_line(error)
        del prepared
        torch.cuda.empty_cache()
    for row in rows:
        row.update(standing(row))
        show(row)
    return rows


def race(name: str, prepared: Prepared, x: torch.Tensor, row: Row) -> None:
    """Note a kernel's times and error in a row. ArithmeticError where it is wrong."""
    limit = MULTIPLIED
    if prepared.before is not None:
        calls, multiplied = prepared.before(x)
        row[f"{name}_error"] = checked(calls[0], prepared.exact(multiplied), MULTIPLIED)
        row[f"{name}_before_us"] = microseconds(calls, LAUNCHES)
        limit = QUANTIZED
    calls = prepared.whole(x)
    row.setdefault(f"{name}_error", checked(calls[0], prepared.exact(x), limit))
    row[f"{name}_us"] = microseconds(calls, LAUNCHES)


def checked(call: Call, exact: torch.Tensor, limit: float) -> float:
    """Return the distance of a result from the exact one as a share of its length. ArithmeticError beyond the limit."""
    error = float((call().double() - exact).norm() / exact.norm())
    if not error <= limit:  # also where it is no number
        raise ArithmeticError(f"error {error:.4f} is more than {limit}")
    return error


def standing(row: Mapping[str, Any]) -> Row:
    """Return which other kernel of 4-bit weights is the fastest, and how much more ours does in the same time."""
    times = {name: row[f"{name}_us"] for name in PEERS if f"{name}_us" in row}
    if not times or "ours_us" not in row:
        return {}
    best = min(times, key=lambda name: times[name])
    return {"best_peer": best, "gain": times[best] / row["ours_us"] - 1, "bandwidth": row["floor_us"] / row["ours_us"]}


def compile_humming(names: Sequence[str], shapes: Sequence[tuple[int, ...]], tokens: Sequence[int]) -> None:
    """Have humming compile its kernels, those of all shapes side by side. What fails says so when its turn comes."""

    def compile_one(name: str, n: int, k: int) -> None:
        words = torch.zeros(n, k // 8, dtype=torch.int32, device="cuda")
        scales = torch.ones(n, k // 128, dtype=torch.bfloat16, device="cuda")
        layer = humming_layer(words, scales, "float8e4m3" if name == "humming_w4a8" else "bfloat16")
        layer(torch.zeros(1, k, dtype=torch.bfloat16, device="cuda"), tuning_config=humming_tuning(layer, tokens))

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in names:
            for n, k in shapes:
                pool.submit(compile_one, name, n, k)
    torch.cuda.empty_cache()
    print(f"humming compiled what it needs in {time.perf_counter() - start:.0f} s", flush=True)


def show(row: Mapping[str, Any]) -> None:
    """Print the times of one shape and number of tokens."""
    text = f"{row['n']:>6} x {row['k']:<6} M = {row['m']:<4}"
    text += "".join(f" | {name[:-3]} {value:6.1f}" for name, value in row.items() if name.endswith("_us"))
    if "gain" in row:
        text += f" | {row['gain']:+.0%} over {row['best_peer']}, {row['bandwidth']:.0%} of the memory"
    print(text, flush=True)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


if __name__ == "__main__":
    main()
