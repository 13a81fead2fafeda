"""Time the choice of codebooks for the matrices of a decoder block: fast, full and without data.

    python scripts/bench/bench_codebooks.py [--device cuda] [--models llama-31m ...] [--kinds full ...] [--json FILE]

Weights are normal numbers, one random scale a channel; inputs are correlated, their sizes spread as exp(normal). Each
shape of a block is measured once, after one small matrix for the compilers, and counted as often as it occurs.
`moment_s` is the time to factor a second moment, which matrices that share their inputs share. Seconds are wall time
from tensors on the device to tensors on the device, on as many threads as torch may use (`--threads`).
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from results import add_options, line, save
from table_columns import COLUMNS
from tables import table

from convert_w4a8.codebooks import FAST, FULL, NO_DATA, Curvature, Method, curvature, quantize_matrix

_T = TypeVar("_T")
KINDS = {"no data": NO_DATA, "fast": FAST, "full": FULL}
Shapes = dict[str, tuple[int, int, int]]
"""Matrices that share their inputs, by name: N of all of them, K, and how many matrices."""


def block(hidden: int, intermediate: int, queries: int, keys: int, layers: int) -> tuple[int, Shapes]:
    """Return the shapes of a Llama block, and how many blocks there are."""
    return layers, {
        "q, k, v": (queries + 2 * keys, hidden, 3),
        "o": (hidden, queries, 1),
        "gate, up": (2 * intermediate, hidden, 2),
        "down": (hidden, intermediate, 1),
    }


MODELS = {
    "llama-31m": block(768, 2048, 768, 256, 4),
    "llama-8b": block(4096, 14336, 4096, 1024, 32),
    "llama-70b": block(8192, 28672, 8192, 1024, 80),
    "command-a": block(12288, 33792, 12288, 1024, 64),
}


def inputs(k: int, device: torch.device) -> torch.Tensor:
    """Return a second moment of correlated inputs of very different sizes, float32 [K, K]."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = torch.randn(k, generator=generator, device=device).exp()
    tokens = torch.randn(min(2 * k, 16384), k, generator=generator, device=device)
    shared = torch.randn(min(512, k), k, generator=generator, device=device)
    mix = torch.randn(len(tokens), len(shared), generator=generator, device=device) / len(shared) ** 0.5
    tokens.addmm_(mix, shared).mul_(sizes)
    return tokens.t() @ tokens / len(tokens)


def timed(call: Callable[[], _T], device: torch.device) -> tuple[_T, float, float]:
    """Return what a call returns, how long it takes, and how much of the processors' time."""
    started, cpu = time.perf_counter(), time.process_time()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started, time.process_time() - cpu


def measure(name: str, kind: str, device: torch.device) -> Iterator[dict[str, object]]:
    """Yield a row for each shape of a block, and one for the block."""
    layers, shapes = MODELS[name]
    method = KINDS[kind]
    weights = total = total_moment = total_cpu = 0.0
    for what, (n, k, _) in shapes.items():
        generator = torch.Generator(device).manual_seed(1)
        weight = torch.randn(n, k, generator=generator, device=device)
        weight.mul_(torch.randn(n, 1, generator=generator, device=device).mul_(0.3).exp_() / k**0.5)
        weight = weight.bfloat16()
        moment = None if kind == "no data" else inputs(k, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        known: Curvature | torch.Tensor | None = None if moment is None else moment.diagonal()
        moment_s = moment_cpu = 0.0
        if method.feedback and moment is not None:
            known, moment_s, moment_cpu = timed(partial(curvature, moment, method.damping), device)
        (_, stats), matrix_s, matrix_cpu = timed(partial(quantize_matrix, weight, known, method), device)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        millions = n * k / 1e6
        weights, total, total_moment = weights + millions, total + matrix_s, total_moment + moment_s
        total_cpu += moment_cpu + matrix_cpu
        yield row(name, kind, what, device, f"{n} × {k}", millions, moment_s, matrix_s, moment_cpu + matrix_cpu) | {
            "sqnr_db": stats.sqnr_db,
            "gpu_gib": peak,
        }
        del weight, moment, known
    yield row(name, kind, "block", device, "", weights, total_moment, total, total_cpu) | {
        "blocks": layers,
        "model_minutes": layers * (total + total_moment) / 60,
    }


def row(
    model: str,
    kind: str,
    what: str,
    device: torch.device,
    shape: str,
    millions: float,
    moment_s: float,
    matrix_s: float,
    cpu_s: float,
) -> dict[str, object]:
    """Return what every row has."""
    return {
        "model": model,
        "kind": kind,
        "matrices": what,
        "device": device.type,
        "shape": shape,
        "million_weights": millions,
        "moment_s": moment_s,
        "matrix_s": matrix_s,
        "cpu_s": cpu_s,
        "seconds_per_million": (moment_s + matrix_s) / millions,
        "cpu_per_million": cpu_s / millions,
    }


def warm(method: Method, device: torch.device) -> None:
    """Let the compilers do their work."""
    weight = torch.randn(16, 256, generator=torch.Generator(device).manual_seed(0), device=device)
    quantize_matrix(weight, inputs(256, device), method)


def main() -> None:
    """Measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["llama-31m"], choices=MODELS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_options(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    question = f"How long do codebooks take on a {'GPU' if device.type == 'cuda' else 'CPU'}?"
    for kind in args.kinds:
        warm(KINDS[kind], device)
        for name in args.models:
            for found in measure(name, kind, device):
                rows.append(found)
                print(found, flush=True)
                save(args, question, rows)  # as they come
    print(line(save(args, question, rows)))
    print(*table(COLUMNS["codebooks-gpu" if device.type == "cuda" else "codebooks"], rows), sep="\n")


if __name__ == "__main__":
    main()
