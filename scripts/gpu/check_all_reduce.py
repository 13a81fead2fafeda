"""Check that kernels launched early wait for what another GPU brings: `check_all_reduce.py [--json FILE]`.

A process for each GPU runs a chain like a decoder's, with a part of every layer, sums over ranks and what reads them
next: norm with quantization (launched early), a linear layer, a sum, experts (five launches, all early), a sum. Every
other step reads a sum directly. It is run with the host waiting after every operation, without waiting, and as replays
of a CUDA graph, with sums by NCCL and by vLLM's own all-reduce: all must give the same bytes. Sums of two numbers have
no order, so on two GPUs both kinds of sums must agree as well.

--damage runs the check on norms and linear layers that do not wait at all, which it must see.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from check_experts import Experts, Size
from check_gemm import Layer
from results import VLLM_PACKAGES, add_options, line, save

from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.kernels.activations import gpu as activations
from convert_w4a8.kernels.gemm import hopper

QUESTION = "Do kernels that are launched early wait for sums over ranks?"
BLOCKS = 4
INPUTS = 2
TOKENS = (1, 2, 4, 8, 16, 64)
SIZES = (Size(8, 4, 512, 512), Size(4, 2, 768, 512), Size(128, 8, 2048, 384))
"""Of a rank's part: of the random and the trained mixture of `check_ranks.py` on two GPUs, of Qwen3-30B-A3B on two."""
Reduce = Callable[[torch.Tensor], torch.Tensor]


class Chain:
    """A rank's parts of so many blocks, and the tokens and choices of all ranks."""

    def __init__(self, size: Size, place: Place) -> None:
        torch.manual_seed(place.rank)
        self._size = size
        linear = [Layer.random(size.hidden, size.hidden, "lut") for _ in range(BLOCKS)]
        self._linear = [
            replace(layer, channel=layer.channel / 4) for layer in linear
        ]  # results about as large as tokens
        self._experts = [Experts.random(size, "index", hopper=True) for _ in range(BLOCKS)]
        self._norm = torch.ones(size.hidden, dtype=torch.bfloat16, device="cuda")
        self.take(1)

    def take(self, tokens: int) -> None:
        """Take so many random tokens, and random choices of experts for them."""
        common, size = torch.Generator().manual_seed(tokens), self._size
        self._inputs = [torch.randn(tokens, size.hidden, generator=common).bfloat16().cuda() for _ in range(INPUTS)]
        self._x = torch.empty_like(self._inputs[0])
        self._routed = []
        for _ in range(BLOCKS):
            weights, ids = torch.randn(tokens, size.experts, generator=common).softmax(-1).topk(size.choices, dim=-1)
            self._routed.append(((weights / weights.sum(-1, keepdim=True)).cuda(), ids.int().cuda()))

    def give(self, number: int) -> None:
        """Let one of the inputs be what runs next. They differ: what is read too early is of another one."""
        self._x.copy_(self._inputs[number])

    def run(self, reduce: Reduce, after: Callable[[], None] = lambda: None) -> torch.Tensor:
        """Return all sums, bfloat16 [2 · BLOCKS, tokens, hidden]. after: called after every operation."""
        sums = []
        x = residual = self._x
        for layer, experts, (weights, ids) in zip(self._linear, self._experts, self._routed, strict=True):
            tokens, scale, residual = activations.add_norm_quantize(x, residual, self._norm, 1e-5, 1)
            after()
            y = hopper.gemm(tokens, scale, layer.packed, layer.tables, layer.channel)
            after()
            y = reduce(y)
            after()
            z = experts(y, weights, ids)
            after()
            x = reduce(z)
            after()
            sums += [y, x]
        return torch.stack(sums)


@contextmanager
def reductions(place: Place) -> Iterator[dict[str, tuple[Reduce, Callable[[], Any]]]]:
    """Yield ways to add up over ranks by names: the function, and the context in which graphs are captured with it."""

    def by_nccl(x: torch.Tensor) -> torch.Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    found: dict[str, tuple[Reduce, Callable[[], Any]]] = {"NCCL": (by_nccl, nullcontext)}
    try:
        from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

        custom = CustomAllreduce(dist.new_group(backend="gloo"), place.device)
        if not custom.disabled:

            def by_vllm(x: torch.Tensor) -> torch.Tensor:
                summed: torch.Tensor = custom.custom_all_reduce(x)
                return summed

            found["vLLM"] = by_vllm, custom.capture
    except Exception as error:  # noqa: BLE001 - another vLLM, or GPUs without access to each other
        place.tell({"problem": f"{type(error).__name__}: {error}"[:300]})
    yield found


