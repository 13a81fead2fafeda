"""Measure what a decoder layer launches besides attention, on a CUDA GPU: `bench_layer.py [--tokens 1 8 ...]`.

The four matrices of a layer of Llama-8B's shapes, and the norms, SwiGLU and quantizations between them, in a CUDA graph
of layers whose weights exceed the L2. `layer_us` is all of it, `gemms_us` the four products alone, each a graph's
average beside other layers' same products; NAME_us is one kernel for activations in a chain of its own, `NAME_copy_us`
a copy kernel that reads and writes as many bytes. --replays compares the bytes of so many replays with the first.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from graph_timing import Call, microseconds
from random_layers import Layers
from results import add_options, line, save

from convert_w4a8.kernels.activations import gpu as activations
from convert_w4a8.kernels.gemm import workspace
from convert_w4a8.vllm_plugin import gemm as plugin

HIDDEN, INNER, QKV = 4096, 14336, 6144
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
TOKENS = (1, 8, 16, 32, 64, 128)
EPSILON = 1e-5
QUESTION = "How long does a decoder layer take besides attention, and each of its kernels?"

Gemm = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def products(count: int) -> dict[str, Gemm]:
    """Return the plugin's operator for each matrix: of FP8 activations, their scales and the number of a layer."""

    def product(layers: Layers) -> Gemm:
        words = [packed.view(layers.k // 8, layers.n) for packed in layers.packed]
        tables, channel = [each.flatten() for each in layers.tables], layers.channel / 16
        index, distinct = layers.index, layers.distinct
        return lambda x, scale, i: plugin.gemm(x, scale, words[i], tables[i], channel, index[i], distinct)

    return {name: product(Layers(n, k, count)) for name, (n, k) in SHAPES.items()}


def layer(gemms: dict[str, Gemm], i: int, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Run one layer; the values of attention's heads stand for its result."""
    tokens, scale, residual = activations.add_norm_quantize(x, residual, norm, EPSILON)
    heads = gemms["qkv"](tokens, scale, i)[:, :HIDDEN]
    hidden = gemms["o"](*activations.quantize(heads), i)
    tokens, scale, residual = activations.add_norm_quantize(hidden, residual, norm, EPSILON)
    return gemms["down"](*activations.silu_quantize(gemms["gate_up"](tokens, scale, i)), i)


def alone(m: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return each kernel for activations, and the BF16 numbers that a copy moves for as many bytes."""
    x, residual, norm = (torch.randn(size, HIDDEN, device="cuda").bfloat16() for size in (m, m, 1))
    gate_up = torch.randn(m, 2 * INNER, device="cuda").bfloat16()
    return {
        "quantize": (partial(activations.quantize, x), m * HIDDEN * 3 // 4),
        "norm_quantize": (partial(activations.norm_quantize, x, norm[0], EPSILON), m * HIDDEN * 3 // 4),
        "add_norm_quantize": (
            partial(activations.add_norm_quantize, x, residual, norm[0], EPSILON),
            m * HIDDEN * 7 // 4,
        ),
        "silu_quantize": (partial(activations.silu_quantize, gate_up), m * INNER * 5 // 4),
    }


def measure(gemms: dict[str, Gemm], count: int, m: int, replays: int) -> dict[str, Any]:
    """Return the times for one number of tokens."""
    x, residual, norm = (torch.randn(size, HIDDEN, device="cuda").bfloat16() for size in (m, m, 1))
    calls: list[Call] = [partial(layer, gemms, i, x, residual, norm[0]) for i in range(count)]
    row: dict[str, Any] = {"m": m, "layer_us": microseconds(calls, 12)}
    for name, (_, k) in SHAPES.items():
        tokens, scale = activations.quantize(torch.randn(m, k, device="cuda").bfloat16())
        row[f"{name}_us"] = microseconds([partial(gemms[name], tokens, scale, i) for i in range(count)], 32)
    row["gemms_us"] = sum(row[f"{name}_us"] for name in SHAPES)
    for name, (call, size) in alone(m).items():
        source, target = (torch.zeros(size // 2, device="cuda", dtype=torch.float32) for _ in range(2))
        row[f"{name}_us"] = microseconds([call], 64)
        row[f"{name}_copy_us"] = microseconds([partial(target.copy_, source)], 64)
    if replays:
        row["different"] = different(calls, replays)
    return row


def different(calls: list[Call], replays: int) -> int:
    """Return how many results of a graph's replays are not those of its first."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    graph.replay()
    first = [output.clone() for output in outputs]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(replays):
        graph.replay()
        for output, expected in zip(outputs, first, strict=True):
            wrong += (output.view(torch.int16) != expected.view(torch.int16)).any()
    return int(wrong)


def main() -> None:
    """Measure, print, and exit with 1 where a replay gave other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="(default: all of %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="that are different (default: %(default)s)")
    parser.add_argument("--replays", type=int, default=200, help="whose bytes are compared (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")
    torch.manual_seed(0)
    workspace.prepare(torch.device("cuda", 0))
    gemms = products(args.layers)
    rows = []
    for m in args.tokens:
        rows.append(row := measure(gemms, args.layers, m, args.replays))
        document = save(args, QUESTION, rows)
        print(*(f"{name} {value:.4g}" for name, value in row.items()), sep=" | ", flush=True)
    print(line(document))
    if any(row.get("different") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
