"""Measure how the decode GEMM for Hopper is best cut, and write `kernels/gemm/tuned.py`.

    python scripts/gpu/tune_gemm.py [--shapes 6144x4096 ...] [--write] [--json FILE]

A time is that of one quantization of the activations and one GEMM in a CUDA graph of such pairs over different weights,
which exceed the L2: with programmatic dependent launch, what a launch costs depends on the one before it. Every way of
cutting is tried shortly, the best few again in other ways: with the tables of all groups or with indices of them, with
products beside reads or beside lookups, with copies before reads, and with as many registers as the compiler takes. The
Triton kernel for every GPU is measured beside it. A launch whose result is not that of float32 by `ERROR` is not taken.
"""

import argparse
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import TritonError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import Call, microseconds
from random_layers import Layers
from results import add_options, line, save

from convert_w4a8.kernels.activations import gpu as activations
from convert_w4a8.kernels.activations.reference import LOW_TERM
from convert_w4a8.kernels.gemm import gpu, hopper, tuned, workspace

SHAPES = (
    *("6144x4096", "4096x4096", "28672x4096", "4096x14336"),  # Llama-8B
    *("3072x4096", "4096x2048", "14336x4096", "4096x7168"),  # at tensor-parallel size 2
    *("10240x8192", "8192x8192", "57344x8192", "8192x28672"),  # Llama-70B
    *("2560x8192", "8192x2048", "14336x8192", "8192x7168"),  # at tensor-parallel size 4
    *("12288x33792", "14336x12288", "67584x12288", "12288x12288"),  # Command A
    "1536x2048",
)
BLOCKS = ((64, 1), (32, 1), (8, 1), (16, 1), (128, 1), (8, 2), (16, 2))
"""Tokens of a block, and terms of an activation."""
PER_SM = (1.4, 8)
"""Blocks of a multiprocessor, at least and at most, where K is split."""
SHARED = 227 * 1024
"""Bytes of shared memory of a multiprocessor; a block takes 1 KiB more than its own."""
THREADS = 2048
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16)
STAGES = {8: (3, 4, 6), 16: (3, 4, 6), 32: (3, 4, 6), 64: (3, 4, 6), 128: (3, 4)}
WIDTHS = ((64, 4), (128, 4))
"""Output channels and warps of a block."""
OVERLAPPED = (32, 64)
"""Rows of tokens for which products beside reads, or beside lookups, are tried."""
FINALISTS = 3
GAIN = 0.99
"""The share of the rule's time that a measured choice must stay below to be worth a line."""
TABLE = Path(hopper.__file__).with_name("tuned.py")

ERROR = 0.01
"""The largest distance from a product in float32, as a share of its length."""
REPLAYS = 21
LAUNCH = ("splits", "stages", "block_n", "warps", "indexed", "overlap", "cluster", "registers", "copies_first")
"""What the table says of a launch, in its order."""

Gemm = Callable[..., torch.Tensor]


