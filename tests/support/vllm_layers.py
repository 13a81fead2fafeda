"""Layers for the tests of the vLLM plugin: made by vLLM's own classes in isolation, and filled with random weights."""

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_sources

from convert_w4a8.encoding.lut_layout import reorder
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.encoding.tables import expand_tables
from convert_w4a8.linear import Packing, W4A8Linear
from convert_w4a8.lut_format import TableForm

BLOCK: dict[str, Any] = {
    "quant_method": "w4a8_lut",
    "version": 1,
    "layout": "cutlass_sm90_16x32",
    "bits": 4,
    "group_size": 128,
    "tables": "scale",
    "activations": {"type": "float8_e4m3fn", "strategy": "token", "dynamic": True},
    "ignore": ["lm_head"],
    "conversion": {"tool": "w4a8-convert"},
}
ON_BOTH = pytest.mark.parametrize("vllm", vllm_sources.VERSIONS, indirect=True)
BOTH_TABLES = pytest.mark.parametrize("tables", list(TableForm))
TP = pytest.mark.parametrize("tp", [1, 2, 4])


def make_config(tables: TableForm, ignore: tuple[str, ...] = ()) -> Any:
    config = importlib.import_module("convert_w4a8.vllm_plugin.config")
    return config.W4A8LutConfig.from_config(BLOCK | {"tables": str(tables), "ignore": list(ignore)})


def linear_classes() -> Any:
    return importlib.import_module("vllm.model_executor.layers.linear")


class Weight:
    """A random layer: what the checkpoint holds of it, and any slice of it packed afresh."""

    def __init__(self, n: int, k: int, tables: TableForm, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tables = tables
        self.codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        self.scale = torch.rand(k // 128, n, generator=generator, dtype=torch.float32).mul(8).to(torch.float8_e4m3fn)
        self.channel = torch.rand(n, generator=generator, dtype=torch.float32) / 64

    def tensors(self, rows: slice = slice(None), columns: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Return the checkpoint's tensors of the sublayer of these output and input channels."""
        codes = self.codes[rows, columns].contiguous()
        scale = self.scale[:, rows]
        first, last, _ = columns.indices(self.codes.shape[1])
        scale = scale[first // 128 : last // 128].contiguous()
        tensors = {
            "weight_packed": reorder(pack_codes(codes), Packing.PACK_QUANTIZED),
            "weight_chan_scale": self.channel[rows],
        }
        if self.tables is TableForm.SCALE:
            return tensors | {"weight_scale": scale}
        return tensors | {"weight_lut": expand_tables(scale).flatten(1)}

    def layer(self) -> W4A8Linear:
        """Return the layer for the reference arithmetic."""
        return W4A8Linear(pack_codes(self.codes), Packing.PACK_QUANTIZED, self.scale, None, self.channel)


def load(layer: Any, weight: Weight, *shard: object) -> None:
    for name, tensor in weight.tensors().items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def join(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put the shards of a merged layer side by side along N, the last dimension of every tensor."""
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def part_of(size: int, rank: int, tp: int) -> slice:
    return slice(size // tp * rank, size // tp * (rank + 1))


def make_moe_config(experts: int, hidden: int, intermediate: int, tp: int, rank: int) -> SimpleNamespace:
    """Return what vLLM's `FusedMoEConfig` says of a gated MoE layer without expert parallelism."""
    parallel = SimpleNamespace(
        tp_size=tp,
        dp_size=1,
        use_ep=False,
        enable_eplb=False,
        use_batched_activation_format=False,
        use_all2all_kernels=False,
    )
    return SimpleNamespace(
        num_experts=experts,
        num_local_experts=experts,
        num_logical_experts=experts,
        experts_per_token=2,
        hidden_dim=hidden,
        hidden_dim_unpadded=hidden,
        intermediate_size=intermediate,
        intermediate_size_per_partition=intermediate // tp,
        moe_parallel_config=parallel,
        tp_size=tp,
        tp_rank=rank,
        tp_shard_with_padding=False,
        in_dtype=torch.bfloat16,
        is_act_and_mul=True,
        activation=SimpleNamespace(value="silu"),
        swiglu_limit=None,
        has_bias=False,
        is_lora_enabled=False,
        rocm_aiter_fmoe_enabled=False,
        shared_expert_prefix=None,
        device=torch.device("cpu"),
        max_num_tokens=16,
    )


def make_experts(
    config: Any, moe: SimpleNamespace, names: tuple[str, str, str], local: Sequence[int] | None = None
) -> Any:
    """Return vLLM's `RoutedExperts`; local: the experts of this rank, if they are not all."""
    mine = list(range(moe.num_experts) if local is None else local)
    moe.num_local_experts = len(mine)
    routed = importlib.import_module("vllm.model_executor.layers.fused_moe.routed_experts")
    manager = SimpleNamespace(
        local_num_experts=len(mine),
        placement_strategy="linear",
        expert_map=None,
        expert_mask=None,
        routing_tables=None,
        num_fused_shared_experts=0,
        map_global_to_local=lambda expert: mine.index(expert) if expert in mine else -1,
    )
    gate, down, up = names
    return routed.RoutedExperts(
        "model.layers.0.mlp.experts",
        torch.bfloat16,
        moe,
        config,
        expert_map_manager=manager,
        ckpt_gate_proj_name=gate,
        ckpt_down_proj_name=down,
        ckpt_up_proj_name=up,
    )


QWEN, MIXTRAL = ("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3")
