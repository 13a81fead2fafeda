"""The kernels that bench_decode.py compares, each as something that prepares a layer's weights for it.

CONTESTANTS is the table: a name, and a function from the layers of one shape to a `Prepared`. A kernel that is not here
raises, and the reason is kept beside the figures. Ours and CUTLASS multiply by tables of random group scales, the
kernels of W4A16 checkpoints (Machete, Marlin, humming) by random codes and BF16 scales of groups of 128.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from graph_timing import Call
from random_layers import GROUP, Layers

from convert_w4a8.vllm_plugin import gemm as plugin

U4B8 = 1125899907892224
"""vLLM's number of the scalar type of codes with bias 8."""


@dataclass(frozen=True)
class Prepared:
    """A kernel with the weights of all layers of a shape.

    exact: float64 [M, N], what the first layer makes of float activations [M, K].
    whole: from bfloat16 activations to a call for each layer with all that it launches.
    before: the same without quantization; and the activations that it multiplies, float [M, K]. None where the kernel
        takes activations as they are.
    """

    exact: Callable[[torch.Tensor], torch.Tensor]
    whole: Callable[[torch.Tensor], list[Call]]
    before: Callable[[torch.Tensor], tuple[list[Call], torch.Tensor]] | None = None


class NotHereError(RuntimeError):
    """A kernel cannot be compared on this machine; the message says why."""


