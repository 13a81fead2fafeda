"""The kernels that bench_experts.py compares, each with a mixture's weights as it wants them.

CONTESTANTS is the table: a name, and a function from a mixture to one that runs its experts. A kernel that is not here
raises, and the reason is kept beside the figures. Ours and CUTLASS multiply by the same tables; the others by random
words, since how long they take does not depend on what they read.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch

from convert_w4a8.encoding.tables import index_scales, multiply_tables
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import grouped, grouped_reference, reference

GROUP = 128
U4B8 = 1125899907892224
"""vLLM's number of the scalar type of codes with bias 8."""

Experts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the number of a layer, bfloat16 tokens [M, hidden], float32 weights and int32 ids [M, T] to [M, hidden]."""


@dataclass(frozen=True)
class Mixture:
    """As many random layers of experts of one shape as exceed the L2 four times, two at least; or `copies` of them."""

    name: str
    experts: int
    choices: int
    hidden: int
    intermediate: int
    copies: int = 0

    @property
    def expert_bytes(self) -> int:
        """Codes of one expert, and a byte for each group: an index of a table, or a scale of FP8."""
        return 3 * self.hidden * self.intermediate * 65 // 128

    @property
    def layers(self) -> int:
        """How many layers there are."""
        most = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        return self.copies or max(2, math.ceil(most / (self.experts * self.expert_bytes)))

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """N and K of gate and up together, and of down."""
        return (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)

    @cached_property
    def lut(self) -> list[tuple[grouped.Layer, grouped.Layer]]:
        """The layers in the LUT layout, tables multiples of scales of either sign, and indices; gate-up, and down."""

        def make(n: int, k: int) -> grouped.Layer:
            codes = words(self.experts, k // 32, 4 * n)
            scales = torch.randn(self.experts, k // GROUP, n, device="cuda").mul(8).clamp(-56, 56)
            scales = scales.to(torch.float8_e4m3fn)
            channel = torch.rand(self.experts, n, device="cuda") / (32 * k**0.5)
            return codes, multiply_tables(scales), channel, *index_scales(scales)

        return [(make(*self.sizes[0]), make(*self.sizes[1])) for _ in range(self.layers)]

    def exact(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return what the first layer makes of tokens: sums in float64, rounded only where every kernel rounds."""
        total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            result = x[token]
            for place, layer in enumerate(self.lut[0]):
                packed, tables, channel = (tensor[expert] for tensor in layer[:3])
                if place:
                    gate, up = result.chunk(2, dim=-1)
                    result = grouped_reference.activate(gate, up, "silu")
                quantized, scale = quantize_tokens(result)
                weights = reference.weights(packed, tables).double()
                result = ((quantized.double() @ weights.t()) * channel.double() * scale.double()).bfloat16()
            total.index_add_(0, token, topk_weights[token, choice, None].double() * result.double())
        return total


