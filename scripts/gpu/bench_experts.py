"""Measure the experts of a mixture on a CUDA GPU, beside vLLM's kernels and the memory, in one run.

    python scripts/gpu/bench_experts.py [--mixtures qwen3-30b-a3b ...] [--tokens 1 16 64 ...] [--tune] [--json FILE]

A time is that of all that a layer's routed experts launch, from bfloat16 tokens and the router's choices to bfloat16
results: one call in a CUDA graph of calls with other tokens, other choices and other weights, launches included. The
choices are random. The floor is the bytes (codes and tables) of the experts that are chosen at all, at the rate of a
reduction of 2 GiB. What a kernel needs besides is in expert_contestants.py; those that cannot run say why. With --tune,
ways of cutting our two GEMMs are tried, and the best of each printed.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from expert_contestants import COMPILED, CONTESTANTS, SAME_WEIGHTS, Experts, Mixture
from graph_timing import Call, bytes_per_microsecond, microseconds
from results import VLLM_PACKAGES, add_options, line, save

from convert_w4a8.kernels.gemm import grouped

MIXTURES = (
    Mixture("qwen3-30b-a3b", 128, 8, 2048, 768),
    Mixture("mixtral-8x7b", 8, 2, 4096, 14336),
    Mixture("deepseek-v3-tp8", 256, 8, 7168, 256),
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256)
CALLS = 12
"""Calls of a CUDA graph, each with choices of its own."""
CHECKED = (1, 16)
"""The numbers of tokens for which results are compared with float64."""

Row = dict[str, Any]
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def routed(mixture: Mixture, m: int) -> list[Routed]:
    """Return random tokens and choices, with weights that add up to 1, for each call; the same from run to run."""
    torch.manual_seed(m)
    made = []
    for _ in range(CALLS):
        scores = torch.randn(m, mixture.experts, device="cuda").softmax(-1)
        weights, ids = scores.topk(mixture.choices, dim=-1)
        x = torch.randn(m, mixture.hidden, device="cuda", dtype=torch.bfloat16)
        made.append((x, weights / weights.sum(-1, keepdim=True), ids.int()))
    return made


def calls_of(experts: Experts, mixture: Mixture, inputs: Sequence[Routed]) -> list[Call]:
    """Return a call for each input, the layers by turns."""
    return [partial(experts, number % mixture.layers, *given) for number, given in enumerate(inputs)]


def floor(mixture: Mixture, inputs: Sequence[Routed]) -> float:
    """Return how long it takes to read the experts that are chosen, microseconds a call."""
    distinct = sum(len(set(ids.flatten().tolist())) for _, _, ids in inputs) / len(inputs)
    return distinct * mixture.expert_bytes / bytes_per_microsecond()


def relative_error(mixture: Mixture, found: torch.Tensor, given: Routed) -> float:
    """Return the distance from float64, as a share of its length."""
    exact = mixture.exact(*given)
    return float((found.double() - exact).norm() / exact.norm())


def compare(mixture: Mixture, tokens: Sequence[int], name: str) -> Iterator[Row]:
    """Yield a row for each number of tokens; or one that says why the kernel does not run."""
    row: Row = {"mixture": mixture.name, "kernel": name}
    try:
        experts = CONTESTANTS[name](mixture)
        for m in tokens:
            inputs = routed(mixture, m)
            calls = calls_of(experts, mixture, inputs)
            found = row | {"m": m, "us": microseconds(calls), "floor_us": floor(mixture, inputs)}
            if name in SAME_WEIGHTS:
                first = calls[0]()
                found["repeatable"] = torch.equal(first, calls[0]())
                if m in CHECKED:
                    found["error"] = relative_error(mixture, first, inputs[0])
            yield found
    except Exception as error:  # noqa: BLE001 - the others go on
        yield row | {"why_not": f"{type(error).__name__}: {error}"[:300]}


def compile_all(mixtures: Sequence[Mixture], tokens: Sequence[int], names: Sequence[str], seconds: float) -> None:
    """Let every kernel compile, all of them side by side, what it will need, for so many seconds at most.

    What fails says so when its turn comes.
    """
    kinds = [name for name in names if name in COMPILED]
    tasks = [(name, replace(mixture, copies=1), m) for name in kinds for mixture in mixtures for m in tokens]
    tasks.sort(key=lambda task: task[0].startswith("humming"), reverse=True)  # those take longest
    with _pool() as pool, suppress(multiprocessing.TimeoutError):
        pool.map_async(run_once, tasks, chunksize=1).get(seconds)


def run_once(task: tuple[str, Mixture, int]) -> None:
    """Call a kernel once."""
    name, mixture, m = task
    with suppress(Exception):
        CONTESTANTS[name](mixture)(0, *routed(mixture, m)[0])
        torch.cuda.synchronize()
    mixture.__dict__.pop("lut", None)
    torch.cuda.empty_cache()


def _pool() -> Any:
    return multiprocessing.get_context("spawn").Pool(min(14, multiprocessing.cpu_count()))


# ------------------------------------------------------------------------------------------------------------- tuning


def blocks_of_pairs(mixture: Mixture, m: int) -> list[int]:
    """Return the sizes of blocks worth a try."""
    mean = m * mixture.choices / min(mixture.experts, m * mixture.choices)
    return [size for size in (16, 32, 64) if (size == 16 and mean <= 24) or (size > 16 and size / 8 < mean <= 4 * size)]


def shapes(block_m: int) -> list[grouped.Launch]:
    """Return blocks of channels and warps worth a try."""
    chain = block_m >= 64
    return [
        grouped.Launch(block_m, 1, block_n, warps=warps, chain=chain)
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
    ]


def variants() -> list[grouped.Launch]:
    """Return everything that tuning needs compiled."""
    made = [shape for block_m in (16, 32, 64) for shape in shapes(block_m)]
    return [
        replace(launch, splits=splits, stages=stages) for launch, splits, stages in product(made, (1, 2), (3, 4, 5, 6))
    ]


def compile_one(launch: grouped.Launch) -> None:
    """Run a tiny mixture, which leaves the kernels in Triton's cache."""
    mixture = Mixture("tiny", 4, 2, 512, 512)
    grouped.experts(*routed(mixture, 4)[0], *mixture.lut[0], None, "silu", (launch, launch))
    torch.cuda.synchronize()


