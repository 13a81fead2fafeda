"""The kernels that bench_decode.py compares, each as something that prepares a layer's weights for it.

CONTESTANTS is the table: a name, and a function from the layers of one shape to a `Prepared`. A kernel that is not
here raises, and the reason is kept beside the figures. Ours and CUTLASS multiply by random tables, the kernels of W4A16
checkpoints (Machete, Marlin, humming) by random codes and BF16 scales of groups of 128.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from graph_timing import Call

from convert_w4a8.kernels.gemm import gpu, reference

GROUP = 128
U4B8 = 1125899907892224
"""vLLM's number of the scalar type of codes with bias 8."""


class Layers:
    """As many random layers of one shape as exceed the L2 four times."""

    def __init__(self, n: int, k: int, tokens: Sequence[int]) -> None:
        self.n, self.k, self.tokens = n, k, tokens
        self.nbytes = n * k // 2 + n * k // 16
        self.count = max(3, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / self.nbytes))

    @cached_property
    def lut(self) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Return codes in the LUT layout, tables of entries of either sign, and channel scales."""
        n, k = self.n, self.k
        tables = [
            torch.randn(k // GROUP, n, 8, device="cuda").mul(8).clamp(-56, 56).to(torch.float8_e4m3fn)
            for _ in range(self.count)
        ]
        return [_words(k // 32, 4 * n) for _ in range(self.count)], tables, torch.rand(n, device="cuda") / 64

    @cached_property
    def w4a16(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return codes int32 [N, K/8], in the order of K from the lowest nibble, and bfloat16 scales [N, K/128]."""
        scales = (torch.rand(self.n, self.k // GROUP, device="cuda") / 64).bfloat16()
        return [_words(self.n, self.k // 8) for _ in range(self.count)], scales

    @cached_property
    def lut_weights(self) -> torch.Tensor:
        """Return the first layer's weights, float32 [N, K], without the channel scales."""
        packed, tables, _ = self.lut
        return reference.weights(packed[0], tables[0])

    @cached_property
    def w4a16_weights(self) -> torch.Tensor:
        """Return the first layer's weights, float32 [N, K]."""
        words, scales = self.w4a16
        return w4a16_weights(words[0], scales)


def w4a16_weights(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [N, K] of codes int32 [N, K/8] with bias 8 and scales [N, K/128]."""
    nibbles = (words[..., None] >> (4 * torch.arange(8, device=words.device))) & 15
    codes = nibbles.flatten(1).float() - 8
    return codes * scales.float().repeat_interleave(GROUP, 1)


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


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations per token as vLLM does in eager mode: float8_e4m3fn [M, K], float32 [M, 1]."""
    tokens = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    vllm_ops().dynamic_per_token_scaled_fp8_quant(tokens, x, scale, None)
    return tokens, scale


def _quantized(
    layers: Layers, matmul: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], weights: torch.Tensor
) -> Prepared:
    """Return a contestant of FP8 activations. matmul: of activations, their scales and the number of a layer."""

    def whole(x: torch.Tensor) -> list[Call]:
        def call(layer: int) -> torch.Tensor:
            return matmul(*quantize(x), layer)

        return [partial(call, layer) for layer in range(layers.count)]

    def before(x: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
        # The same numbers without vLLM, whose kernel is only needed where its time counts.
        scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
        tokens = (x.float() / scale).to(torch.float8_e4m3fn)
        return [partial(matmul, tokens, scale, layer) for layer in range(layers.count)], tokens.float() * scale

    channel = layers.lut[2].double()
    return Prepared(lambda x: (x.double() @ weights.double().t()) * channel, whole, before)


def ours(layers: Layers) -> Prepared:
    """Return our kernel on FP8 activations."""
    packed, tables, channel = layers.lut
    return _quantized(layers, lambda x, scale, i: gpu.gemm(x, scale, packed[i], tables[i], channel), layers.lut_weights)


def ours_bf16(layers: Layers) -> Prepared:
    """Return our kernel on BF16 activations that it takes as they are."""
    gemm = getattr(gpu, "gemm_bf16", None)
    if gemm is None:
        raise NotHereError("convert_w4a8.kernels.gemm.gpu has no gemm_bf16")
    packed, tables, channel = layers.lut
    weights, scale = layers.lut_weights, channel.double()
    return Prepared(
        lambda x: (x.double() @ weights.double().t()) * scale,
        lambda x: [partial(gemm, x, packed[i], tables[i], channel) for i in range(layers.count)],
    )


def cutlass(layers: Layers) -> Prepared:
    """Return vLLM's CUTLASS W4A8, on our bytes."""
    op = vllm_ops().cutlass_w4a8_mm
    packed, tables, channel = layers.lut
    shown = [words.view(-1).view(layers.n, layers.k // 8).t() for words in packed]
    flat, column = [table.flatten() for table in tables], channel.view(-1, 1)

    def matmul(x: torch.Tensor, scale: torch.Tensor, i: int) -> torch.Tensor:
        output: torch.Tensor = op(x, shown[i], flat[i], GROUP, column, scale, None, None)
        return output

    return _quantized(layers, matmul, layers.lut_weights)


def _as_they_are(weights: torch.Tensor, matmuls: Iterable[Callable[[torch.Tensor], torch.Tensor]]) -> Prepared:
    """Return a contestant of BF16 activations, with the first layer's weights."""
    kept = list(matmuls)
    return Prepared(lambda x: x.double() @ weights.double().t(), lambda x: [partial(matmul, x) for matmul in kept])


def machete(layers: Layers) -> Prepared:
    """Return vLLM's default for W4A16 on Hopper."""
    ops, (words, scales) = vllm_ops(), layers.w4a16
    group = scales.t().contiguous()

    def of(codes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        laid = ops.machete_prepack_B(codes.t(), torch.bfloat16, U4B8, torch.bfloat16)
        return lambda x: ops.machete_mm(x, laid, U4B8, None, group, None, GROUP, None, None, None)

    return _as_they_are(layers.w4a16_weights, map(of, words))


def marlin(layers: Layers) -> Prepared:
    """Return vLLM's default for W4A16 before Hopper."""
    ops, (words, scales), n, k = vllm_ops(), layers.w4a16, layers.n, layers.k
    # Marlin reads the scales of 64 output channels in the order of an 8 × 8 transpose.
    order = torch.arange(64, device="cuda").view(8, 8).t().flatten()
    group = scales.t().reshape(-1, 64)[:, order].reshape(k // GROUP, n).contiguous()
    workspace = torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int, device="cuda")
    empty = torch.empty(0, dtype=torch.int, device="cuda")
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

    return _as_they_are(layers.w4a16_weights, map(of, words))


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


def humming(layers: Layers, activations: str) -> Prepared:
    """Return humming's kernel, W4A16 with activations "bfloat16", W4A8 with "float8e4m3"."""
    words, scales = layers.w4a16
    made = [humming_layer(codes, scales, activations) for codes in words]
    settings = {"compute_config": HUMMING_COMPUTE, "tuning_config": humming_tuning(made[0], layers.tokens)}
    prepared = _as_they_are(layers.w4a16_weights, [partial(layer, **settings) for layer in made])
    if activations == "bfloat16":
        return prepared

    def before(x: torch.Tensor) -> tuple[list[Call], torch.Tensor]:
        from humming.layer import HummingMethod

        tokens, scale = HummingMethod.may_quant_input(made[0], x)
        calls: list[Call] = [partial(layer, tokens, input_scale=scale, **settings) for layer in made]
        return calls, tokens.float() * scale.float().view(-1, 1)

    return Prepared(prepared.exact, prepared.whole, before)


def bf16(layers: Layers) -> Prepared:
    """Return torch's linear layer in BF16."""
    weights = [
        torch.randn(layers.n, layers.k, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, layers.count // 4))
    ]
    return _as_they_are(weights[0], [partial(torch.nn.functional.linear, weight=weight) for weight in weights])


CONTESTANTS: dict[str, Callable[[Layers], Prepared]] = {
    "ours": ours,
    "ours_bf16": ours_bf16,
    "cutlass": cutlass,
    "machete": machete,
    "marlin": marlin,
    "bf16": bf16,
    "humming_w4a8": partial(humming, activations="float8e4m3"),
    "humming_w4a16": partial(humming, activations="bfloat16"),
}
"""Name → how to prepare it."""
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


def _words(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, device="cuda")