def words(*shape: int) -> torch.Tensor:
    """Return random int32."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")


def is_hopper() -> bool:
    """Whether the kernel for Hopper can run here."""
    return torch.cuda.get_device_capability() == (9, 0)


def ours(mixture: Mixture) -> Experts:
    """Return our kernels."""

    def call(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return grouped.experts(x, topk_weights, topk_ids, *mixture.lut[layer], None, "silu", hopper=is_hopper())

    return call


def cutlass(mixture: Mixture) -> Experts:
    """Return vLLM's W4A8 experts, on our bytes, with the quantization before them."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import int4_w4afp8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8

    count, (_, hidden) = mixture.experts, mixture.sizes[0]
    config = SimpleNamespace(
        num_experts=count,
        num_local_experts=count,
        experts_per_token=mixture.choices,
        intermediate_size_per_partition=mixture.intermediate,
        hidden_dim=hidden,
        device=torch.device("cuda"),
        in_dtype=torch.bfloat16,
        max_num_tokens=1024,
    )
    layouts = []
    for n, k in mixture.sizes:
        blank = torch.zeros(1, n, k // 8, dtype=torch.int32, device="cuda")
        layouts.append(ops.cutlass_encode_and_reorder_int4b_grouped(blank)[1].repeat(count, 1).cuda())
    made = []
    for gate_up, down in mixture.lut:
        scales = int4_w4afp8_moe_quant_config(
            w1_scale=gate_up[1].flatten(),
            w2_scale=down[1].flatten(),
            g1_alphas=gate_up[2],
            g2_alphas=down[2],
            per_act_token_quant=True,
            per_out_ch_quant=True,
        )
        experts = CutlassExpertsW4A8Fp8(config, scales, *layouts, GROUP)
        shown = [layer[0].view(count, n, k // 8) for layer, (n, k) in zip((gate_up, down), mixture.sizes, strict=True)]
        made.append((experts, shown))

    def call(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        experts, (w1, w2) = made[layer]
        tokens, scale = ops.scaled_fp8_quant(x, None, use_per_token_if_dynamic=True)
        output = torch.empty_like(x)
        rows = len(x) * mixture.choices
        wide, narrow = max(2 * mixture.intermediate, hidden), max(mixture.intermediate, hidden)
        experts.apply(
            output=output,
            hidden_states=tokens,
            w1=w1,
            w2=w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=MoEActivation.SILU,
            global_num_experts=count,
            expert_map=None,
            a1q_scale=scale,
            a2_scale=None,
            workspace13=x.new_empty(rows * wide),
            workspace2=x.new_empty(rows * narrow),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output

    return call


def marlin(mixture: Mixture) -> Experts:
    """Return vLLM's default for W4A16 experts."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe

    def make(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (torch.rand(mixture.experts, k // GROUP, n, device="cuda") / k**0.5).bfloat16()
        return words(mixture.experts, k // 16, 2 * n), scales

    made = [(make(*mixture.sizes[0]), make(*mixture.sizes[1])) for _ in range(mixture.layers)]

    def call(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        (w1, scale1), (w2, scale2) = made[layer]
        output: torch.Tensor = fused_marlin_moe(
            x, w1, w2, None, None, scale1, scale2, topk_weights, topk_ids, U4B8, moe_sum=ops.moe_sum
        )
        return output

    return call


def humming(mixture: Mixture, activations: str) -> Experts:
    """Return humming as vLLM runs experts with it; activations "bfloat16", or "float8e4m3" for W4A8.

    vLLM sorts tokens once, in blocks as the first layer's configuration has them. Where the second layer's has others,
    which humming 0.1.19 chooses for some sizes, that would leave out experts: then tokens are sorted for each.
    """
    from humming.layer import HummingLayer, HummingMethod
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.moe_fused_mul_sum import moe_fused_mul_sum

    def make(n: int, k: int) -> Any:
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            num_experts=mixture.experts,
            weight_config={"dtype": "int4", "group_size": GROUP},
            input_config={"dtype": activations},
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
        ).cuda()
        scales = (torch.rand(mixture.experts, n, k // GROUP, device="cuda") / k**0.5).bfloat16()
        layer.load_from_tensors({"weight": words(mixture.experts, n, k // 8), "weight_scale": scales})
        layer.transform()
        return layer

    made = [(make(*mixture.sizes[0]), make(*mixture.sizes[1])) for _ in range(mixture.layers)]
    compute = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
    chosen = [HummingMethod.get_default_tuning_configs(layer, gemm_type="indexed") for layer in made[0]]

    def tuning(place: int, rows: int) -> list[Any]:
        """Return the configuration for so many rows, alone, since humming compiles all that it is given.

        Whatever the number of rows, its launcher looks for the configuration of one, too.
        """
        return [[0, 1 << 30, entry[2]] for entry in chosen[place] if entry[0] < rows <= entry[1]]

    def call(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        rows = topk_ids.numel()
        blocks = [tuning(place, rows)[0][2]["block_shape"][0] for place in (0, 1)]
        is_sorted = {
            size: moe_align_block_size(
                topk_ids=topk_ids, block_size=size, num_experts=mixture.experts, ignore_invalid_experts=True
            )
            for size in dict.fromkeys(blocks)
        }
        names = ("sorted_ids", "expert_ids", "num_tokens_padded")
        common = [
            dict(zip(names, is_sorted[size], strict=True)) | {"compute_config": compute, "valid_shape_m": rows}
            for size in blocks
        ]
        first, second = made[layer]
        both, active, results = (
            x.new_empty(rows, n) for n in (2 * mixture.intermediate, mixture.intermediate, mixture.hidden)
        )
        tokens, scale = HummingMethod.may_quant_input(layer=first, inputs=x)
        settings = json.dumps(tuning(0, rows))
        first(tokens, both, scale, top_k=mixture.choices, tuning_config=settings, **common[0])
        apply_moe_activation(MoEActivation.SILU, active, both)
        tokens, scale = HummingMethod.may_quant_input(layer=second, inputs=active)
        second(tokens, results, scale, top_k=1, tuning_config=json.dumps(tuning(1, rows)), **common[1])
        output = torch.empty_like(x)
        moe_fused_mul_sum(
            inputs=results.view(*topk_ids.shape, -1),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            expert_map=None,
            outputs=output,
        )
        return output

    return call


def bf16(mixture: Mixture) -> Experts:
    """Return vLLM's Triton kernel on bfloat16 weights."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def make(n: int, k: int) -> torch.Tensor:
        return torch.randn(mixture.experts, n, k, device="cuda", dtype=torch.bfloat16)

    made = [(make(*mixture.sizes[0]), make(*mixture.sizes[1])) for _ in range(mixture.layers)]

    def call(layer: int, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = fused_experts(x, *made[layer], topk_weights, topk_ids)
        return output

    return call


CONTESTANTS: dict[str, Callable[[Mixture], Experts]] = {
    "ours": ours,
    "cutlass": cutlass,
    "marlin": marlin,
    "bf16": bf16,
    "humming_w4a8": partial(humming, activations="float8e4m3"),
    "humming_w4a16": partial(humming, activations="bfloat16"),
}
"""Name → how to prepare it."""
COMPILED = ("ours", "bf16", "humming_w4a8", "humming_w4a16")
"""Those that compile when they are first called with a number of tokens, and keep the result on disk."""
SAME_WEIGHTS = ("ours", "cutlass")
"""Those whose results can be compared with float64."""