def check(place: Place, replays: int, damage: bool) -> None:
    """Check in one of the processes; the first one tells rows."""
    if damage:
        without_waiting()
    with reductions(place) as ways:
        for size in SIZES:
            chain = Chain(size, place)
            for tokens in TOKENS:
                chain.take(tokens)
                expected = None
                for name, (reduce, capturing) in ways.items():
                    row = check_one(chain, reduce, capturing, replays)
                    found = row.pop("expected")
                    row["same_sums"] = expected is None or torch.equal(found, expected)
                    expected = found if expected is None else expected
                    counts = torch.tensor(
                        [row["wrong"], row["wrong_replays"], row["finite"] is False, row["same_sums"] is False],
                        device=place.device,
                    )
                    dist.all_reduce(counts)
                    row["wrong"], row["wrong_replays"], bad, other = counts.tolist()
                    row["finite"], row["same_sums"] = not bad, not other
                    if place.is_first:
                        place.tell({"size": str(size), "tokens": tokens, "sums": name, "ranks": place.ranks} | row)


def check_one(chain: Chain, reduce: Reduce, capturing: Callable[[], Any], replays: int) -> dict[str, Any]:
    """Return how often this rank has other bytes than with the host waiting after every operation."""
    each = []
    for number in (0, *range(INPUTS)):  # the first time compiles
        chain.give(number)
        each.append(chain.run(reduce, torch.cuda.synchronize))
    expected = each[1:]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(replays // 10):
        chain.give(turn % INPUTS)
        wrong += (chain.run(reduce) != expected[turn % INPUTS]).any()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with capturing():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            chain.run(reduce)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = chain.run(reduce)
    dist.barrier()
    wrong_replays = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(replays):
        chain.give(turn % INPUTS)
        graph.replay()
        wrong_replays += (found != expected[turn % INPUTS]).any()
    torch.cuda.synchronize()
    dist.barrier()
    return {
        "expected": torch.stack(expected),
        "runs": replays // 10,
        "wrong": int(wrong),
        "replays": replays,
        "wrong_replays": int(wrong_replays),
        "finite": all(bool(torch.isfinite(one).all()) for one in expected),
    }


def without_waiting() -> None:
    """Have two kinds of kernels not wait: what a lost wait would look like. Not those that read where others lie."""
    from convert_w4a8.kernels.activations import gpu
    from convert_w4a8.kernels.gemm import hopper_kernel

    for module in (gpu, hopper_kernel):
        module.gdc_wait = module.gdc_launch_dependents  # type: ignore[attr-defined]


def main() -> int:
    """Run the processes, print rows as they come, return 1 where one is wrong, or with --damage where none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--damage", action="store_true", help="norms and linear layers do not wait")
    add_options(parser)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
    with tempfile.TemporaryDirectory(prefix="w4a8-kernels-") as cache:
        if args.damage:
            os.environ["TRITON_CACHE_DIR"] = cache  # compiled kernels are found by a source that is the same
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Do what `main` does."""
    rows: list[dict[str, Any]] = []

    def hear(row: dict[str, Any]) -> None:
        print(row, flush=True)
        if "problem" not in row:
            rows.append(row)
            save(args, QUESTION, rows, packages=VLLM_PACKAGES)

    run_on_all(check, (args.replays, args.damage), args.gpus, "cuda", hear)
    wrong = [row for row in rows if row["wrong"] or row["wrong_replays"] or not row["finite"] or not row["same_sums"]]
    print(line(save(args, QUESTION, rows, packages=VLLM_PACKAGES)))
    print(f"{len(wrong)} of {len(rows)} wrong{', as they must be' if args.damage and wrong else ''}")
    return int(bool(wrong) != args.damage)


if __name__ == "__main__":
    sys.exit(main())
