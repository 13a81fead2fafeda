"""Measure the Triton kernels on a CUDA GPU, beside a device-to-device copy of the same bytes in the same run.

    python scripts/gpu/bench_kernels.py [--sizes 4096x4096 28672x4096 ...] [--tune] [--json FILE]

Rates are bytes read plus bytes written. Every measurement is a CUDA graph over so many input and output buffers that
they exceed the L2 several times. Every result is compared with the torch reference, byte for byte, before it is timed.
With --tune, many ways of cutting the work are tried, and the best of each packing printed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import microseconds
from results import add_options, line, save

from convert_w4a8.kernels.repack import reference as repack_reference
from convert_w4a8.kernels.repack.gpu import DEFAULT_BLOCKS, PACK_QUANTIZED_BLOCKS, Block, reorder_by, to_pack_quantized
from convert_w4a8.kernels.tables import reference as tables_reference
from convert_w4a8.kernels.tables.gpu import expand_tables
from convert_w4a8.linear import Packing

SIZES = ("4096x4096", "28672x4096", "12288x33792", "67584x12288")

Call = Callable[[torch.Tensor], torch.Tensor]
Row = dict[str, object]


def rotation(packing: Packing, n: int, k: int) -> list[torch.Tensor]:
    """Return random inputs, at least two, which exceed the L2 four times."""
    shape = {Packing.GPTQ: (k // 8, n), Packing.AWQ: (k, n // 8), Packing.PACK_QUANTIZED: (n, k // 8)}[packing]
    count = max(2, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / (n * k // 2)))
    return [torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda") for _ in range(count)]


def candidates() -> list[Block]:
    """Return the ways of cutting the work that are worth a try: 4 to 32 KiB a program."""
    sizes = [(n, k) for n, k in product((32, 64, 128, 256, 512), (32, 64, 128, 256, 512)) if 8192 <= n * k <= 65536]
    return [Block(n, k, warps, k_first) for (n, k), warps, k_first in product(sizes, (4, 8), (False, True))]


def measure(kernel: str, reference: Call, packing: Packing, n: int, k: int, calls: dict[Block, Call]) -> list[Row]:
    """Return one row for each way of cutting the work: time, rate, and its share of the copy's rate."""
    inputs = rotation(packing, n, k)
    expected = reference(inputs[0])
    moved = n * k  # half a byte in, half a byte out
    copy = microseconds([partial(torch.clone, x) for x in inputs])
    rows: list[Row] = []
    for block, call in calls.items():
        equal = torch.equal(call(inputs[0]), expected)
        time = microseconds([partial(call, x) for x in inputs]) if equal else math.nan
        rows.append(
            {
                "kernel": kernel,
                "packing": packing.name,
                "n": n,
                "k": k,
                **{f"block_{name}": value for name, value in asdict(block).items()},
                "equal": equal,
                "us": time,
                "gb_s": moved / time / 1e3,
                "copy_gb_s": moved / copy / 1e3,
                "of_copy": copy / time,
            }
        )
    return rows


def measure_reorder(packing: Packing, n: int, k: int, blocks: list[Block]) -> list[Row]:
    """Return the rows of `reorder`."""
    calls: dict[Block, Call] = {block: partial(reorder_by, packing=packing, block=block) for block in blocks}
    return measure("reorder", partial(repack_reference.reorder, packing=packing), packing, n, k, calls)


def measure_pack_quantized(packing: Packing, n: int, k: int) -> list[Row]:
    """Return the row of `to_pack_quantized`, which `--format compressed-tensors` and new codes need."""
    calls: dict[Block, Call] = {PACK_QUANTIZED_BLOCKS[packing]: partial(to_pack_quantized, packing=packing)}
    reference = partial(repack_reference.to_pack_quantized, packing=packing)
    return measure("to_pack_quantized", reference, packing, n, k, calls)


def measure_tables(n: int, k: int) -> Row:
    """Return the row of the table expansion of an [N, K] layer: one byte in, eight out, a group."""
    scales = torch.randint(0, 256, (k // 128, n), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    expected = tables_reference.expand_tables(scales).view(torch.uint8)
    equal = torch.equal(expand_tables(scales).view(torch.uint8), expected)
    time = microseconds([partial(expand_tables, scales.clone()) for _ in range(8)])
    moved = scales.numel() * 9
    return {"kernel": "expand_tables", "n": n, "k": k, "equal": equal, "us": time, "gb_s": moved / time / 1e3}


def show(row: Row) -> None:
    """Print one row."""
    name = f"{row['kernel']} {row.get('packing', '')}"
    text = f"{name:24} {row['n']:>6} x {row['k']:<6}"
    if "of_copy" in row:
        order = "k first" if row["block_k_first"] else "n first"
        text += f" {row['block_n']:>4} x {row['block_k']:<4} {row['block_warps']} warps, {order} "
        text += f"{row['us']:>9.1f} us {row['gb_s']:>6.0f} GB/s, copy {row['copy_gb_s']:>5.0f}: {row['of_copy']:>6.1%}"
    else:
        text += f"{'':30}{row['us']:>9.1f} us {row['gb_s']:>6.0f} GB/s"
    print(text + ("" if row["equal"] else "  NOT EQUAL to the reference"), flush=True)


def best_blocks(rows: list[Row], packing: Packing) -> list[tuple[float, Row]]:
    """Return the blocks of a packing by their worst share of the copy over all sizes, best first."""
    fields = ("block_n", "block_k", "block_warps", "block_k_first")
    shares: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if (row["kernel"], row.get("packing")) == ("reorder", packing.name) and row["equal"]:
            shares.setdefault(tuple(row[f] for f in fields), []).append(row)
    worst = [(min(float(str(r["of_copy"])) for r in group), group[0]) for group in shares.values()]
    return sorted(worst, key=lambda pair: -pair[0])


def main() -> None:
    """Measure, print, and exit with 1 where bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="NxK (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="try many blocks instead of the default ones")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    rows: list[Row] = []
    for packing in DEFAULT_BLOCKS:
        blocks = candidates() if args.tune else [DEFAULT_BLOCKS[packing]]
        for n, k in sizes:
            found = measure_reorder(packing, n, k, blocks)
            rows += found
            for row in found if not args.tune else sorted(found, key=lambda row: -float(str(row["of_copy"])))[:3]:
                show(row)
    for n, k in sizes:
        found = [row for packing in PACK_QUANTIZED_BLOCKS for row in measure_pack_quantized(packing, n, k)] + [
            measure_tables(n, k)
        ]
        rows += found
        for row in found:
            show(row)
    if args.tune:
        for packing in DEFAULT_BLOCKS:
            print(f"best blocks for {packing} by the worst share of the copy over all sizes:")
            for share, row in best_blocks(rows, packing)[:5]:
                print(f"  {share:.1%} n={row['block_n']} k={row['block_k']}", end="")
                print(f" warps={row['block_warps']} k_first={row['block_k_first']}")
    print(line(save(args, "How fast are codes repacked on the GPU, beside a copy?", rows)))
    if not all(row["equal"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
