"""Measure how the GEMMs over experts are best cut on Hopper, and write `kernels/gemm/tuned_experts.py`.

    python scripts/gpu/tune_experts.py [--mixtures mixtral-8x7b ...] [--tokens 1 16 ...] [--write] [--json FILE]

A time is that of all that a layer's routed experts launch, as bench_experts.py measures it. For each size of blocks the
two GEMMs are cut one after the other: parts of K, blocks and how weights are looked up, parts of K again, and the order
of blocks. When the time is up, what was found so far is kept.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_experts import MIXTURES, TOKENS, Routed, calls_of, pool, routed
from expert_contestants import Mixture
from graph_timing import microseconds
from results import add_options, line, save

from convert_w4a8.kernels.gemm import grouped, tuned_experts, workspace
from convert_w4a8.kernels.gemm.grouped_launch import Launch, most_blocks

Shape = tuple[int, int, int, int | None]
SHAPES: dict[int, dict[int, tuple[Shape, ...]]] = {
    8: {
        0: ((64, 4, 4, None), (128, 4, 3, None), (128, 4, 4, None), (128, 8, 4, None)),
        **dict.fromkeys(
            (1, 2), ((64, 4, 4, None), (64, 4, 4, 80), (128, 4, 3, 128), (128, 4, 4, 128), (128, 8, 4, 80))
        ),
    },
    16: {
        0: ((64, 4, 4, None), (128, 4, 3, None), (128, 4, 4, None)),
        **dict.fromkeys((1, 2), ((64, 4, 4, None), (64, 4, 4, 96), (128, 4, 4, None), (128, 8, 4, None))),
    },
    32: {
        0: ((64, 4, 4, None), (128, 4, 3, None), (128, 8, 4, None)),
        **dict.fromkeys((1, 2), ((64, 4, 4, None), (64, 4, 4, 128), (128, 8, 4, 128))),
    },
    64: {0: ((64, 4, 3, None), (64, 4, 3, 128), (64, 4, 4, None), (128, 8, 3, None))},
    128: {0: ((64, 4, 3, None), (128, 8, 3, None))},
}
"""Channels, warps, copies in flight and registers of a block, by its pairs and by how weights are looked up."""
OVERLAP: dict[int, tuple[Shape, ...]] = {
    **dict.fromkeys((32, 64), ((64, 4, 3, 128), (128, 8, 3, 128))),
    **dict.fromkeys((80, 96), ((128, 8, 3, 128), (128, 8, 3, None), (64, 4, 3, None))),
}
"""The same of blocks that look up weights while they multiply, by pairs: one power of two, or two of them added."""
UNROLLED: dict[int, tuple[Shape, ...]] = {
    **dict.fromkeys((8, 16), ((64, 4, 4, None), (64, 4, 4, 80), (64, 4, 6, 96), (128, 4, 3, 168), (128, 4, 3, 128))),
    **dict.fromkeys((32, 64), ((64, 4, 3, None), (64, 4, 4, 96), (128, 4, 3, None), (128, 4, 3, 128))),
}
"""The same of blocks that multiply one group after the other in a loop that is unrolled, by pairs."""
READ_AHEAD: dict[int, tuple[Shape, ...]] = {
    32: ((64, 4, 4, None), (128, 4, 3, None)),
    64: ((64, 4, 3, 128),),
}
"""The same of those that read the next group's words meanwhile, by pairs."""
SPLITS = (1, 2, 3, 4, 6, 8)
COLUMNS = (None, 1, 4, 16, 64)
REPLAYS = 7
FIELDS = (
    "splits",
    "block_n",
    "stages",
    "warps",
    "columns",
    "indexed",
    "apart",
    "registers",
    "chain",
    "overlap",
)
TABLE = Path(tuned_experts.__file__)

Row = dict[str, Any]
Launches = tuple[Launch, Launch]


def blocks_of_pairs(mixture: Mixture, m: int) -> list[int]:
    """Return the sizes of blocks worth a try: about what a chosen expert has, and more."""
    mean = m * mixture.choices / min(mixture.experts, m * mixture.choices)
    return [size for size in sorted({*SHAPES, *OVERLAP}) if size / 5 <= mean <= 1.5 * size or (size == 8 and mean < 2)]


def shapes(block_m: int, n: int, apart: Sequence[int]) -> list[Launch]:
    """Return blocks worth a try, of a product of N = n; with many pairs, that read tables too.

    apart: how weights may be looked up.
    """
    made = [
        Launch(block_m, 1, block_n, stages, warps, chain, None, indexed, way, registers)
        for chain in ((block_m >= 64,) if block_m != 32 else (False, True))
        for way in sorted(SHAPES.get(block_m, {}).keys() & ({0} if chain else set(apart)))
        for block_n, warps, stages, registers in SHAPES[block_m][way]
        for indexed in ((True, False) if chain else (True,))
    ]
    made += [
        Launch(block_m, 1, block_n, stages, warps, True, None, indexed, 0, registers, overlap=3)
        for block_n, warps, stages, registers in OVERLAP.get(block_m, ())
        for indexed in (True, False)
    ]
    made += [
        Launch(block_m, 1, block_n, stages, warps, chain, None, True, 0, registers, overlap=0)
        for block_n, warps, stages, registers in UNROLLED.get(block_m, ())
        for chain in ((True,) if block_m >= 64 else (False, True))
    ]
    made += [
        Launch(block_m, 1, block_n, stages, warps, True, None, True, 0, registers, overlap=1)
        for block_n, warps, stages, registers in READ_AHEAD.get(block_m, ())
    ]
    return [launch for launch in made if n % launch.block_n == 0]


