"""Experts: parameters that vLLM's MoE loader can slice, and what runs them: our kernels, or vLLM's own W4A8 experts.

Ours where they are the faster ones, at few tokens, and at every number of tokens where vLLM's cannot run: sizes that
CUTLASS does not take.
"""

from functools import cache
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import int4_w4afp8_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8
from vllm.model_executor.utils import replace_parameter, set_weight_attrs

from convert_w4a8.encoding.tables import multiply_tables
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TableForm, not_loaded, refusal, reordered_shape
from convert_w4a8.vllm_plugin import compat, partition, warm_up
from convert_w4a8.vllm_plugin.experts import lut_experts, most_tokens, takes
from convert_w4a8.vllm_plugin.gemm import decode_kernel, require_ours
from convert_w4a8.vllm_plugin.indices import indices
from convert_w4a8.vllm_plugin.loading import is_filled, noting_experts

_PROJECTIONS = {"w13": 2, "w2": 1}
"""vLLM's names of an expert's weights, and how many projections lie side by side in each."""

_INDICES = ("weight_table_index", "weight_distinct_tables")
"""What experts with few tables have besides, for our kernel."""


class W4A8LutMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Loads and runs the experts of one MoE layer of a `w4a8_lut` checkpoint.

    The loader looks at this class's name: it must contain neither "ModelOpt" nor "compressed".
    """

    def __init__(self, moe: Any, tables: TableForm) -> None:
        super().__init__(moe)
        compat.require_gpu()
        self.why_not_cutlass = compat.why_not_cutlass_experts(moe)
        self.why_not_ours = compat.why_not_our_experts(moe)
        self.tables = tables
        self.table_name = "weight_scale" if tables is TableForm.SCALE else "weight_lut"
        self.experts_cls = CutlassExpertsW4A8Fp8
        self.indexed: dict[str, bool] = {}
        """Whether weights have indices beside their tables, by vLLM's names of them; empty until they are loaded."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,  # noqa: ARG002 (the signature is vLLM's)
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `w13_*` (gate and up) and `w2_*` (down) of this rank's experts, [experts, …] each.

        They start as zeros, since vLLM may pad the hidden size: a zero nibble is the code 0. Only the first channel
        scale of each projection, which is never padding, starts as NaN, to show where no expert was loaded.
        """
        self._check_sizes(layer.layer_name, hidden_size, intermediate_size_per_partition)
        noting = noting_experts(extra_weight_attrs["weight_loader"])
        group, channel = (FusedMoeWeightScaleSupported[kind].value for kind in ("GROUP", "CHANNEL"))
        sizes = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        for w, (n, k) in sizes.items():
            columns = n if self.tables is TableForm.SCALE else 8 * n
            tensors = {
                "weight_packed": (reordered_shape(n, k), torch.int32, {"is_transposed": True}),
                self.table_name: (
                    (k // GROUP_SIZE, columns),
                    torch.float8_e4m3fn,
                    {"is_transposed": True, "quant_method": group},
                ),
                # Not transposed: the loader would look for a second dimension.
                "weight_chan_scale": ((n,), torch.float32, {"quant_method": channel, "weight_loader": noting}),
            }
            for name, (shape, dtype, attributes) in tensors.items():
                data = torch.zeros(num_experts, *shape, dtype=dtype)
                parameter = torch.nn.Parameter(data, requires_grad=False)
                layer.register_parameter(f"{w}_{name}", parameter)
                set_weight_attrs(parameter, extra_weight_attrs | attributes)
            getattr(layer, f"{w}_weight_chan_scale").data[:, :: n // _PROJECTIONS[w]] = torch.nan

    def _check_sizes(self, name: str, hidden: int, intermediate: int) -> None:
        """Find out whether CUTLASS can run this rank's part of the experts. ValueError where no kernel can."""
        multiple = partition.CUTLASS_EXPERT_MULTIPLE if self.why_not_ours else partition.EXPERT_MULTIPLE

        def at(tp: int) -> partition.ExpertPartition | None:
            size = partition.divided(self.moe.intermediate_size, tp)
            return None if size is None else partition.ExpertPartition(hidden, size, multiple)

        part = partition.ExpertPartition(hidden, intermediate, multiple)
        if not (self.why_not_cutlass and self.why_not_ours):
            partition.check(name, part, self.moe.tp_size, at)
        if why_not_cutlass := self.why_not_cutlass or compat.why_not_cutlass(part):
            if self.why_not_ours:
                reasons = f"{why_not_cutlass}; for our kernels, {self.why_not_ours}"
                raise refusal(name, reasons, "change that option of vLLM, or serve the W4A16 source checkpoint")
            require_ours(name, why_not_cutlass)
        self.cutlass = why_not_cutlass is None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Show the loaded buffers to the op as it wants to see them; expand the scales to tables, on their device.

        Raises ValueError, in one line, where the checkpoint did not have an expert: vLLM would serve noise.
        """
        layouts = []
        is_first = not self.indexed
        for w, projections in _PROJECTIONS.items():
            parameters = [
                getattr(layer, f"{w}_{name}") for name in ("weight_packed", self.table_name, "weight_chan_scale")
            ]
            packed, table, channel = (parameter.data for parameter in parameters)
            compat.require_op_dtypes(packed, table, channel)
            experts, n, k = packed.shape[0], packed.shape[2] // 4, packed.shape[1] * 32
            if not is_filled(parameters[-1], projections * experts) and channel.isnan().any():
                raise not_loaded(layer.layer_name)
            # The op takes n and k from the shape and the memory order from the strides that CUTLASS gave.
            replace_parameter(layer, f"{w}_weight_packed", packed.view(experts, n, k // 8))
            self.ours = self.why_not_ours is None and decode_kernel(packed.device)  # before CUDA graphs are captured
            few = None
            if self.ours and self.tables is TableForm.SCALE:  # the kernel for indices wants multiples of a scale
                few = indices(table, self.tables, layer.layer_name, self.indexed.get(w))
            self.indexed[w] = few is not None
            if few is not None:
                for name, data in zip(_INDICES, few, strict=True):
                    setattr(layer, f"{w}_{name}", torch.nn.Parameter(data, requires_grad=False))
            if self.tables is TableForm.SCALE:
                table = multiply_tables(table.view(-1, n))
            replace_parameter(layer, f"{w}_{self.table_name}", table.flatten())
            if self.cutlass:
                layout = _cutlass_layout(n, k, packed.device).repeat(experts, 1)
                layouts.append(layout.to(packed.device, non_blocking=True))
        if self.ours and is_first:  # later there is no expert_map: vLLM takes buffers away while it reloads
            choices = self.moe.experts_per_token
            most = most_tokens(choices, layer.global_num_experts) if self.cutlass else None
            activation = compat.activation_name(layer.activation)
            warm_up.experts(choices, self._weights(layer), layer.expert_map, activation, most, self._few_tables(layer))
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        if not self.cutlass:
            return
        self.moe_kernel = compat.make_moe_kernel(
            self.moe,
            self.moe_quant_config,
            layouts,
            routing_tables=layer._expert_routing_tables(),  # noqa: SLF001
        )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        """Return the scales in the form that vLLM's experts take them."""
        return int4_w4afp8_moe_quant_config(
            w1_scale=getattr(layer, f"w13_{self.table_name}"),
            w2_scale=getattr(layer, f"w2_{self.table_name}"),
            g1_alphas=layer.w13_weight_chan_scale,
            g2_alphas=layer.w2_weight_chan_scale,
            per_act_token_quant=True,
            per_out_ch_quant=True,
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        """Run the routed experts on bfloat16 [tokens, hidden]."""
        if layer.apply_router_weight_on_input:
            # Here, since vLLM's W4A8 experts multiply by the weights again when they add up an expert's results.
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if not self.cutlass or (self.ours and takes(topk_ids.numel(), layer.global_num_experts)):
            activation = compat.activation_name(layer.activation)
            weights, few = self._weights(layer), self._few_tables(layer)
            return lut_experts(x, topk_weights, topk_ids, *weights, layer.expert_map, activation, *few)
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight_packed,
            w2=layer.w2_weight_packed,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=False,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )

    def _weights(self, layer: RoutedExperts) -> list[torch.Tensor]:
        """Return the loaded weights as `lut_experts` takes them."""
        names = ("weight_packed", self.table_name, "weight_chan_scale")
        return [getattr(layer, f"{w}_{name}") for w in _PROJECTIONS for name in names]

    def _few_tables(self, layer: RoutedExperts) -> list[torch.Tensor | None]:
        """Return the indices of tables, and the distinct ones, of each kind of weights; None where they are many."""
        return [getattr(layer, f"{w}_{name}") if self.indexed[w] else None for w in _PROJECTIONS for name in _INDICES]

    @property
    def supports_eplb(self) -> bool:
        """Say no to moving experts between ranks while serving, as stock W4A8 does."""
        return False


@cache
def _cutlass_layout(n: int, k: int, device: torch.device) -> torch.Tensor:
    """Return CUTLASS's description of one expert's memory order, int32 [1, 3], which the grouped op wants per expert.

    It is opaque (a CuTe layout), so the op that makes it is asked, once per shape, with an expert of no content. On the
    host, since what lies on the device while weights are loaded is lost when vLLM's sleep mode discards the weights.
    """
    blank = torch.zeros(1, n, k // 8, dtype=torch.int32, device=device)
    layout: torch.Tensor = ops.cutlass_encode_and_reorder_int4b_grouped(blank)[1]
    return layout.cpu()
