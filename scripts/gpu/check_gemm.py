"""Check the GEMM over the LUT layout on a CUDA GPU: `check_gemm.py [--quick | --sanitizer] [--json FILE]`.

Needs this checkout on PYTHONPATH, torch and Triton. Products of random activations with random codes (all 16) and
tables of entries of either sign are held against float64 of the same numbers: an output may differ by its rounding to
bfloat16, and by 2⁻¹⁰ of the sum of its terms' magnitudes, since Hopper's tensor core adds FP8 products in about 14
bits, and for many tokens all of K there, as CUTLASS does. Where few terms are far larger than all others, that can be
more: 2⁻¹³ of the binade of the largest number in each step of 32 products, once or twice (`steps_lose`). Every product
is computed several times and must come out with the same bytes, also by indices of tables where the kernel can read
these; so must 1,000 replays of a CUDA graph, one alone and two on two streams at once, each with its own layer.

--sanitizer is small enough for `compute-sanitizer --tool memcheck python scripts/gpu/check_gemm.py --sanitizer`.
--kernel names another module with a function `gemm` of the same arguments; --terms 2 gives it the two FP8 terms of an
activation, x = scale · (first + second / 16), as rows 0 … M − 1 and M … 2·M − 1; --most and --multiple say what it
takes.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from results import add_options, line, save

from convert_w4a8.encoding.tables import index_tables, multiply_tables
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import reference

TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 300, 1000)
WIDTHS = (16, 48, 1536, 2112, 4096)
LENGTHS = (128, 512, 4096, 14336)
REPLAYS = 1000
PATIENCE = 20.0
"""Seconds between two lines of how many checks are done."""
ROUNDING = 2.0**-8
"""What rounding to bfloat16 may change, relative to the result."""
SUMS = 2.0**-10
"""What sums in the tensor core may change, relative to the sum of the terms' magnitudes."""
MOST_BEYOND = 1000
"""Outputs of a product of which more may be lost, at most."""

STEPS = 2
"""How often a step in the tensor core may lose 2⁻¹³ of the binade of its largest number, where it sums all of K.

A step shifts 32 products and the sum before to the largest exponent among them, and keeps 14 bits of each. On an H200
vLLM's CUTLASS and ours, which gave the same errors, lost up to 1.41 of these units for all steps together, of sums over
768 to 14336 products of normal activations and of SiLU's.
"""