def variants(apart: Sequence[int]) -> list[Launch]:
    """Return everything that tuning needs compiled."""
    made = [shape for block_m in {**SHAPES, **OVERLAP} for shape in shapes(block_m, 256, apart)]
    return [replace(launch, splits=splits) for launch in made for splits in ((1,) if launch.chain else (1, 2))]


def compile_one(launch: Launch) -> None:
    """Run a tiny mixture, which leaves the kernels in Triton's cache."""
    mixture = Mixture("tiny", 4, 2, 512, 512, copies=1)
    with suppress(Exception):  # what has no room says so when its turn comes
        grouped.experts(*routed(mixture, 4)[0], *mixture.lut[0], None, "silu", (launch, launch), hopper=True)
        torch.cuda.synchronize()


def took(mixture: Mixture, inputs: Sequence[Routed], launches: Launches) -> float:
    """Return microseconds."""

    def experts(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        layers = mixture.lut[layer]
        return grouped.experts(x, topk_weights, topk_ids, *layers, None, "silu", launches, hopper=True)

    return microseconds(calls_of(experts, mixture, inputs), replays=REPLAYS)


def tune(mixture: Mixture, m: int, deadline: float, apart: Sequence[int]) -> Iterator[Row]:
    """Yield the best launches for each size of blocks, until the deadline."""
    inputs = routed(mixture, m)
    sizes = blocks_of_pairs(mixture, m)
    left = 2 * len(sizes)
    for block_m in sizes:
        best: list[Launch] = [shapes(block_m, n, apart)[0] for n, _ in mixture.sizes]
        best_us = took(mixture, inputs, (best[0], best[1]))
        for place, (n, k) in enumerate(mixture.sizes):
            until = time.monotonic() + (deadline - time.monotonic()) / left
            left -= 1
            splits = [parts for parts in SPLITS if parts == 1 or (parts * 256 <= k and block_m < 64)]
            sweeps: tuple[Callable[[Launch], list[Launch]], ...] = (
                partial(_parts, splits=splits),
                partial(_shapes, made=shapes(block_m, n, apart)),
                partial(_parts, splits=splits),
                lambda launch: [replace(launch, columns=columns) for columns in COLUMNS],
            )
            for sweep in sweeps:
                for launch in sweep(best[place]):
                    if launch == best[place] or time.monotonic() > until or not has_counters(mixture, m, n, launch):
                        continue
                    tried = [*best]
                    tried[place] = launch
                    with suppress(Exception):  # more shared memory than there is
                        us = took(mixture, inputs, (tried[0], tried[1]))
                        if us < best_us:
                            best, best_us = tried, us
        yield {"mixture": mixture.name, "m": m, "block_m": block_m, "us": best_us} | {
            name: asdict(launch) for name, launch in zip(("gate_up", "down"), best, strict=True)
        }


def has_counters(mixture: Mixture, m: int, n: int, launch: Launch) -> bool:
    """Whether K is split as the launch says: there is a counter for each block of outputs."""
    blocks = most_blocks(m * mixture.choices, mixture.experts, launch.block_m)
    return launch.splits == 1 or blocks * (n // launch.block_n) <= workspace.COUNTERS


def _parts(launch: Launch, splits: Sequence[int]) -> list[Launch]:
    return [replace(launch, splits=parts) for parts in splits]


def _shapes(launch: Launch, made: Sequence[Launch]) -> list[Launch]:
    return [replace(shape, splits=launch.splits) for shape in made]


def write(rows: Sequence[Row]) -> None:
    """Write the table; lines of mixtures that were not measured stay."""
    by_name = {mixture.name: mixture for mixture in MIXTURES}
    kept = dict(tuned_experts.LAUNCHES)
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["mixture"], row["m"])
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    for (name, m), row in best.items():
        mixture = by_name[name]
        place = (mixture.experts, mixture.hidden, mixture.intermediate, m * mixture.choices)
        first, second = (tuple(row[name][field] for field in FIELDS) for name in ("gate_up", "down"))
        kept[place] = (row["block_m"], first, second)
    head, _, tail = TABLE.read_text(encoding="utf-8").partition("] = {")
    text = "".join(f"    {key}: {kept[key]},\n" for key in sorted(kept))
    TABLE.write_text(f"{head}] = {{\n{text}}}{tail.rpartition('}')[2]}", encoding="utf-8")


def main() -> None:
    """Measure, print, and write what was asked for."""
    names = [mixture.name for mixture in MIXTURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="rows of activations")
    parser.add_argument("--seconds", type=float, default=600, help="when to stop (default: %(default)s)")
    parser.add_argument("--apart", nargs="+", type=int, choices=(0, 1, 2), default=(0, 1, 2), help="see Launch")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("a Hopper GPU is needed")
    deadline = time.monotonic() + args.seconds
    with pool() as compilers:
        compilers.map(compile_one, variants(args.apart), chunksize=1)
    cases = [(mixture, m) for mixture in MIXTURES if mixture.name in args.mixtures for m in args.tokens]
    rows: list[Row] = []
    for number, (mixture, m) in enumerate(cases):
        now = time.monotonic()
        for row in tune(mixture, m, now + (deadline - now) / (len(cases) - number), args.apart):
            rows.append(row)
            print(row, flush=True)
        if args.write:
            write(rows)
        if m == args.tokens[-1]:
            mixture.__dict__.pop("lut", None)
            torch.cuda.empty_cache()
    question = "How are the GEMMs over experts best cut, by the mixture and the number of tokens?"
    print(line(save(args, question, rows)))


if __name__ == "__main__":
    main()
