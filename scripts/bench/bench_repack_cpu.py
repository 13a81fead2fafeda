"""Measure the CPU layout functions, GB/s of packed bytes in, on one and two Python threads, beside `clone`.

    python scripts/bench/bench_repack_cpu.py [--size 14336x4096] [--rounds 5] [--json FILE]

torch runs with one thread, as it does inside the converter, whose workers are Python threads.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from results import add_options, line, save
from table_columns import Columns
from tables import table

from convert_w4a8.encoding.lut_layout import reorder, restore
from convert_w4a8.encoding.packing import to_pack_quantized, unpack_codes
from convert_w4a8.linear import Packing

PACKINGS = (Packing.GPTQ, Packing.AWQ, Packing.PACK_QUANTIZED)
COLUMNS: Columns = (
    ("from", "{packing}"),
    ("function", "`{function}`"),
    ("GB/s, 1 thread", "{gb_s_1:.2f}"),
    ("GB/s, 2 threads", "{gb_s_2:.2f}"),
)


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
    add_options(parser)
    args = parser.parse_args()
    n, k = map(int, args.size.split("x"))
    torch.set_num_threads(1)
    rows = []
    for packing in PACKINGS:
        packed = random_packed(packing, n, k)
        calls: dict[str, Callable[[], object]] = {
            "clone": packed.clone,
            "reorder": partial(reorder, packed, packing),
            "to_pack_quantized": partial(to_pack_quantized, packed, packing),
            "unpack_codes": partial(unpack_codes, packed, packing),
            "restore": partial(restore, reorder(packed, packing)),
        }
        if packing is Packing.PACK_QUANTIZED:
            del calls["to_pack_quantized"]  # returns its argument
        size = packed.numel() * packed.element_size()
        for name, call in calls.items():
            one, two = (rate(call, size, workers, args.rounds) for workers in (1, 2))
            rows.append({"packing": packing.name, "function": name, "n": n, "k": k, "gb_s_1": one, "gb_s_2": two})
    print(line(save(args, f"How fast are codes of {n} × {k} repacked on a CPU, beside a copy?", rows)))
    print(*table(COLUMNS, rows), sep="\n")


if __name__ == "__main__":
    main()
