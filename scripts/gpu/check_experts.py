"""Check the experts over the LUT layout on a CUDA GPU.

    python scripts/gpu/check_experts.py [--quick | --sanitizer] [--kernels hopper] [--checks cuts] [--json FILE]

Needs this checkout on PYTHONPATH, torch and Triton. Mixtures of random codes (all 16) and tables of entries of either
sign, of 8 to 256 experts, are held against the same, step by step: each step gets what the step before it made, since
a number beside the middle of two FP8 numbers may go to either, and with it a token's whole scale. Tokens and what lies
between the GEMMs must be quantized as torch does it, but for a few that go to the other neighbour; the two GEMMs are
held against float64 as `check_gemm.py` does it; and the weighted sum against float64. Every result is computed again,
and must come out with the same bytes; so must 1,000 replays of a CUDA graph, one alone and two on two streams at once,
each with its own layer.

With half of the experts on another rank (an expert map), and ids of −1, those must add nothing. On Hopper both kernels
are checked: the one in Gluon, by tables and by indices of tables, and the one in Triton; and of the one in Gluon the
launches that were measured, at their own sizes.

--sanitizer is small enough for `compute-sanitizer --tool racecheck python scripts/gpu/check_experts.py --sanitizer`: it
launches each kind of kernel on very small sizes, twice, and compares nothing but the bytes of the two.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from check_activations import judge
from check_gemm import REPLAYS, ROUNDING, Exact, Layer, Replayed, is_right, noted, replay
from results import add_options, line, save

from convert_w4a8.encoding.tables import index_tables
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import grouped, grouped_reference, reference
from convert_w4a8.kernels.gemm.grouped_launch import Launch, choose_launches
from convert_w4a8.kernels.gemm.tuned_experts import LAUNCHES

TOKENS = (1, 3, 16, 17, 64, 256)
CHECKS = ("results", "replays", "cuts", "tuned")
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
    Size(8, 2, 512, 2304),
    Size(16, 1, 640, 384),
    Size(64, 6, 2048, 896),
    Size(128, 8, 2048, 768),
    Size(256, 8, 1024, 256),
)
TUNED = (Size(8, 2, 4096, 14336), Size(128, 8, 2048, 768))
"""Mixtures that `kernels/gemm/tuned_experts.py` has launches of."""
QUICK = (Size(8, 2, 128, 128), Size(16, 3, 640, 384))
_TINY = Size(8, 2, 128, 128)
SANITIZED = ((_TINY, 16), (_TINY, 60), (_TINY, 100), (Size(8, 3, 1024, 128), 16), (Size(8, 2, 128, 2304), 3))
"""Sizes and tokens: blocks of 16, 32 and 64 pairs, K in two parts, and activations in two."""


@dataclass(frozen=True)
class Experts:
    """Random experts, their layers as `grouped.experts` takes them; expert_map: places on this rank, or None.

    hopper: run by the kernel for Hopper. launches: how to cut the GEMMs, None for what is chosen.
    """

    size: Size
    layers: tuple[grouped.Layer, grouped.Layer]
    expert_map: torch.Tensor | None
    hopper: bool
    launches: tuple[Launch, Launch] | None = None

    @staticmethod
    def random(size: Size, form: str, hopper: bool, mapped: bool = False) -> "Experts":
        """Return experts of a form of tables; mapped: every other one is on another rank.

        form: "lut" of random tables, "scale" of multiples, "index" of these, with indices.
        """
        here = size.experts // 2 if mapped else size.experts

        def stack(n: int, k: int) -> grouped.Layer:
            made = [Layer.random(n, k, "lut" if form == "lut" else "scale") for _ in range(here)]
            packed, tables = (torch.stack([getattr(layer, name) for layer in made]) for name in ("packed", "tables"))
            # Results of about the size of what goes in.
            layer = packed, tables, torch.stack([layer.channel for layer in made]) * (2 / k**0.5)
            found = index_tables(tables.view(-1, n, 8)) if form == "index" else None
            return layer if found is None else (*layer, found[0].view(here, -1, n), found[1])

        expert_map = None
        if mapped:
            expert_map = torch.full((size.experts,), -1, dtype=torch.int32, device="cuda")
            expert_map[::2] = torch.arange(here, dtype=torch.int32, device="cuda")
        gate_up, down = stack(2 * size.intermediate, size.hidden), stack(size.hidden, size.intermediate)
        return Experts(size, (gate_up, down), expert_map, hopper)

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
        given = x, topk_weights, topk_ids, *self.layers, self.expert_map, "silu", self.launches
        return grouped.experts(*given, hopper=self.hopper)

    def places(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return the place of each pair's expert in the layers, int64 [M · T], −1 where it is not here."""
        ids = topk_ids.flatten().long()
        return ids if self.expert_map is None else torch.where(ids < 0, -1, self.expert_map.long()[ids.clamp(min=0)])


