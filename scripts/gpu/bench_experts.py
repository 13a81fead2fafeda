"""Measure the experts of a mixture on a CUDA GPU, beside vLLM's kernels and the memory, in one run.

    python scripts/gpu/bench_experts.py [--mixtures qwen3-30b-a3b ...] [--tokens 1 16 64 ...] [--json FILE]

A time is that of all that a layer's routed experts launch, from bfloat16 tokens and the router's choices to bfloat16
results: one call in a CUDA graph of calls with other tokens, other choices and other weights, launches included. The
choices are random. The floor is the bytes (codes, and one for each group) of the experts that are chosen at all, at the
rate of a reduction of 2 GiB. What a kernel needs besides is in expert_contestants.py; those that cannot run say why.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
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
    with pool() as compilers, suppress(multiprocessing.TimeoutError):
        compilers.map_async(run_once, tasks, chunksize=1).get(seconds)


def run_once(task: tuple[str, Mixture, int]) -> None:
    """Call a kernel once."""
    name, mixture, m = task
    with suppress(Exception):
        CONTESTANTS[name](mixture)(0, *routed(mixture, m)[0])
        torch.cuda.synchronize()
    mixture.__dict__.pop("lut", None)
    torch.cuda.empty_cache()


def pool() -> Any:
    """Return processes that compile side by side."""
    return multiprocessing.get_context("spawn").Pool(min(14, multiprocessing.cpu_count()))


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
    parser.add_argument("--compile-seconds", type=float, default=600, help="to compile before (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    start = time.monotonic()
    chosen = [mixture for mixture in MIXTURES if mixture.name in args.mixtures]
    compile_all(chosen, args.tokens, args.kernels, args.compile_seconds)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    question = "How fast are the routed experts of a layer, beside other kernels and the memory?"

    def keep(rows: Sequence[Row]) -> dict[str, Any]:
        """Write what there is: a kernel that does not end takes nothing with it."""
        missing = {f"{row['kernel']}, {row['mixture']}": row["why_not"] for row in rows if "why_not" in row}
        settings = {"not measured": missing} if missing else None
        return save(args, question, beside(rows), packages=(*VLLM_PACKAGES, "humming-kernels"), settings=settings)

    rows: list[Row] = []
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
