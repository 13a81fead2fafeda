"""Check the experts over the LUT layout on a CUDA GPU: `check_experts.py [--quick | --sanitizer] [--json FILE]`.

Needs this checkout on PYTHONPATH, torch and Triton. Mixtures of random codes (all 16) and tables of entries of either
sign, of 8 to 256 experts, are held against the same in float64, rounded only where every kernel rounds (FP8
activations, bfloat16 results of the two GEMMs and of what lies between). Where sums end up beside the middle of two FP8
numbers, a step of FP8 differs, so a result may be off by `SHARE` of its token's root mean square, or more where few
channels lie between the two GEMMs, beside its rounding to bfloat16: a wrong number is off by about all of it. Every
result is computed again, and must come out with the same bytes; so must 1,000 replays of a CUDA graph, one alone and
two on two streams at once, each with its own layer.

With half of the experts on another rank (an expert map), and ids of −1, those must add nothing.

--sanitizer is small enough for `compute-sanitizer --tool memcheck python scripts/gpu/check_experts.py --sanitizer`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from check_gemm import REPLAYS, ROUNDING, Layer, Replayed
from results import add_options, line, save

from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import grouped, grouped_reference, reference

TOKENS = (1, 3, 16, 17, 64, 256)
SHARE = 0.05
"""What a step of FP8 between the two GEMMs may change, relative to the root mean square of a token's result."""

Row = dict[str, Any]
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """So many experts, of which a token has `choices`, and the sizes of their layers."""

    experts: int
    choices: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return f"{self.choices} of {self.experts}, {self.hidden} × {self.intermediate}"


SIZES = (
    Size(8, 2, 128, 128),
    Size(8, 2, 4096, 1408),
    Size(16, 1, 640, 384),
    Size(64, 6, 2048, 896),
    Size(128, 8, 2048, 768),
    Size(256, 8, 1024, 256),
)
QUICK = (Size(8, 2, 128, 128), Size(16, 3, 640, 384))
SANITIZED = (Size(8, 2, 128, 128), Size(16, 3, 1152, 256))