@dataclass(frozen=True)
class Product:
    """What one of the two GEMMs was given, and what it made of it: FP8 tokens, their scales, bfloat16 [pairs, N]."""

    tokens: torch.Tensor
    scale: torch.Tensor
    output: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the numbers that tokens and scales stand for, float64."""
        return self.tokens.double() * self.scale.double().view(-1, 1)

    def exact(self, layer: grouped.Layer, places: torch.Tensor, share: int) -> Exact:
        """Multiply in float64; pairs whose expert is not here are 0. share: pairs that have a token in common."""
        products = torch.zeros(self.output.shape, dtype=torch.float64, device=self.output.device)

        def operands(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            pairs = (places >= 0).nonzero().flatten()[rows]  # `compare` leaves out those that are not here
            weights = [
                reference.weights(*(tensor[places[pair]] for tensor in layer[:2]))[column].clone()
                for pair, column in zip(pairs.tolist(), columns.tolist(), strict=True)
            ]
            scale = layer[2][places[pairs], columns].double() * self.scale.double().view(-1)[pairs // share]
            return self.tokens[pairs // share].double(), torch.stack(weights).double(), scale

        exact = Exact(products, torch.zeros_like(products), operands)
        for place in sorted({*places.tolist()} - {-1}):
            pairs = (places == place).nonzero().flatten()
            packed, tables, channel = (tensor[place] for tensor in layer[:3])
            weights, values = reference.weights(packed, tables).double().t(), self.values()[pairs // share]
            exact.products[pairs] = values @ weights * channel.double()
            exact.magnitudes[pairs] = values.abs() @ weights.abs() * channel.double()
        return exact


def watched(experts: Experts, given: Routed) -> tuple[torch.Tensor, Product, Product]:
    """Run experts, and return their result with what both GEMMs were given and made: of gates and ups, the products."""
    seen: list[Product] = []
    multiply = grouped._multiply  # noqa: SLF001

    def watch(*arguments: Any, **named: Any) -> None:
        multiply(*arguments, **named)
        tokens, scale, layer, output, *more = arguments
        if named.get("activation") is None:
            products = output.clone()  # long activations take the place of the gates
        else:
            products = output.new_empty(len(output), 2 * output.shape[1])
            plain = {"activation": None, "maxima": None, "is_sorted": True}  # compiled like that for the other GEMM
            multiply(tokens, scale, layer, products, *more, **(named | plain))
        seen.append(Product(tokens, scale, products))

    with mock.patch.object(grouped, "_multiply", watch):
        result = experts(*given)
    return result, seen[0], seen[1]


def compare(experts: Experts, given: Routed) -> tuple[torch.Tensor, Row]:
    """Return the result, and how far each step is from what it must be: the verdicts, and the worst of the GEMMs'."""
    x, weights, ids = given
    result, first, second = watched(experts, given)
    places = experts.places(ids)
    here = places >= 0
    if not here.any():
        return result, {"different": 0.0, "error": 0.0, "beyond_rounding": 0.0, "right": not result.any()}
    tokens, scale = quantize_tokens(x)
    different, quantized = judge(first.values(), tokens.double() * scale.double(), 1)
    products = []
    for made, layer, share in ((first, experts.layers[0], experts.size.choices), (second, experts.layers[1], 1)):
        exact = made.exact(layer, places, share)
        products.append(Exact(exact.products[here], exact.magnitudes[here], exact.operands).compare(made.output[here]))
    gate, up = first.output[here].chunk(2, dim=-1)
    tokens, scale = quantize_tokens(grouped_reference.activate(gate, up, "silu"))
    different_between, activated = judge(second.values()[here], tokens.double() * scale.double(), 1)
    each = torch.where(here[:, None], second.output.double(), 0) * weights.double().view(-1, 1)
    total = each.view(*ids.shape, -1).sum(1)
    # Beside the rounding of the result, that of float32 sums.
    allowed = total.abs() * ROUNDING + each.abs().view(*ids.shape, -1).sum(1) * 2.0**-22
    added = bool((result.double() - total).abs().le(allowed).all())
    verdicts = {"quantized": quantized, "activated": activated, "added": added}
    return result, {
        **verdicts,
        "different": max(different, different_between),
        "error": max(product["error"] for product in products),
        "beyond_rounding": max(product["beyond_rounding"] for product in products),
        "steps": max(product.get("steps", 0.0) for product in products),
        "right": all(verdicts.values()) and all(product["right"] for product in products),
    }


