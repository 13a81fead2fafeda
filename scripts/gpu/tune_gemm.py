"""Measure how the decode GEMM for Hopper is best cut, and write `kernels/gemm/tuned.py`.

    python scripts/gpu/tune_gemm.py [--shapes 6144x4096 ...] [--write] [--json FILE]

A time is that of one quantization of the activations and one GEMM in a CUDA graph of such pairs over different weights,
which exceed the L2: with programmatic dependent launch, what a launch costs depends on the one before it. Every way of
cutting is tried shortly, the best few again in other ways: with the tables of all groups or with indices of them, and
with products beside reads. The Triton kernel for every GPU is measured beside it.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import Call, microseconds
from random_layers import Layers
from results import add_options, line, save

from convert_w4a8.kernels.activations import gpu as activations
from convert_w4a8.kernels.gemm import gpu, hopper, tuned, workspace

SHAPES = (
    *("6144x4096", "4096x4096", "28672x4096", "4096x14336"),  # Llama-8B
    *("3072x4096", "4096x2048", "14336x4096", "4096x7168"),  # at tensor-parallel size 2
    *("10240x8192", "8192x8192", "57344x8192", "8192x28672"),  # Llama-70B
    *("2560x8192", "8192x2048", "14336x8192", "8192x7168"),  # at tensor-parallel size 4
    *("12288x33792", "14336x12288", "67584x12288", "12288x12288"),  # Command A
    "1536x2048",
)
BLOCKS = ((64, 1), (32, 1), (16, 1), (8, 1), (128, 1), (8, 2), (16, 2))
"""Tokens of a block, and terms of an activation."""
PER_SM = (0.6, 8)
"""Blocks of a multiprocessor, at least and at most."""
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
STAGES = {8: (3, 4, 6), 16: (3, 4, 6), 32: (3, 4, 5, 6), 64: (3, 4, 5, 6), 128: (3, 4)}
WIDTHS = ((64, 4), (128, 4), (128, 8))
"""Output channels and warps of a block."""
OVERLAPPED = (32, 64)
"""Rows of tokens for which products beside reads are tried."""
FINALISTS = 3
GAIN = 0.99
"""The share of the rule's time that a measured choice must stay below to be worth a line."""
TABLE = Path(hopper.__file__).with_name("tuned.py")

Gemm = Callable[..., torch.Tensor]


