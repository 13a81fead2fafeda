"""Measure the CPU layout functions, GB/s of packed bytes in, on one and two Python threads, beside `clone`.

    python scripts/bench/bench_repack_cpu.py [--size 14336x4096] [--rounds 5]

torch runs with one thread, as it does inside the converter, whose workers are Python threads.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from convert_w4a8.encoding.lut_layout import reorder, restore
from convert_w4a8.encoding.packing import to_pack_quantized, unpack_codes
from convert_w4a8.linear import Packing

PACKINGS = (Packing.GPTQ, Packing.AWQ, Packing.PACK_QUANTIZED)


def random_packed(packing: Packing, n: int, k: int) -> torch.Tensor:
    """Return random codes of an [N, K] layer."""
    shape = {Packing.GPTQ: (k // 8, n), Packing.AWQ: (k, n // 8), Packing.PACK_QUANTIZED: (n, k // 8)}[packing]
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def rate(call: Callable[[], object], size: int, workers: int, rounds: int) -> float:
    """Return GB/s over all workers, each making the call once a round; the best round counts."""
    best = float("inf")
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            for future in [pool.submit(call) for _ in range(workers)]:
                future.result()
            best = min(best, time.perf_counter() - start)
    return workers * size / best / 1e9


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="14336x4096", help="NxK (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n, k = map(int, args.size.split("x"))
    torch.set_num_threads(1)
    print(f"{n} x {k}, torch {torch.__version__}, GB/s of packed bytes: 1 thread / 2 threads")
    names = ("clone", "reorder", "to_pack_quantized", "unpack_codes", "restore")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names))
    for packing in PACKINGS:
        packed = random_packed(packing, n, k)
        calls: list[Callable[[], object]] = [
            packed.clone,
            partial(reorder, packed, packing),
            partial(to_pack_quantized, packed, packing),
            partial(unpack_codes, packed, packing),
            partial(restore, reorder(packed, packing)),
        ]
        size = packed.numel() * packed.element_size()
        cells = [" / ".join(f"{rate(call, size, w, args.rounds):.2f}" for w in (1, 2)) for call in calls]
        cells[2] = "-" if packing is Packing.PACK_QUANTIZED else cells[2]  # returns its argument
        print(f"{packing.name:14}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