def check_results(sizes: Sequence[Size], tokens: Sequence[int], forms: Sequence[str], hopper: bool) -> Iterator[Row]:
    """Compare results of every size with what they must be, and with themselves computed again."""
    for size, form, mapped in product(sizes, forms, (False, True)):
        if mapped and (form != "lut" or size.choices == 1):
            continue
        experts = Experts.random(size, form, hopper, mapped)
        for m in tokens:
            given = experts.routed(m)
            found, row = compare(experts, given)
            again = all(torch.equal(experts(*given), found) for _ in range(3))
            yield {
                "check": "results",
                "m": m,
                "size": str(size),
                "tables": form,
                "mapped": mapped,
                "hopper": hopper,
                "again": again,
            } | row


def check_cuts() -> Iterator[Row]:
    """Compare results of every way to cut the GEMMs for Hopper that tuning may choose with what they must be."""
    from tune_experts import variants  # not every Triton has Gluon

    experts = Experts.random(Size(8, 2, 768, 1152), "index", hopper=True)
    for launch in variants((0, 1, 2)):
        given = experts.routed(4 * launch.block_m + 1)
        cut = replace(experts, launches=(launch, launch))
        try:
            found, row = compare(cut, given)
        except Exception as error:  # noqa: BLE001 - such as no room
            why = f"{type(error).__name__}: {error}"[:200]
            yield {"check": "cuts", "launch": str(launch), "again": True, "why_not": why}
            continue
        again = all(torch.equal(cut(*given), found) for _ in range(3))
        yield {"check": "cuts", "m": len(given[0]), "launch": str(launch), "again": again} | row