def pairs(layers: Layers, x: torch.Tensor, terms: int, gemm: Gemm) -> list[Call]:
    """Return quantization and GEMM with each of the layers."""

    def pair(packed: torch.Tensor, tables: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return gemm(*activations.quantize(x, terms), packed, tables, layers.channel, index, layers.distinct)

    return [partial(pair, *weights) for weights in zip(layers.packed, layers.tables, layers.index, strict=True)]


def candidates(block_m: int, terms: int, n: int, k: int) -> list[hopper.Launch]:
    """Return the ways of cutting that are worth a try."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    chain = hopper.choose_launch(block_m, n, k, sms, terms).chain
    found = []
    for width, warps in WIDTHS:
        least, most = (per * sms * width / n for per in PER_SM)
        splits = [s for s in SPLITS if s == 1 or (least <= s <= most and s <= k // gpu.GROUP)]
        found += [
            hopper.Launch(block_m, s, stages, width, warps, chain)
            for s in splits
            for stages in STAGES[block_m * terms]
            if n % width == 0
        ]
    return found


def ways(rows: int) -> list[dict[str, bool]]:
    """Return what else a kernel for so many rows of tokens may do otherwise."""
    overlaps = (False, True) if rows in OVERLAPPED else (False,)
    return [{"indexed": indexed, "overlap": overlap} for indexed in (False, True) for overlap in overlaps]


def tune(layers: Layers, block_m: int, terms: int) -> dict[str, Any]:
    """Return the best way of cutting one size, and the times of it, of the rule's choice and of the Triton kernel."""
    x = torch.randn(block_m, layers.k, device="cuda", dtype=torch.bfloat16)

    def time(launch: hopper.Launch, replays: int = 21) -> float:
        return microseconds(pairs(layers, x, terms, partial(hopper.gemm_by, launch=launch)), 12, replays)

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    tuned.LAUNCHES.clear()
    rule = hopper.choose_launch(block_m, layers.n, layers.k, sms, terms)
    tried = [(time(launch, 6), launch) for launch in candidates(block_m, terms, layers.n, layers.k)]
    tried.sort(key=lambda found: found[0])
    chosen = [replace(launch, **way) for _, launch in tried[:FINALISTS] for way in ways(block_m * terms)]
    again = [(time(launch), launch) for launch in chosen]
    best_us, best = min(again, key=lambda found: found[0])
    row = {"n": layers.n, "k": layers.k, "m": block_m, "terms": terms, "us": best_us}
    row |= {
        "splits": best.splits,
        "stages": best.stages,
        "block_n": best.block_n,
        "indexed": best.indexed,
        "warps": best.warps,
        "overlap": best.overlap,
    }
    row |= {
        f"us_{width}": min(us for us, by in tried if by.block_n == width) for width in {by.block_n for _, by in tried}
    }
    row |= {
        "tables_us": min(us for us, by in again if not by.indexed),
        "index_us": min(us for us, by in again if by.indexed),
    }
    if block_m * terms in OVERLAPPED:
        row |= {"overlap_us": min(us for us, by in again if by.overlap)}
    row |= {"rule_us": time(rule)}
    if terms == 1:
        row["triton_us"] = microseconds(pairs(layers, x, terms, triton_gemm), 12, 21)
    return row


def triton_gemm(*arguments: torch.Tensor) -> torch.Tensor:
    """Multiply by the kernel for every GPU, which reads the tables of all groups."""
    return gpu.gemm(*arguments[:5])


def write(rows: list[dict[str, Any]]) -> None:
    """Write the table: sizes where the rule's choice is slower, and, of many tokens, those where Triton is.

    Lines of sizes that were not measured stay.
    """
    head, _, old = TABLE.read_text(encoding="utf-8").partition("LAUNCHES: ")
    measured = {(row["n"], row["k"], row["m"], row["terms"]) for row in rows}
    lines = re.findall(r"    \((\d+), (\d+), (\d+), (\d+)\): (\(.*\)),\n", old)
    kept = {tuple(map(int, key)): launch for *key, launch in lines if tuple(map(int, key)) not in measured}
    for row in rows:
        other = row["triton_us"] if row["m"] > hopper.ALWAYS else GAIN * row["rule_us"]
        if row["us"] < other:
            key = (row["n"], row["k"], row["m"], row["terms"])
            kept[key] = "({splits}, {stages}, {block_n}, {warps}, {indexed}, {overlap})".format(**row)
    shapes = list(dict.fromkeys([tuple(map(int, shape.split("x"))) for shape in SHAPES] + [key[:2] for key in kept]))
    text = "".join(
        f"    {key}: {kept[key]},\n" for key in sorted(kept, key=lambda key: (shapes.index(key[:2]), key[3], key[2]))
    )
    TABLE.write_text(head + "LAUNCHES: " + old.partition("{\n")[0] + "{\n" + text + "}" + old.partition("\n}")[2])


def warm(shard: int, shards: int) -> None:
    """Compile a share of the variants, so that several processes fill Triton's cache together."""
    layers = Layers(256, 512, 1)
    launches = [
        (hopper.Launch(block_m, splits, stages, n, warps, block_m * terms >= 64, **way), terms)
        for block_m, terms in BLOCKS
        for stages in STAGES[block_m * terms]
        for n, warps in WIDTHS
        for way in ways(block_m * terms)
        for splits in (1, 2)
    ]
    for launch, terms in launches[shard::shards]:
        tokens = activations.quantize(torch.ones(launch.block_m, 512, device="cuda", dtype=torch.bfloat16), terms)
        weights = (layers.packed[0], layers.tables[0], layers.channel, layers.index[0], layers.distinct)
        hopper.gemm_by(*tokens, *weights, launch=launch)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--processes", type=int, default=8, help="that compile (default: %(default)s)")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("a Hopper GPU is needed")
    workspace.prepare(torch.device("cuda", 0))
    if args.warm is not None:
        warm(args.warm, args.processes)
        return
    command = [sys.executable, __file__, "--processes", str(args.processes), "--warm"]
    for process in [subprocess.Popen([*command, str(i)]) for i in range(args.processes)]:
        process.wait()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        layers = Layers(*map(int, shape.split("x")))
        for block_m, terms in BLOCKS:
            rows.append(row := tune(layers, block_m, terms))
            print(*(f"{name} {value:.2f}" if name.endswith("us") else f"{name} {value}" for name, value in row.items()))
        sys.stdout.flush()
        del layers
        torch.cuda.empty_cache()
        if args.write:
            write(rows)
    question = "How is the decode GEMM for Hopper best cut, by the size of a layer and the number of tokens?"
    print(line(save(args, question, rows)))


if __name__ == "__main__":
    main()
