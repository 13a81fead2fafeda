"""Check the kernels that quantize activations on a CUDA GPU: `check_activations.py [--sanitizer] [--json FILE]`.

Needs this checkout on PYTHONPATH, torch and Triton. Each of the four (plain, SwiGLU, norm, norm of a sum), with one and
two terms, is held against the same in torch. Where a sum, a quotient or an exponential is rounded otherwise, a number
beside the middle of two may go to the other one: of a thousand, five may differ, by one step of FP8, and a token's
scale by a step of bfloat16. Results are computed again, and must have the same bytes.

--sanitizer is small enough for `compute-sanitizer python scripts/gpu/check_activations.py --sanitizer`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from check_gemm import is_right, noted
from results import add_options, line, save

from convert_w4a8.kernels.activations import gpu, reference

TOKENS = (1, 2, 7, 8, 33, 128)
LENGTHS = (128, 768, 4096, 6144, 14336, 33792)
OTHER = 0.005
"""The share of bytes that may differ by one step."""
EPSILON = 1e-5

Row = dict[str, Any]
Made = tuple[torch.Tensor, ...]


def calls(module: Any, m: int, k: int, terms: int) -> dict[str, Callable[[], Made]]:
    """Return what a module makes of random activations, by a name; the same for every module."""
    generator = torch.Generator("cuda").manual_seed(m * k + terms)

    def random(rows: int, columns: int) -> torch.Tensor:
        made = torch.randn(rows, columns, device="cuda", generator=generator)
        return (made * torch.rand(rows, 1, device="cuda", generator=generator).mul(6).exp()).bfloat16()

    x, residual, gate_up, weight = random(m, k), random(m, k), random(m, 2 * k), random(1, k)[0]
    return {
        "plain": lambda: module.quantize(x, terms),
        "silu": lambda: module.silu_quantize(gate_up, terms),
        "norm": lambda: module.norm_quantize(x, weight, EPSILON, terms),
        "add and norm": lambda: module.add_norm_quantize(x, residual, weight, EPSILON, terms),
    }


def values(made: Made, terms: int) -> torch.Tensor:
    """Return the numbers that terms and scales stand for, float64 [M, K]."""
    weights = torch.tensor([1.0, 1 / reference.LOW_TERM], dtype=torch.float64, device="cuda")[:terms]
    tokens, scale = made[:2]
    return (tokens.double().view(terms, len(scale), -1) * weights.view(-1, 1, 1)).sum(0) * scale.double()


def judge(found: torch.Tensor, expected: torch.Tensor, terms: int) -> tuple[float, bool]:
    """Return which share of quantized numbers [M, K] differs, and whether that, and by how much, is as it may be."""
    most = expected.abs().amax(-1, keepdim=True)
    # A step of FP8 (1/8 of the number, or the least), or two of bfloat16 (1/128 each) before it became two terms.
    step = expected.abs() * 2.0 ** (-2.8 if terms == 1 else -5.9) + most * 2.0 ** (-17 if terms == 1 else -20)
    gap = (found - expected).abs()
    # Scales that differ by a step of bfloat16 do not count.
    different = gap.gt(expected.abs() * 2.0 ** (-6 if terms == 1 else -9) + most * 2.0**-20).double().mean()
    return float(different), bool(gap.le(step).all()) and float(different) <= OTHER


def check(m: int, k: int, terms: int) -> Iterator[Row]:
    """Compare the kernels with torch, and with themselves computed again."""
    for (what, ours), theirs in zip(
        calls(gpu, m, k, terms).items(), calls(reference, m, k, terms).values(), strict=True
    ):
        found, expected = ours(), theirs()
        again = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, ours(), strict=True))
        different, right = judge(values(found, terms), values(expected, terms), terms)
        totals = all(torch.equal(x, y) for x, y in zip(found[2:], expected[2:], strict=True))
        right = right and totals
        yield {"what": what, "m": m, "k": k, "terms": terms, "different": different, "right": right, "again": again}


def main() -> int:
    """Run the checks, print what is wrong and the worst of the rest, return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", action="store_true", help="small sizes only")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    sizes = ((1, 7), (128, 768, 4224, 8448)) if args.sanitizer else (TOKENS, LENGTHS)
    rows = noted(check(*size) for size in product(*sizes, (1, 2)))
    print(f"{len(rows)} results; most bytes that differ: {max(rows, key=lambda row: float(row['different']))}")
    question = "Do the kernels that quantize activations compute what they must, with the same bytes every time?"
    print(line(save(args, question, rows)))
    return 0 if all(map(is_right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
