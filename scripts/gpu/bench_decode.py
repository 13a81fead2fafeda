"""Measure the decode GEMM over the LUT layout on a CUDA GPU, beside vLLM's kernels and the memory, in one run.

    python scripts/gpu/bench_decode.py [--shapes 6144x4096 ...] [--tokens 1 16 64 ...] [--tune] [--json FILE]

Every time is one call in a CUDA graph of calls with different weights, which exceed the L2 several times; launches
are included. The floor is the layer's bytes (codes and tables) at the rate of a reduction of 2 GiB. Peers are
vLLM's own ops, where vLLM is installed: CUTLASS W4A8, Machete W4A16, BF16 by torch. Every result of ours is compared
with float64 first. With --tune, ways of cutting the work are tried, and the best of each printed.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import Call, microseconds
from results import VLLM_PACKAGES, add_options, line, save

from convert_w4a8.kernels.gemm import gpu, reference

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "12288x33792", "1536x2048")
TOKENS = (1, 8, 16, 32, 64, 128)
LAUNCHES = 12
"""Calls of a CUDA graph at least."""
U4B8 = 1125899907892224
"""vLLM's number of the scalar type of codes with bias 8."""

Row = dict[str, Any]


class Layers:
    """As many random layers of one shape as exceed the L2 four times, with tables of entries of either sign."""

    def __init__(self, n: int, k: int, count: int | None = None) -> None:
        self.n, self.k = n, k
        self.nbytes = n * k // 2 + n * k // 16
        count = count or max(3, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / self.nbytes))
        self.packed = [
            torch.randint(-(2**31), 2**31, (k // 32, 4 * n), dtype=torch.int32, device="cuda") for _ in range(count)
        ]
        self.tables = [
            torch.randn(k // 128, n, 8, device="cuda").mul(8).clamp(-56, 56).to(torch.float8_e4m3fn)
            for _ in range(count)
        ]
        self.channel = torch.rand(n, device="cuda") / 64


class Activations:
    """Random activations, in 16 bits and as FP8 with token scales."""

    def __init__(self, m: int, k: int) -> None:
        self.m = m
        self.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.scale = (self.x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        self.tokens = (self.x.float() / self.scale).to(torch.float8_e4m3fn)


def ours(layers: Layers, act: Activations, launch: gpu.Launch) -> list[Call]:
    """Return our kernel on each of the layers, activations quantized before."""
    return [
        partial(gpu.gemm_by, act.tokens, act.scale, packed, tables, layers.channel, launch)
        for packed, tables in zip(layers.packed, layers.tables, strict=True)
    ]


def relative_error(layers: Layers, act: Activations, call: Call) -> float:
    """Return the distance of a result for the first layer from float64, as a share of its length."""
    weights = reference.weights(layers.packed[0], layers.tables[0]).double()
    exact = (act.tokens.double() @ weights.t()) * layers.channel.double() * act.scale.double()
    return float((call().double() - exact).norm() / exact.norm())


def peers(layers: Layers, act: Activations) -> Iterator[tuple[str, list[Call]]]:
    """Yield the other kernels that are here, on layers of the same shape."""
    n, k = layers.n, layers.k
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, len(layers.packed) // 4))]
    yield "bf16", [partial(torch.nn.functional.linear, act.x, w) for w in weights]
    ops = vllm_ops()
    if ops is None:
        return
    channel = layers.channel.view(-1, 1)
    cutlass: list[Call] = []
    for packed, tables in zip(layers.packed, layers.tables, strict=True):
        shown = packed.view(-1).view(n, k // 8).t()
        cutlass.append(
            partial(ops.cutlass_w4a8_mm, act.tokens, shown, tables.flatten(), 128, channel, act.scale, None, None)
        )
    yield "cutlass", cutlass
    scales = (torch.rand(k // 128, n, device="cuda") / 64).bfloat16()
    machete: list[Call] = []
    for packed in layers.packed:
        laid = ops.machete_prepack_B(packed.view(-1).view(n, k // 8).t(), torch.bfloat16, U4B8, torch.bfloat16)
        machete.append(partial(ops.machete_mm, act.x, laid, U4B8, None, scales, None, 128, None, None, None))
    yield "machete", machete


def vllm_ops() -> Any:
    """Return vLLM's CUDA ops, or None where it is not installed."""
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError:
        return None
    return torch.ops._C  # noqa: SLF001 - where vLLM registers them


def candidates(m: int, n: int, k: int) -> list[gpu.Launch]:
    """Return the ways of cutting the work that are worth a try."""
    block = gpu.choose_launch(m, n, k, 1).block_m
    splits = [s for s in (1, 2, 3, 4, 6, 8) if s <= k // 128]
    return [gpu.Launch(block, s, stages, chain=chain) for s, stages, chain in product(splits, (4, 5), (False, True))]


def measure(layers: Layers, act: Activations, launch: gpu.Launch) -> Row:
    """Return our time and error for one way of cutting the work."""
    calls = ours(layers, act, launch)
    row = {"n": layers.n, "k": layers.k, "m": act.m, "error": relative_error(layers, act, calls[0])}
    return row | {"ours_us": microseconds(calls, LAUNCHES)} | asdict(launch)


@cache
def bytes_per_microsecond() -> float:
    """Return how fast a reduction of 2 GiB reads."""
    words = torch.ones(1 << 29, dtype=torch.float32, device="cuda")
    return words.nbytes / microseconds([partial(torch.sum, words)] * 2, LAUNCHES)


def compare(layers: Layers, act: Activations) -> Row:
    """Return the times of our kernel as it comes, of reading the layer, and of the other kernels."""
    floor = layers.nbytes / bytes_per_microsecond()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    row = measure(layers, act, gpu.choose_launch(act.m, layers.n, layers.k, sms)) | {"floor_us": floor}
    for name, calls in peers(layers, act):
        row[f"{name}_us"] = microseconds(calls, LAUNCHES)
        if name == "cutlass":
            row["cutlass_error"] = relative_error(layers, act, calls[0])
    return row


def show(row: Row) -> None:
    """Print the figures of one shape and number of tokens."""
    text = f"{row['n']:>6} x {row['k']:<6} M = {row['m']:<4}"
    text += "".join(f" | {name[:-3]} {row[name]:6.1f}" for name in row if name.endswith("_us"))
    text += f" | parts {row['splits']}, stages {row['stages']}{', chain' if row['chain'] else ''}"
    print(f"{text} | error {row['error']:.5f}, CUTLASS's {row.get('cutlass_error', math.nan):.5f}", flush=True)


def main() -> None:
    """Measure, print, and exit with 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=TOKENS, help="rows of activations (default: all of %(default)s)"
    )
    parser.add_argument("--tune", action="store_true", help="try many ways of cutting the work, without peers")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    torch.manual_seed(0)
    rows: list[Row] = []
    for shape in args.shapes:
        layers = Layers(*map(int, shape.split("x")))
        for m in args.tokens:
            act = Activations(m, layers.k)
            if args.tune:
                found = [measure(layers, act, launch) for launch in candidates(m, layers.n, layers.k)]
                found.sort(key=lambda row: float(row["ours_us"]))
            else:
                found = [compare(layers, act)]
            for row in found[:3]:
                show(row)
            rows += found
        del layers
        torch.cuda.empty_cache()
    question = "How fast is a linear layer at small batches, beside other kernels and the memory?"
    print(line(save(args, question, rows, packages=VLLM_PACKAGES)))
    if any(row["error"] > 0.004 for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
