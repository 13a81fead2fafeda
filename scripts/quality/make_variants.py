"""Quantize a model with and without AWQ scaling: W4A16, W4A8 with tables of scales, and with free tables.

    make_variants.py MODEL DATA OUT [--only NAME ...] [--processes 1] [--threads N] [--device cpu]

DATA is calibration data as `w4a8 quantize --data` takes it. Each variant becomes a directory of its name in OUT; names
are those of the rows in docs/benchmarks/quality.md. Variants are made some at a time, the slow ones first.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.cli.data import read_data

_KINDS: Mapping[str, Mapping[str, Any]] = {
    "w4a16": {"format": "w4a16"},
    "w4a8-uniform": {"tables": "scale"},
    "w4a8-free": {"tables": "free"},
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    f"{kind}-{preset}{'-scaled' if scaled else ''}": {**options, "preset": preset, "awq_scaling": scaled}
    for preset in ("full", "fast")
    for kind, options in _KINDS.items()
    for scaled in (False, True)
    if (kind, preset) != ("w4a8-free", "full")
}


def make(name: str, model: Path, data: Path, out: Path, threads: int | None, device: str) -> str:
    """Make a variant; returns what to say of it."""
    if threads:
        torch.set_num_threads(threads)
    start = time.monotonic()
    samples = read_data(api.open_checkpoint(model), (data,), None, None)
    result = api.quantize(model, out / name, QuantizeOptions(**VARIANTS[name]), samples=samples, device=device)
    used = [layer.notes.get("awq_exponent") for layer in result.layers]
    return f"{name}: {time.monotonic() - start:.0f} s, exponents {used if any(used) else 'none'}"


def main() -> int:
    """Print a line a variant; return 1 if one could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=1, help="variants at a time (default 1)")
    parser.add_argument("--threads", type=int, help="of torch and numba, for each")
    parser.add_argument("--device", default="cpu", help="that computes (default: %(default)s)")
    args = parser.parse_args()
    failed = False
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        coming = {
            pool.submit(make, name, args.model, args.data, args.out, args.threads, args.device): name
            for name in args.only
        }
        for future in as_completed(coming):
            try:
                print(future.result(), flush=True)
            except Exception as error:  # noqa: BLE001 - the others go on
                print(f"{coming[future]}: {error}", file=sys.stderr)
                failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