def tune(mixture: Mixture, tokens: Sequence[int], deadline: float) -> Iterator[Row]:
    """Yield a row for each way of cutting the GEMMs, one of them after the other, until the deadline."""
    for m in tokens:
        inputs = routed(mixture, m)
        pairs = m * mixture.choices
        sms = torch.cuda.get_device_properties(0).multi_processor_count

        def run(launches: tuple[grouped.Launch, grouped.Launch], m: int = m, inputs: Sequence[Routed] = inputs) -> Row:
            def experts(
                layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
            ) -> torch.Tensor:
                return grouped.experts(x, topk_weights, topk_ids, *mixture.lut[layer], None, "silu", launches)

            us = microseconds(calls_of(experts, mixture, inputs))
            return {"mixture": mixture.name, "m": m, "us": us} | {
                f"{key}{place}": value for place, launch in enumerate(launches) for key, value in asdict(launch).items()
            }

        for block_m in blocks_of_pairs(mixture, m):
            best = [
                replace(grouped.choose_launch(pairs, mixture.experts, n, k, sms), block_m=block_m, columns=None)
                for n, k in mixture.sizes
            ]
            best_us = run((best[0], best[1]))["us"]
            for place, (_, k) in enumerate(mixture.sizes):
                most = k // 128
                tries = [
                    replace(shape, splits=splits, stages=4)
                    for shape, splits in product(shapes(block_m), (1, 2, 3, 4, 6, 8))
                    if splits <= most
                ]
                for again in range(2):
                    for launch in tries:
                        if time.monotonic() > deadline:
                            return
                        launches = [*best]
                        launches[place] = launch
                        row = run((launches[0], launches[1]))
                        yield row
                        if row["us"] < best_us:
                            best, best_us = launches, row["us"]
                    tries = [replace(best[place], stages=stages) for stages in (3, 5, 6)] if not again else []


# -------------------------------------------------------------------------------------------------------------- main


def beside(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each mixture and number of tokens, with the times of all kernels."""
    joined: dict[tuple[str, int], Row] = {}
    for row in rows:
        if "why_not" in row:
            continue
        kept = joined.setdefault((row["mixture"], row["m"]), {key: row[key] for key in ("mixture", "m", "floor_us")})
        kept[f"{row['kernel']}_us"] = row["us"]
        if "error" in row:
            kept[f"{row['kernel']}_error"] = row["error"]
    for row in joined.values():
        others = {
            key: value for key, value in row.items() if key.endswith("_us") and key not in ("floor_us", "ours_us")
        }
        if others and "ours_us" in row:
            best = min(others, key=others.__getitem__)
            row |= {"best_other": best.removesuffix("_us"), "faster": others[best] / row["ours_us"] - 1}
    return list(joined.values())


def show(row: Row) -> None:
    """Print one row."""
    print(*(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    sys.stdout.flush()


def main() -> None:
    """Measure, print, and exit with 1 where a result is wrong."""
    names = [mixture.name for mixture in MIXTURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="rows of activations")
    parser.add_argument("--kernels", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--tune", action="store_true", help="try many ways of cutting the work, without peers")
    parser.add_argument("--seconds", type=float, default=600, help="when to stop tuning (default: %(default)s)")
    parser.add_argument("--compile-seconds", type=float, default=600, help="to compile before (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    start = time.monotonic()
    deadline = start + args.seconds
    chosen = [mixture for mixture in MIXTURES if mixture.name in args.mixtures]
    if args.tune:
        with _pool() as pool:
            pool.map(compile_one, variants(), chunksize=1)
    else:
        compile_all(chosen, args.tokens, args.kernels, args.compile_seconds)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    question = "How fast are the experts of a mixture at small batches, beside other kernels and the memory?"

    def keep(rows: Sequence[Row]) -> dict[str, Any]:
        """Write what there is: a kernel that does not end takes nothing with it."""
        missing = {f"{row['kernel']}, {row['mixture']}": row["why_not"] for row in rows if "why_not" in row}
        settings = {"not measured": missing} if missing else None
        kept = rows if args.tune else beside(rows)
        return save(args, question, kept, packages=(*VLLM_PACKAGES, "humming-kernels"), settings=settings)

    rows: list[Row] = []
    if args.tune:
        for number, mixture in enumerate(chosen):
            left = deadline - time.monotonic()
            kept = list(tune(mixture, args.tokens, time.monotonic() + left / (len(chosen) - number)))
            rows += kept
            for m in args.tokens:
                for row in sorted((row for row in kept if row["m"] == m), key=lambda row: float(row["us"]))[:3]:
                    show(row)
            mixture.__dict__.pop("lut", None)
    else:
        for name, mixture in product(args.kernels, chosen):
            for row in compare(mixture, args.tokens, name):
                rows.append(row)
                show(row)
                keep(rows)
            torch.cuda.empty_cache()
    print(line(keep(rows)))
    if any(row.get("error", 0) > 0.02 or row.get("repeatable") is False for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