def pairs(layers: Layers, x: torch.Tensor, terms: int, gemm: Gemm) -> list[Call]:
    """Return quantization and GEMM with each of the layers."""

    def pair(packed: torch.Tensor, tables: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return gemm(*activations.quantize(x, terms), packed, tables, layers.channel, index, layers.distinct)

    return [partial(pair, *weights) for weights in zip(layers.packed, layers.tables, layers.index, strict=True)]


def candidates(block_m: int, terms: int, n: int, k: int) -> list[hopper.Launch]:
    """Return the ways of cutting that are worth a try: parts of K that all run at once; by tables of all groups."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = block_m * terms
    chain = hopper.choose_launch(block_m, n, k, sms, terms).chain
    found = []
    for (width, warps), stages in product(WIDTHS, STAGES[rows]):
        shared = hopper.Launch(block_m, 1, stages, width, warps).copied(terms)
        if n % width or shared > SHARED - 1024:
            continue
        fit = min(SHARED // (shared + 1024), THREADS // (32 * warps), PER_SM[1])
        for splits in SPLITS:
            blocks = n // width * splits
            if splits > 1 and not (PER_SM[0] * sms <= blocks <= fit * sms and splits <= k // gpu.GROUP):
                continue
            registers = hopper.registers_for(blocks, warps, sms)
            launch = hopper.Launch(block_m, splits, stages, width, warps, chain, registers=registers)
            found.append(launch)
            if launch.clusters(terms):
                found.append(replace(launch, cluster=True))
                if registers:
                    found.append(replace(launch, cluster=True, registers=0))
    return found


def ways(rows: int) -> list[dict[str, Any]]:
    """Return what else a kernel for so many rows of tokens may do otherwise."""
    overlaps = (0, 1, 2) if rows in OVERLAPPED else (0,)
    names = ("indexed", "overlap", "copies_first")
    return [dict(zip(names, way, strict=True)) for way in product((True, False), overlaps, (True, False))]


@dataclass
class Size:
    """One size, and the times that were measured for it: of every way of cutting, and again of the best."""

    layers: Layers
    block_m: int
    terms: int
    tried: list[tuple[float, hopper.Launch]] = field(default_factory=list)
    again: list[tuple[float, hopper.Launch]] = field(default_factory=list)

    def launches(self) -> list[hopper.Launch]:
        """Return the ways of cutting that are worth a try."""
        return candidates(self.block_m, self.terms, self.layers.n, self.layers.k)

    def finalists(self) -> list[hopper.Launch]:
        """Return the best ways of cutting, in all other ways."""
        best = [launch for _, launch in sorted(self.tried, key=lambda found: found[0])[:FINALISTS]]
        otherwise = [replace(launch, **way) for launch in best for way in ways(self.block_m * self.terms)]
        return otherwise + [replace(launch, registers=0) for launch in best if launch.registers]

    def rule(self) -> hopper.Launch:
        """Return what is chosen without a table."""
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        return hopper.choose_launch(self.block_m, self.layers.n, self.layers.k, sms, self.terms)

    def time(self, launch: hopper.Launch, replays: int) -> tuple[float, hopper.Launch]:
        """Return the time of a quantization and a product, and how it was cut; infinite where that fails."""
        try:
            calls = pairs(self.layers, self.activations, self.terms, partial(hopper.gemm_by, launch=launch))
            self.check(calls[0]())
            return microseconds(calls, 12, replays), launch
        except (ArithmeticError, RuntimeError, TritonError) as error:
            print(f"{self.name()} {launch}: {str(error).splitlines()[0]}", flush=True)
            return math.inf, launch

    def check(self, found: torch.Tensor) -> None:
        """Raise ArithmeticError for a wrong product."""
        wrong = float((found.float() - self.expected).norm() / self.expected.norm())
        if not wrong <= ERROR:
            raise ArithmeticError(f"wrong by {wrong:.3g}")

    @cached_property
    def activations(self) -> torch.Tensor:
        """Return random activations."""
        return torch.randn(self.block_m, self.layers.k, device="cuda", dtype=torch.bfloat16)

    @cached_property
    def expected(self) -> torch.Tensor:
        """Return their product with the first layer, float32 [M, N]: of what they are quantized to."""
        tokens, scale = activations.quantize(self.activations, self.terms)
        parts = tokens.float().view(self.terms, self.block_m, -1)
        parts[1:] /= LOW_TERM
        product = parts.sum(0) * scale @ self.layers.lut_weights.t() * self.layers.channel
        del self.layers.lut_weights  # far larger than the layer
        return product

    def name(self) -> str:
        """Return what is printed of it."""
        return f"{self.layers.n}x{self.layers.k} M={self.block_m} terms={self.terms}"

    def row(self) -> dict[str, Any]:
        """Return the best way of cutting, and the times of it, of the rule's choice and of the Triton kernel."""
        best_us, best = min(self.again, key=lambda found: found[0])
        row: dict[str, Any] = {
            "n": self.layers.n,
            "k": self.layers.k,
            "m": self.block_m,
            "terms": self.terms,
            "us": best_us,
        }
        row |= {name: getattr(best, name) for name in LAUNCH}
        row |= {f"us_{width}": _best(self.tried, block_n=width) for width in {by.block_n for _, by in self.tried}}
        row |= {"memory_us": _best(self.tried, cluster=False), "cluster_us": _best(self.tried, cluster=True)}
        row |= {"tables_us": _best(self.again, indexed=False), "index_us": _best(self.again, indexed=True)}
        row |= {f"overlap_{how}_us": _best(self.again, overlap=how) for how in (1, 2)}
        row |= {"copies_first_us": _best(self.again, copies_first=True)}
        row |= {"rule_us": self.time(self.rule(), REPLAYS)[0]}
        if self.terms == 1:
            row["triton_us"] = microseconds(pairs(self.layers, self.activations, 1, triton_gemm), 12, REPLAYS)
        return {name: value for name, value in row.items() if value is not None}


def _best(timed: list[tuple[float, hopper.Launch]], **how: Any) -> float | None:
    """Return the least time of launches that are so; None where there is none."""
    found = (us for us, by in timed if all(getattr(by, name) == value for name, value in how.items()))
    return min(found, default=None)


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
            kept[key] = f"({', '.join(str(row[name]) for name in LAUNCH)})"
    shapes = list(dict.fromkeys([tuple(map(int, shape.split("x"))) for shape in SHAPES] + [key[:2] for key in kept]))
    text = "".join(
        f"    {key}: {kept[key]},\n" for key in sorted(kept, key=lambda key: (shapes.index(key[:2]), key[3], key[2]))
    )
    TABLE.write_text(head + "LAUNCHES: " + old.partition("{\n")[0] + "{\n" + text + "}" + old.partition("\n}")[2])


def compile_one(launch: hopper.Launch, terms: int) -> None:
    """Compile a kernel, in a process of its own, which leaves it in Triton's cache."""
    layers = _small()
    tokens = activations.quantize(torch.ones(launch.block_m, layers.k, device="cuda", dtype=torch.bfloat16), terms)
    weights = (layers.packed[0], layers.tables[0], layers.channel, layers.index[0], layers.distinct)
    try:
        hopper.gemm_by(*tokens, *weights, launch=launch)
        torch.cuda.synchronize()
    except (RuntimeError, TritonError) as error:
        print(f"{launch}: {str(error).splitlines()[0]}", flush=True)


@cache
def _small() -> Layers:
    workspace.prepare(torch.device("cuda", 0))
    return Layers(256, 2048, 1)


def compile_all(pool: Executor, launches: Iterable[tuple[hopper.Launch, int]]) -> None:
    """Compile kernels side by side."""
    different = {(by if by.cluster else replace(by, splits=min(by.splits, 2)), terms) for by, terms in launches}
    list(pool.map(compile_one, *zip(*different, strict=True)))


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", type=int, help="tokens of a block times terms (default: all)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--processes", type=int, default=8, help="that compile (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("a Hopper GPU is needed")
    workspace.prepare(torch.device("cuda", 0))
    torch.manual_seed(0)
    tuned.LAUNCHES.clear()
    all_layers = [Layers(*map(int, shape.split("x"))) for shape in args.shapes]
    blocks = [(m, terms) for m, terms in BLOCKS if args.rows is None or m * terms in args.rows]
    rows: list[dict[str, Any]] = []
    question = "How is the decode GEMM for Hopper best cut, by the size of a layer and the number of tokens?"
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for block_m, terms in blocks:
            sizes = [Size(layers, block_m, terms) for layers in all_layers]
            compile_all(pool, [(launch, terms) for size in sizes for launch in [*size.launches(), size.rule()]])
            for size in sizes:
                size.tried = [size.time(launch, 6) for launch in size.launches()]
            compile_all(pool, [(launch, terms) for size in sizes for launch in size.finalists()])
            for size in sizes:
                size.again = [size.time(launch, REPLAYS) for launch in size.finalists()]
                rows.append(row := size.row())
                print(" ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            document = save(args, question, rows)
            if args.write:
                write(rows)
    print(line(document))


if __name__ == "__main__":
    main()
