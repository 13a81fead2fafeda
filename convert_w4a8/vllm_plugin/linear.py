"""Dense layers: parameters that vLLM's loaders can slice, and the same op call that stock W4A8 makes."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from convert_w4a8.encoding.tables import multiply_tables
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TableForm, not_loaded, refusal, reordered_shape
from convert_w4a8.vllm_plugin import compat, fusion, partition, warm_up
from convert_w4a8.vllm_plugin.activations import quantize
from convert_w4a8.vllm_plugin.gemm import (
    TWO_TERMS_TOKENS,
    decode_kernel,
    lut_gemm,
    lut_linear,
    require_kernel,
    terms,
)
from convert_w4a8.vllm_plugin.indices import indices
from convert_w4a8.vllm_plugin.loading import is_filled, noting_shards


class W4A8LutLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and runs one linear layer of a `w4a8_lut` checkpoint."""

    indexed: bool | None = None
    """Whether the layer has indices of few tables beside its tables; None until it is loaded."""

    def __init__(self, tables: TableForm) -> None:
        compat.require_gpu()
        self.tables = tables
        self.table_name = "weight_scale" if tables is TableForm.SCALE else "weight_lut"
        self.quant_fp8 = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        self.is_rewritten = fusion.install()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002 (the signature is vLLM's)
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register this rank's `weight_packed`, `weight_scale` or `weight_lut`, and `weight_chan_scale`."""
        _check_groups(layer)
        part = partition.Partition(input_size_per_partition, tuple(output_partition_sizes))
        partition.check(layer.prefix, part, layer.tp_size, _other_sizes(layer, input_size, part))
        require_kernel(layer.prefix, part)
        if params_dtype is not torch.bfloat16:
            raise refusal(
                layer.prefix, f"its dtype is {params_dtype}", "the kernel writes bfloat16: set --dtype bfloat16"
            )
        k, n = part.k, sum(part.shards)
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        layer.register_parameter(
            "weight_packed", _packed(torch.empty(reordered_shape(n, k), dtype=torch.int32), 4, loader)
        )
        if self.tables is TableForm.SCALE:
            scale = torch.empty(k // GROUP_SIZE, n, dtype=torch.float8_e4m3fn)
            parameter = GroupQuantScaleParameter(data=scale, input_dim=0, output_dim=1, weight_loader=loader)
        else:
            parameter = _packed(torch.empty(k // GROUP_SIZE, 8 * n, dtype=torch.float8_e4m3fn), 8, loader)
        layer.register_parameter(self.table_name, parameter)
        channel = torch.full((n,), torch.nan, dtype=torch.float32)  # until it is loaded
        layer.register_parameter(
            "weight_chan_scale",
            ChannelQuantScaleParameter(data=channel, output_dim=0, weight_loader=noting_shards(loader)),
        )
        self.shards = len(part.shards)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Show the loaded buffers to the op as it wants to see them; expand the scales to tables, on their device.

        Raises ValueError, in one line, where the checkpoint did not have all of the layer: vLLM would serve noise.
        """
        packed, table, channel = (
            getattr(layer, name).data for name in ("weight_packed", self.table_name, "weight_chan_scale")
        )
        if not is_filled(layer.weight_chan_scale, self.shards) and channel.isnan().any():
            raise not_loaded(layer.prefix)
        compat.require_op_dtypes(packed, table, channel)
        ours = decode_kernel(packed.device)  # which prepares it, before CUDA graphs are captured
        few = indices(table, self.tables, layer.prefix, self.indexed) if ours else None
        self.indexed = few is not None
        if self.tables is TableForm.SCALE:
            table = multiply_tables(table)
        # The op takes n from the second dimension and the memory order from its own layout: any [K/8, N] view will do.
        shown = {
            "weight_packed": packed.view(-1, packed.shape[1] // 4),
            self.table_name: table.flatten(),
            "weight_chan_scale": channel,
        }
        if few is not None:
            shown |= dict(zip(_INDICES, few, strict=True))
        for name, data in shown.items():  # vLLM's replace_parameter takes twice as long
            setattr(layer, name, torch.nn.Parameter(data, requires_grad=False))
        if ours:
            warm_up.linear(*shown.values())

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply bfloat16 [..., K] by the layer: bfloat16 [..., N], activations quantized as stock W4A8 does it."""
        flat = x.reshape(-1, x.shape[-1])
        weights = [layer.weight_packed, getattr(layer, self.table_name), layer.weight_chan_scale]
        if self.indexed:
            weights += [getattr(layer, name) for name in _INDICES]
        output: torch.Tensor
        if self.is_rewritten and torch.compiler.is_compiling():
            output = lut_linear(flat, *self.quant_fp8(flat), *weights)
        else:
            output = lut_gemm(*self._quantize(flat), *weights)
        if bias is not None:
            output.add_(bias)
        return output.reshape(*x.shape[:-1], output.shape[-1])

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize bfloat16 [M, K] as stock W4A8 does it, or to two terms where that was asked for."""
        if not torch.compiler.is_compiling() and x.shape[0] <= TWO_TERMS_TOKENS and terms(x.device) == 2:
            return quantize(x, 2)
        tokens: tuple[torch.Tensor, torch.Tensor] = self.quant_fp8(x)
        return tokens


register_weight_loader_v2_supported_method(W4A8LutLinearMethod)
_INDICES = ("weight_table_index", "weight_distinct_tables")
"""What a layer with few tables has besides, for the decode kernel."""


def _packed(data: torch.Tensor, columns_per_channel: int, loader: Callable[..., None]) -> PackedvLLMParameter:
    """Return a parameter [K', columns_per_channel·N] that vLLM slices along both dimensions."""
    factor = Fraction(1, columns_per_channel)
    return PackedvLLMParameter(
        data=data, input_dim=0, output_dim=1, packed_dim=1, packed_factor=factor, weight_loader=loader
    )


def _check_groups(layer: LinearBase) -> None:
    """Raise ValueError, in one line, for a state space with one group for several ranks.

    `MambaMixer2` then gives each rank a copy, in an `in_proj` that is not a merged layer and is wider than the
    checkpoint's. Only tensors called `weight`, and scales of one, are loaded so.
    """
    if type(layer) is ColumnParallelLinear and layer.prefix.endswith("in_proj") and layer.tp_size > 1:
        raise refusal(
            layer.prefix,
            f"at tensor-parallel size {layer.tp_size}, vLLM repeats output channels of it, which it does for 16-bit"
            " weights only",
            "serve it at tensor-parallel size 1, or convert it again with this layer unquantized (--keep)",
        )


def _other_sizes(
    layer: LinearBase, input_size: int, part: partition.Partition
) -> Callable[[int], partition.Partition | None]:
    """Return a function from a tensor-parallel size to what one rank would hold of the layer."""

    def at(tp: int) -> partition.Partition | None:
        if isinstance(layer, ReplicatedLinear) or layer.disable_tp:
            return part
        if isinstance(layer, QKVParallelLinear):
            sizes = (layer.head_size, layer.v_head_size)
            return partition.qkv(input_size, layer.total_num_heads, layer.total_num_kv_heads, sizes, tp)
        if isinstance(layer, RowParallelLinear):
            return partition.rows(input_size, part.shards, tp)
        merged = isinstance(layer, MergedColumnParallelLinear)
        return partition.columns(input_size, tuple(layer.output_sizes) if merged else (layer.output_size,), tp)

    return at