def vllm_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations per token as vLLM does in eager mode: float8_e4m3fn [M, K], float32 [M, 1]."""
    tokens = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    vllm_ops().dynamic_per_token_scaled_fp8_quant(tokens, x, scale, None)
    return tokens, scale


def plugin_quantize(x: torch.Tensor, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations as the plugin does for its decode kernel: to one FP8 term, or to two that hold bfloat16."""
    try:
        kernels = importlib.import_module("convert_w4a8.kernels.activations.gpu")
    except ImportError:
        if terms == 1:
            return vllm_quantize(x)
        raise NotHereError("the plugin has no activations of two terms") from None
    found: tuple[torch.Tensor, torch.Tensor] = kernels.quantize(x, terms)
    return found


Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _lut(
    layers: Layers, quantize: Quantize, matmul: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> Prepared:
    """Return a contestant over the LUT layout. matmul: of activations, their scales and the number of a layer."""

    def whole(x: torch.Tensor) -> list[Call]:
        def call(layer: int) -> torch.Tensor:
            return matmul(*quantize(x), layer)

        return [partial(call, layer) for layer in range(layers.count)]

    def before(x: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
        # The same numbers without vLLM, whose kernel is only needed where its time counts.
        scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        tokens = (x.float() / scale).to(torch.float8_e4m3fn)
        return [partial(matmul, tokens, scale, layer) for layer in range(layers.count)], tokens.float() * scale

    weights, channel = layers.lut_weights, layers.channel.double()
    return Prepared(lambda x: (x.double() @ weights.double().t()) * channel, whole, before)


def ours(layers: Layers) -> Prepared:
    """Return the plugin's operator: our kernel, or CUTLASS where that is the faster one."""
    words = [packed.view(layers.k // 8, layers.n) for packed in layers.packed]
    flat, channel, index, distinct = [t.flatten() for t in layers.tables], layers.channel, layers.index, layers.distinct
    return _lut(
        layers,
        partial(plugin_quantize, terms=1),
        lambda x, s, i: plugin.gemm(x, s, words[i], flat[i], channel, index[i], distinct),
    )


def ours_bf16(layers: Layers) -> Prepared:
    """Return the same with activations that are not quantized: two FP8 terms each, of a few tokens."""
    most = getattr(plugin, "TWO_TERMS_TOKENS", 0)
    prepared = ours(layers)
    words = [packed.view(layers.k // 8, layers.n) for packed in layers.packed]
    flat, channel, index, distinct = [t.flatten() for t in layers.tables], layers.channel, layers.index, layers.distinct

    def whole(x: torch.Tensor) -> list[Call]:
        if x.shape[0] > most:
            raise NotHereError(f"more than {most} tokens")

        def call(i: int) -> torch.Tensor:
            return plugin.gemm(*plugin_quantize(x, 2), words[i], flat[i], channel, index[i], distinct)

        return [partial(call, i) for i in range(layers.count)]

    return Prepared(prepared.exact, whole)


def cutlass(layers: Layers) -> Prepared:
    """Return vLLM's CUTLASS W4A8, on our bytes."""
    op = vllm_ops().cutlass_w4a8_mm
    shown = [words.view(-1).view(layers.n, layers.k // 8).t() for words in layers.packed]
    flat, column = [tables.flatten() for tables in layers.tables], layers.channel.view(-1, 1)

    def matmul(x: torch.Tensor, scale: torch.Tensor, i: int) -> torch.Tensor:
        output: torch.Tensor = op(x, shown[i], flat[i], GROUP, column, scale, None, None)
        return output

    return _lut(layers, vllm_quantize, matmul)


def _as_they_are(weights: torch.Tensor, matmuls: Iterable[Callable[[torch.Tensor], torch.Tensor]]) -> Prepared:
    """Return a contestant of BF16 activations, with the first layer's weights."""
    kept = list(matmuls)
    return Prepared(lambda x: x.double() @ weights.double().t(), lambda x: [partial(matmul, x) for matmul in kept])


def machete(layers: Layers) -> Prepared:
    """Return vLLM's default for W4A16 on Hopper."""
    ops, group = vllm_ops(), layers.scales.t().contiguous()

    def of(codes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        laid = ops.machete_prepack_B(codes.t(), torch.bfloat16, U4B8, torch.bfloat16)
        return lambda x: ops.machete_mm(x, laid, U4B8, None, group, None, GROUP, None, None, None)

    return _as_they_are(layers.w4a16_weights, map(of, layers.words))


def marlin(layers: Layers) -> Prepared:
    """Return vLLM's default for W4A16 before Hopper."""
    ops, n, k = vllm_ops(), layers.n, layers.k
    # Marlin reads the scales of 64 output channels in the order of an 8 × 8 transpose.
    order = torch.arange(64, device=layers.device).view(8, 8).t().flatten()
    group = layers.scales.t().reshape(-1, 64)[:, order].reshape(k // GROUP, n).contiguous()
    workspace = torch.zeros(
        torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int, device=layers.device
    )
    empty = torch.empty(0, dtype=torch.int, device=layers.device)
    has_order = any("perm" in argument.name for argument in ops.marlin_gemm.default._schema.arguments)  # noqa: SLF001
    orders, full = ((empty, empty), (True,)) if has_order else ((), ())  # vLLM 0.33 has them no more

    def of(codes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        laid = ops.gptq_marlin_repack(codes.t().contiguous(), empty, k, n, 4, False)

        def matmul(x: torch.Tensor) -> torch.Tensor:
            sizes = (x.shape[0], n, k)
            # No atomic additions, sums in float32: as vLLM calls it.
            output: torch.Tensor = ops.marlin_gemm(
                x,
                None,
                laid,
                None,
                group,
                None,
                None,
                empty,
                *orders,
                workspace,
                U4B8,
                *sizes,
                *full,
                False,
                True,
                False,
            )
            return output

        return matmul

    return _as_they_are(layers.w4a16_weights, map(of, layers.words))


HUMMING_COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"})
"""As vLLM calls it."""


def humming_layer(words: torch.Tensor, scales: torch.Tensor, activations: str) -> Any:
    """Return humming's layer, as vLLM makes it of a W4A16 checkpoint. activations: humming's name of their type."""
    try:
        from humming.layer import HummingLayer
    except Exception as error:
        raise NotHereError(f"humming cannot be imported: {error}") from error
    n, k = words.shape[0], 8 * words.shape[1]
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "int4", "group_size": GROUP},
        input_config={"dtype": activations},
        pad_n_to_multiple=256,
        pad_k_to_multiple=128,
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_tensors({"weight": words, "weight_scale": scales})
    layer.transform()
    return layer


def humming_tuning(layer: Any, tokens: Sequence[int]) -> str:
    """Return those of humming's own configurations that take so many tokens: it compiles all that it is given."""
    from humming.layer import HummingMethod

    chosen = HummingMethod.get_default_tuning_configs(layer, gemm_type="dense")
    return json.dumps([entry for entry in chosen if any(entry[0] < m <= entry[1] for m in tokens)])


def humming(layers: Layers, tokens: Sequence[int], activations: str) -> Prepared:
    """Return humming's kernel, W4A16 with activations "bfloat16", W4A8 with "float8e4m3"."""
    made = [humming_layer(codes, layers.scales, activations) for codes in layers.words]
    settings = {"compute_config": HUMMING_COMPUTE, "tuning_config": humming_tuning(made[0], tokens)}
    prepared = _as_they_are(layers.w4a16_weights, [partial(layer, **settings) for layer in made])
    if activations == "bfloat16":
        return prepared

    def before(x: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
        from humming.layer import HummingMethod

        quantized, scale = HummingMethod.may_quant_input(made[0], x)
        calls: list[Call] = [partial(layer, quantized, input_scale=scale, **settings) for layer in made]
        return calls, quantized.float() * scale.float().view(-1, 1)

    return Prepared(prepared.exact, prepared.whole, before)


def bf16(layers: Layers) -> Prepared:
    """Return torch's linear layer in BF16."""
    weights = [
        torch.randn(layers.n, layers.k, device=layers.device, dtype=torch.bfloat16)
        for _ in range(max(3, layers.count // 4))
    ]
    return _as_they_are(weights[0], [partial(torch.nn.functional.linear, weight=weight) for weight in weights])


CONTESTANTS: dict[str, Callable[[Layers, Sequence[int]], Prepared]] = {
    "ours": lambda layers, _: ours(layers),
    "ours_bf16": lambda layers, _: ours_bf16(layers),
    "cutlass": lambda layers, _: cutlass(layers),
    "machete": lambda layers, _: machete(layers),
    "marlin": lambda layers, _: marlin(layers),
    "bf16": lambda layers, _: bf16(layers),
    "humming_w4a8": partial(humming, activations="float8e4m3"),
    "humming_w4a16": partial(humming, activations="bfloat16"),
}
"""Name → how to prepare it, given the layers and the numbers of tokens that will come."""
PEERS = ("cutlass", "machete", "marlin", "humming_w4a8", "humming_w4a16")
"""Those that a W4 checkpoint can be served with instead."""


def load_vllm_ops(library: Path | None) -> None:
    """Register vLLM's operators: those of a file, such as _C_stable_libtorch.abi3.so, or of the installed package."""
    if library is not None:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


@cache
def vllm_ops() -> Any:
    """Return the namespace of vLLM's operators. NotHereError where there are none."""
    if not hasattr(torch.ops._C, "cutlass_w4a8_mm"):  # noqa: SLF001 - where vLLM registers them
        try:
            import vllm._custom_ops  # noqa: F401
        except Exception as error:
            raise NotHereError(f"vLLM's operators cannot be loaded: {error}") from error
    return torch.ops._C  # noqa: SLF001