def check_tuned() -> Iterator[Row]:
    """Compare results of the launches that were measured, at the sizes that they are for, and replay them."""
    for size in TUNED:
        key = size.experts, size.hidden, size.intermediate
        pair = [Experts.random(size, "index", hopper=True) for _ in range(2)]
        for m in (pairs // size.choices for *mixture, pairs in LAUNCHES if tuple(mixture) == key):
            given = [experts.routed(m) for experts in pair]
            found, row = compare(pair[0], given[0])
            again = all(torch.equal(pair[0](*given[0]), found) for _ in range(3))
            noted_as = {"check": "tuned", "m": m, "size": str(size), "hopper": True}
            yield noted_as | {"again": again} | row
            calls: list[Callable[[], torch.Tensor]] = [partial(each, *of) for each, of in zip(pair, given, strict=True)]
            for replayed in replay([Replayed(call) for call in calls]):
                yield noted_as | {"check": "replays"} | replayed


def check_launches(cases: Sequence[tuple[Size, int]], form: str, hopper: bool) -> Iterator[Row]:
    """Run each case twice, and compare the bytes; on Hopper with all ways to look weights up."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for size, m in cases:
        chosen = choose_launches(m * size.choices, size.experts, size.hidden, size.intermediate, sms, hopper=hopper)
        ways = [[replace(launch, apart=apart) for launch in chosen] for apart in ((0, 1, 2) if hopper else (0,))]
        if hopper:
            ways += [[Launch(block_m, 1, stages=3, chain=True, overlap=3)] * 2 for block_m in (32, 80)]
            ways += [[Launch(32, 1, chain=True, overlap=1)] * 2]
            groups = size.hidden // 128, size.intermediate // 128
            ways += [
                [Launch(16, min(splits, most), stages=3, chain=splits == 1, overlap=0) for most in groups]
                for splits in (1, 2)
            ]
        for first, second in ways:
            experts = replace(Experts.random(size, form, hopper), launches=(first, second))
            given = experts.routed(m)
            again = torch.equal(experts(*given), experts(*given))
            row = {"check": "launches", "m": m, "size": str(size), "hopper": hopper, "launch": str(first)}
            yield row | {"again": again, "right": again}


def check_replays(sizes: Sequence[Size], tokens: Sequence[int], form: str, hopper: bool) -> Iterator[Row]:
    """Replay mixtures of some sizes, on one stream and on two."""
    for size, m in product(sizes, tokens):
        graphs = []
        for _ in range(2):
            experts = Experts.random(size, form, hopper)
            call: Callable[[], torch.Tensor] = partial(experts, *experts.routed(m))
            graphs.append(Replayed(call))
        for row in replay(graphs):
            yield {"check": "replays", "m": m, "size": str(size), "hopper": hopper} | row


def main() -> int:
    """Run the checks, print what is wrong and the worst of the rest, return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--sanitizer", action="store_true", help="launch very small sizes, compare little")
    parser.add_argument("--kernels", nargs="+", choices=("hopper", "triton"), default=("hopper", "triton"))
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS, help="default: all")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    torch.manual_seed(0)
    question = "Do the experts over the LUT layout compute what they must, with the same bytes every time?"
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    forms = {"hopper": "index", "triton": "lut"}
    kernels = [(forms[name], name == "hopper") for name in args.kernels if is_hopper or name != "hopper"]
    if args.sanitizer and args.checks != CHECKS:
        parser.error("--sanitizer has checks of its own: leave out --checks")
    if args.sanitizer:
        rows = noted(check_launches(SANITIZED, form, hopper) for form, hopper in kernels)
        print(f"{len(rows)} cases launched")
        print(line(save(args, question, rows)))
        return 0 if all(map(is_right, rows)) else 1
    sizes = QUICK if args.quick else SIZES
    checks: list[Iterator[Row]] = []
    for form, hopper in kernels:
        made = {
            "results": check_results(sizes, TOKENS, ("lut", "scale", "index") if hopper else ("lut", "scale"), hopper),
            "replays": check_replays(sizes[-2:], (1, 16, 64, 256), form, hopper),
            "cuts": check_cuts() if hopper and not args.quick else iter(()),
            "tuned": check_tuned() if hopper and not args.quick else iter(()),
        }
        checks += [made[name] for name in args.checks]
    rows = noted(checks)
    if not rows:
        parser.error("there is nothing to check: cuts and tuned are of the kernel for Hopper, and not quick")
    if results := [row for row in rows if row["check"] in ("results", "tuned")]:
        worst, beyond = (max(results, key=lambda row: float(row[key])) for key in ("error", "beyond_rounding"))
        count = sum(float(row["beyond_rounding"]) > 1 for row in results)
        print(f"{len(results)} results; the largest error: {worst}")
        print(f"{count} beyond 2⁻¹⁰ of their terms, and rounding; the farthest: {beyond}")
    replays = [row for row in rows if row["check"] == "replays"]
    print(f"{len(replays)} × {REPLAYS} replays, {sum(row['wrong'] for row in replays)} gave other bytes")
    print(line(save(args, question, rows)))
    return 0 if all(map(is_right, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