@dataclass(frozen=True)
class Experts:
    """Random experts, their layers as `grouped.experts` takes them; expert_map: places on this rank, or None."""

    size: Size
    layers: tuple[grouped.Layer, grouped.Layer]
    expert_map: torch.Tensor | None

    @staticmethod
    def random(size: Size, form: str, mapped: bool = False) -> "Experts":
        """Return experts of a form of tables, "lut" or "scale"; mapped: every other one is on another rank."""
        here = size.experts // 2 if mapped else size.experts

        def stack(n: int, k: int) -> grouped.Layer:
            made = [Layer.random(n, k, form) for _ in range(here)]
            packed, tables = (torch.stack([getattr(layer, name) for layer in made]) for name in ("packed", "tables"))
            # Results of about the size of what goes in.
            return packed, tables, torch.stack([layer.channel for layer in made]) * (2 / k**0.5)

        expert_map = None
        if mapped:
            expert_map = torch.full((size.experts,), -1, dtype=torch.int32, device="cuda")
            expert_map[::2] = torch.arange(here, dtype=torch.int32, device="cuda")
        gate_up, down = stack(2 * size.intermediate, size.hidden), stack(size.hidden, size.intermediate)
        return Experts(size, (gate_up, down), expert_map)

    def routed(self, m: int) -> Routed:
        """Return random tokens, weights that add up to 1, and choices."""
        scores = torch.randn(m, self.size.experts, device="cuda").softmax(-1)
        weights, ids = scores.topk(self.size.choices, dim=-1)
        x = torch.randn(m, self.size.hidden, device="cuda", dtype=torch.bfloat16)
        if self.expert_map is not None:
            ids[m // 2, 0] = -1
        return x, weights / weights.sum(-1, keepdim=True), ids.int()

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Run our kernels."""
        return grouped.experts(x, topk_weights, topk_ids, *self.layers, self.expert_map, "silu")

    def exact(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return float64 [M, hidden]."""
        places = topk_ids.long()
        if self.expert_map is not None:
            places = torch.where(places < 0, -1, self.expert_map.long()[places])
        total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for place in sorted({*places.flatten().tolist()} - {-1}):
            token, choice = (places == place).nonzero(as_tuple=True)
            gate, up = _product(x[token], self.layers[0], place).chunk(2, dim=-1)
            result = _product(grouped_reference.activate(gate, up, "silu"), self.layers[1], place)
            total.index_add_(0, token, topk_weights[token, choice, None].double() * result.double())
        return total


def _product(x: torch.Tensor, layer: grouped.Layer, place: int) -> torch.Tensor:
    packed, tables, channel = (tensor[place] for tensor in layer)
    tokens, scale = quantize_tokens(x)
    weights = reference.weights(packed, tables).double()
    return ((tokens.double() @ weights.t()) * scale.double() * channel.double()).bfloat16()


def compare(found: torch.Tensor, exact: torch.Tensor, intermediate: int) -> Row:
    """Return the error as a share of the length, the largest beyond rounding in units of what is allowed, the verdict.

    A token whose experts are all elsewhere must be 0.
    """
    gap = (found.double() - exact).abs()
    allowed = max(SHARE, intermediate**-0.5) * exact.square().mean(-1, keepdim=True).sqrt()
    beyond = ((gap - exact.abs() * ROUNDING).clamp(min=0) / allowed.clamp(min=1e-300)).max()
    return {
        "error": float(gap.norm() / exact.norm().clamp(min=1e-300)),
        "beyond_rounding": float(beyond),
        "right": bool(torch.isfinite(found).all()) and float(beyond) <= 1,
    }


def check_results(sizes: Sequence[Size], tokens: Sequence[int]) -> Iterator[Row]:
    """Compare results of every size with float64, and with themselves computed again."""
    for size, form, mapped in product(sizes, ("lut", "scale"), (False, True)):
        if mapped and (form == "scale" or size.choices == 1):
            continue
        experts = Experts.random(size, form, mapped)
        for m in tokens:
            given = experts.routed(m)
            found = experts(*given)
            again = all(torch.equal(experts(*given), found) for _ in range(3))
            row = {"check": "results", "m": m, "size": str(size), "tables": form, "mapped": mapped}
            yield row | compare(found, experts.exact(*given), size.intermediate) | {"again": again}


def check_replays(sizes: Sequence[Size], tokens: Sequence[int]) -> Iterator[Row]:
    """Replay a graph alone, then two on two streams at once; count the replays that gave other bytes."""
    for size, m in product(sizes, tokens):
        graphs = []
        for _ in range(2):
            experts = Experts.random(size, "lut")
            call: Callable[[], torch.Tensor] = partial(experts, *experts.routed(m))
            graphs.append(Replayed(call))
        torch.cuda.synchronize()
        for several in (graphs[:1], graphs):
            for _ in range(REPLAYS):
                for graph in several:
                    graph.replay()
            torch.cuda.synchronize()
            wrong = sum(int(graph.wrong) for graph in graphs)
            row = {"check": "replays", "m": m, "size": str(size), "streams": len(several), "replays": REPLAYS}
            yield row | {"wrong": wrong, "again": wrong == 0}


def main() -> int:
    """Run the checks, print what is wrong and the worst of the rest, return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--sanitizer", action="store_true", help="some results of very small sizes, no replays")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    torch.manual_seed(0)
    sizes = SANITIZED if args.sanitizer else QUICK if args.quick else SIZES
    checks = [check_results(sizes, (1, 17, 300) if args.sanitizer else TOKENS)]
    if not args.sanitizer:
        checks.append(check_replays(sizes[-2:], (1, 16, 64, 256)))
    rows: list[Row] = []
    for check in checks:
        for row in check:
            rows.append(row)
            if not (row["again"] and row.get("right", True)):
                print("WRONG", row, flush=True)
    results = [row for row in rows if row["check"] == "results"]
    worst, beyond = (max(results, key=lambda row: float(row[key])) for key in ("error", "beyond_rounding"))
    print(f"{len(results)} results; the largest error: {worst}\nfarthest beyond rounding: {beyond}")
    replays = [row for row in rows if row["check"] == "replays"]
    print(f"{len(replays)} × {REPLAYS} replays, {sum(row['wrong'] for row in replays)} gave other bytes")
    question = "Do the experts over the LUT layout compute what they must, with the same bytes every time?"
    print(line(save(args, question, rows)))
    return 0 if all(row["again"] and row.get("right", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
