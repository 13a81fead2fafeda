"""Time the conversion of one layer whose codes cannot be kept: compiled kernels beside the references, in one run.

    python scripts/bench/bench_requantize.py [--device cuda] [--sizes 14336x4096 ...] [--rounds 5] [--json FILE]

On a CUDA GPU the kernels are Triton's, on a CPU numba's; the references are plain torch, and are what does the work
where neither can be used. Weights are random, and so are the zero-points, so every group gets new codes. Times are
medians of `to_w4a8`, from tensors on the device to tensors on the device; FP8 scales are chosen on the CPU in between,
by one thread, as inside the converter, whose workers are Python threads. Results are compared with those of the
references, byte for byte, before they are timed. Beside each time stand that of the same layer with codes that are
kept, and that of copying its codes from the device, there again, and back.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import torch
from results import add_options, line, save
from table_columns import COLUMNS
from tables import table

from convert_w4a8 import devices
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.layer import to_w4a8

SIZES = ("4096x4096", "14336x4096", "33792x12288")


def random_layer(n: int, k: int, device: torch.device) -> W4Linear:
    """Return an AWQ layer with random zero-points."""
    packed = torch.randint(-(2**31), 2**31, (k, n // 8), dtype=torch.int32)
    scales = torch.rand(k // GROUP_SIZE, n).mul_(0.01).add_(0.002).half()
    zeros = torch.randint(0, 16, (k // GROUP_SIZE, n), dtype=torch.uint8)
    return W4Linear(packed.to(device), Packing.AWQ, scales.to(device), zeros.to(device), None, GROUP_SIZE)


def reference(operation: str, _device: torch.device) -> ModuleType:
    """Return an operation's reference in plain torch, for every device."""
    return import_module(f"convert_w4a8.kernels.{operation}.reference")


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call, which ends by waiting for the GPU or does not use one."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def same(a: W4A8Linear, b: W4A8Linear) -> bool:
    """Return whether two layers have the same bytes."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("packed", "group_scale", "entries", "channel_scale")]
    return all(x is y or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def measure(n: int, k: int, device: torch.device, rounds: int) -> Iterator[dict[str, object]]:
    """Yield one row for each way of choosing scales."""
    torch.manual_seed(0)
    w = random_layer(n, k, device)
    kept = replace(w, zeros=None)

    def convert(layer: W4Linear, mode: ScalesMode) -> W4A8Linear:
        found, _ = to_w4a8(layer, mode)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    copy = milliseconds(lambda: w.packed.cpu().to(device).cpu(), rounds)  # the last waits for what was before
    for mode in ScalesMode:
        found = convert(w, mode)
        with patch.object(devices, "_kernels", reference):
            equal = same(found, convert(w, mode))
            plain = milliseconds(partial(convert, w, mode), min(rounds, 2))
        ms = milliseconds(partial(convert, w, mode), rounds)
        yield {
            "n": n,
            "k": k,
            "scales": mode.value,
            "equal": equal,
            "ms": ms,
            "reference_ms": plain,
            "times": plain / ms,
            "codes_kept_ms": milliseconds(partial(convert, kept, mode), rounds),
            "copies_ms": copy,
        }


def main() -> None:
    """Measure, print one table; exit with 1 where bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="NxK (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        n, k = map(int, size.split("x"))
        for row in measure(n, k, device, args.rounds):
            rows.append(row)
            if not row["equal"]:
                print(f"NOT EQUAL: {row}", flush=True)
    question = f"How long does a layer with new codes take on the {'GPU' if device.type == 'cuda' else 'CPU'}?"
    print(line(save(args, question, rows)))
    print(*table(COLUMNS["requantize-gpu"], rows), sep="\n")
    if not all(row["equal"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