Gemm = Callable[..., torch.Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """Random codes int32 [K/32, 4·N], tables float8_e4m3fn [K/128, N, 8], channel scales float32 [N]."""

    packed: torch.Tensor
    tables: torch.Tensor
    channel: torch.Tensor

    @staticmethod
    def random(n: int, k: int, form: str) -> "Layer":
        """Return a layer whose tables are free entries ("lut") or multiples of a group scale ("scale")."""
        packed = torch.randint(-(2**31), 2**31, (k // 32, 4 * n), dtype=torch.int64, device="cuda").int()
        if form == "lut":
            tables = torch.randn(k // 128, n, 8, device="cuda").mul(30).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            scale = torch.randn(k // 128, n, device="cuda").mul(10).clamp(-56, 56)
            tables = multiply_tables(scale.to(torch.float8_e4m3fn))
        return Layer(packed, tables, torch.rand(n, device="cuda") / 64)


@dataclass(frozen=True)
class Tokens:
    """Activations of one or two FP8 terms: float8_e4m3fn [terms, M, K], and scales float32 [M, 1]."""

    terms: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def random(m: int, k: int, terms: int) -> "Tokens":
        """Return normal activations, each token of another size."""
        act = torch.randn(m, k, device="cuda") * torch.rand(m, 1, device="cuda").mul(10).exp()
        high, scale = quantize_tokens(act.bfloat16())
        if terms == 1:
            return Tokens(high[None], scale)
        low = ((act.bfloat16().float() / scale - high.float()) * 16).to(torch.float8_e4m3fn)
        return Tokens(torch.stack((high, low)), scale)

    def first(self, m: int) -> "Tokens":
        """Return the first m tokens."""
        return Tokens(self.terms[:, :m], self.scale[:m])

    def values(self) -> torch.Tensor:
        """Return float64 [M, K], without the scales."""
        weights = torch.tensor([1.0, 1 / 16], dtype=torch.float64, device="cuda")[: len(self.terms)]
        return (self.terms.double() * weights.view(-1, 1, 1)).sum(0)

    def call(self, gemm: Gemm, layer: Layer, *indices: torch.Tensor) -> torch.Tensor:
        """Multiply. indices: of the layer's tables, and the distinct ones."""
        rows = self.terms.reshape(-1, self.terms.shape[-1]).contiguous()  # of one token, they would be a view
        return gemm(rows, self.scale, layer.packed, layer.tables, layer.channel, *indices)


def steps_lose(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what the tensor core's sums of pairs of rows may lose: float64 [P] of values and weights float64 [P, K].

    That is 2⁻¹³ of the binade of the largest number in each step of 32 products, once.
    """
    terms = (values * weights).view(*values.shape[:-1], -1, 32)
    sums = terms.sum(-1).cumsum(-1).abs()
    before = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), -1)
    largest = torch.maximum(torch.maximum(sums, before), terms.abs().amax(-1))
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=1e-300).log2().floor() - 13), 0.0).sum(-1)


Operands = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""From the rows and columns of some outputs to the values and weights that the tensor core multiplies for them, float64
[P, K], and the scales of the sums, float64 [P]."""


@dataclass(frozen=True)
class Exact:
    """Products float64 [M, N], the sums of their terms' magnitudes, and what is multiplied for some of them."""

    products: torch.Tensor
    magnitudes: torch.Tensor
    operands: Operands

    @staticmethod
    def of(tokens: Tokens, layer: Layer) -> "Exact":
        """Multiply in float64."""
        weights = reference.weights(layer.packed, layer.tables).double().t()
        values, scale = tokens.values(), tokens.scale.double() * layer.channel.double()

        def operands(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return values[rows], weights.t()[columns], scale[rows, columns]

        return Exact(values @ weights * scale, values.abs() @ weights.abs() * scale, operands)

    def compare(self, found: torch.Tensor) -> Row:
        """Return the error as a share of the length, what of it sums cost (in units of SUMS), and the verdict.

        Where outputs are beyond SUMS, `steps` says how many of `steps_lose` that is.
        """
        m = len(found)
        exact, magnitudes = self.products[:m], self.magnitudes[:m]
        gap = (found.double() - exact).abs()
        sums = gap - exact.abs() * ROUNDING
        beyond = sums / magnitudes.clamp(min=1e-300) / SUMS
        row = {
            "error": float(gap.norm() / exact.norm()),
            "beyond_rounding": max(0.0, float(beyond.max())),
            "right": bool(torch.isfinite(found).all()),
        }
        rows, columns = (beyond > 1).nonzero(as_tuple=True)
        if len(rows) > MOST_BEYOND:
            row["right"] = False
        elif len(rows):
            values, weights, scale = self.operands(rows, columns)
            lost = steps_lose(values, weights) * scale
            row["steps"] = float((sums[rows, columns] / lost.clamp(min=1e-300)).max())
            row["right"] = row["right"] and row["steps"] <= STEPS
        return row


def check_products(gemm: Gemm, sizes: Sequence[tuple[int, int]], tokens: Sequence[int], terms: int) -> Iterator[Row]:
    """Compare products of every size with float64, and with themselves computed again."""
    for (n, k), form in product(sizes, ("lut", "scale")):
        layer, all_tokens = Layer.random(n, k, form), Tokens.random(max(tokens), k, terms)
        exact = Exact.of(all_tokens, layer)
        for m in tokens:
            some = all_tokens.first(m)
            found = some.call(gemm, layer)
            again = all(torch.equal(some.call(gemm, layer), found) for _ in range(3))
            yield (
                {"check": "products", "m": m, "n": n, "k": k, "tables": form} | exact.compare(found) | {"again": again}
            )


class Replayed:
    """A CUDA graph of one product, captured on a stream of its own, which counts results that are not the first."""

    def __init__(self, call: Callable[[], torch.Tensor]) -> None:
        self.call = call  # keeps alive what the graph reads
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.expected = call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.output = call()
            self.wrong += (self.output.view(torch.int16) != self.expected.view(torch.int16)).any()

    def replay(self) -> None:
        """Start the graph once more on its stream."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def replay(graphs: Sequence[Replayed]) -> Iterator[Row]:
    """Replay a graph alone, then all on their streams at once; count the replays that gave other bytes."""
    torch.cuda.synchronize()
    for several in (graphs[:1], graphs):
        for _ in range(REPLAYS):
            for graph in several:
                graph.replay()
        torch.cuda.synchronize()
        wrong = sum(int(graph.wrong) for graph in graphs)
        yield {"streams": len(several), "replays": REPLAYS, "wrong": wrong, "again": wrong == 0}


def check_indices(kernel: Any, sizes: Sequence[tuple[int, int]], tokens: Sequence[int], terms: int) -> Iterator[Row]:
    """Compare products by indices of tables with those by the tables of all groups, all ways, to the byte.

    And those of parts of K that clusters add up with those of parts that are added up in memory.
    """
    from tune_gemm import ways  # not every Triton has Gluon

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for (n, k), m in product(sizes, tokens):
        layer, some = Layer.random(n, k, "scale"), Tokens.random(m, k, terms)
        indices = index_tables(layer.tables)
        launch = kernel.choose_launch(m, n, k, sms, terms)
        launch = replace(launch, splits=min(launch.splits, kernel.MOST_OF_CLUSTER))
        clusters = (False, True) if launch.clusters(terms) else (False,)
        launches = [replace(launch, cluster=by, **way) for by in clusters for way in ways(launch.block_m * terms)]
        first, *more = (some.call(partial(kernel.gemm_by, launch=by), layer, *(indices or ())) for by in launches)
        same = indices is not None and all(torch.equal(found, first) for found in more)
        yield {"check": "indices", "m": m, "n": n, "k": k, "again": same}


def is_right(row: Row) -> bool:
    """Whether a row of any of the checks is as it has to be."""
    return bool(row["again"] and row.get("right", True))


def noted(checks: Iterable[Iterable[Row]]) -> list[Row]:
    """Return the rows of all checks; print those that are wrong as they come, and now and then how many there were."""
    rows = []
    began = told = time.monotonic()
    for row in chain.from_iterable(checks):
        rows.append(row)
        if time.monotonic() > told + PATIENCE:
            told = time.monotonic()
            print(f"{len(rows)} after {told - began:.0f} s, now {row['check']}", file=sys.stderr, flush=True)
        if not is_right(row):
            print("WRONG", row, flush=True)
    return rows


def check_replays(gemm: Gemm, sizes: Sequence[tuple[int, int]], tokens: Sequence[int], terms: int) -> Iterator[Row]:
    """Replay products of some sizes, on one stream and on two."""
    for (n, k), m in product(sizes, tokens):
        graphs = [Replayed(partial(Tokens.random(m, k, terms).call, gemm, Layer.random(n, k, "lut"))) for _ in range(2)]
        for row in replay(graphs):
            yield {"check": "replays", "m": m, "n": n, "k": k} | row


def main() -> int:
    """Run the checks, print what is wrong and the worst of the rest, return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--sanitizer", action="store_true", help="some products of very small sizes, no replays")
    parser.add_argument("--kernel", default="convert_w4a8.kernels.gemm.gpu", help="module (default: %(default)s)")
    parser.add_argument("--terms", type=int, default=1, choices=(1, 2), help="FP8 terms of an activation")
    parser.add_argument("--most", type=int, default=max(TOKENS), help="most tokens that the kernel takes")
    parser.add_argument("--multiple", type=int, default=16, help="of what N must be a multiple")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="N (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    torch.manual_seed(0)
    kernel = importlib.import_module(args.kernel)
    gemm: Gemm = kernel.gemm
    small = args.quick or args.sanitizer
    widths = [n for n in ((16, 48, 208) if small else args.widths) if n % args.multiple == 0] or [args.multiple]
    lengths = (128, 1024) if args.sanitizer else LENGTHS[:3] if args.quick else LENGTHS
    tokens = [m for m in ((1, 7, 17, 33, 65, 129, 300) if args.sanitizer else TOKENS) if m <= args.most]
    checks = [check_products(gemm, list(product(widths, lengths)), tokens, args.terms)]
    if hasattr(kernel.Launch, "indexed"):
        checks.append(check_indices(kernel, list(product(widths, lengths)), tokens, args.terms))
    if not args.sanitizer:
        replayed = [(n, 4096) for n in (widths[-1], 4 * widths[-1])]
        checks.append(check_replays(gemm, replayed, [m for m in (1, 16, 65, 300) if m <= args.most], args.terms))
    rows = noted(checks)
    products = [row for row in rows if row["check"] == "products"]
    worst, beyond = (max(products, key=lambda row: float(row[key])) for key in ("error", "beyond_rounding"))
    print(f"{len(products)} products; the largest error: {worst}\nfarthest beyond rounding: {beyond}")
    question = "Does the GEMM over the LUT layout compute what it must, with the same bytes every time?"
    print(line(save(args, question, rows)))
    return 0 if all(map(is_right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
