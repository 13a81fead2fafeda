"""The checkpoints of the tensor-parallel check on GPUs: vLLM's loaders take them at sizes 1, 2 and 4, on CPU."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import vllm_sources
from paths import ROOT
from safetensors.torch import load_file
from vllm_layers import ON_BOTH, QWEN, linear_classes, make_experts, make_moe_config

SCRIPT = ROOT / "scripts" / "checkpoints" / "make_random_checkpoint.py"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Tensors]]:
    """Make one layer of each; return their config.json and that layer's tensors, by the last parts of their names."""
    spec = importlib.util.spec_from_file_location("make_random_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = {}
    for name in ("tp4", "tp4-moe"):
        shape = replace(script.SHAPES[name], layers=1, vocabulary=64)
        directory = script.make(shape, tmp_path_factory.mktemp("tp") / name, ("lut",))["lut"]
        tensors = load_file(directory / "model-000.safetensors")
        parts = {key.removeprefix("model.layers.0."): value for key, value in tensors.items()}
        named = {key.removeprefix("self_attn.").removeprefix("mlp."): value for key, value in parts.items()}
        found[name] = json.loads((directory / "config.json").read_text()), named
    return found


def _plugin_config(block: dict[str, Any]) -> Any:
    return importlib.import_module("convert_w4a8.vllm_plugin.config").W4A8LutConfig.from_config(block)


def _load(layer: Any, tensors: Tensors, **shards: object) -> Any:
    """Load the named sublayers into one layer of vLLM's, and process it."""
    for source, shard in shards.items():
        for name in ("weight_packed", "weight_scale", "weight_chan_scale"):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensors[f"{source}.{name}"], *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


SHARDS: dict[str, dict[str, object]] = {
    "qkv": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up": {"gate_proj": 0, "up_proj": 1},
}


def _attention_and_mlp(config: dict[str, Any], tensors: Tensors, x: torch.Tensor, tp: int, rank: int) -> Tensors:
    """Return what one rank's linear layers make of `x`: columns of q, k, v, gate and up, and its part of o and down."""
    linear = linear_classes()
    args = {
        "bias": False,
        "params_dtype": torch.bfloat16,
        "quant_config": _plugin_config(config["quantization_config"]),
    }
    hidden, heads, kv_heads = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size, intermediate = config["head_dim"], config["intermediate_size"]
    qkv = linear.QKVParallelLinear(hidden, size, heads, kv_heads, prefix="m.qkv_proj", **args)
    q, k, v = (
        _load(qkv, tensors, **SHARDS["qkv"])
        .quant_method.apply(qkv, x)
        .split([heads // tp * size] + 2 * [max(kv_heads // tp, 1) * size], dim=-1)
    )
    gate_up = linear.MergedColumnParallelLinear(hidden, 2 * [intermediate], prefix="m.gate_up_proj", **args)
    gate, up = _load(gate_up, tensors, **SHARDS["gate_up"]).quant_method.apply(gate_up, x).chunk(2, dim=-1)
    found = {"q": q, "k": k, "v": v, "gate": gate, "up": up}
    for name, inputs in (("o_proj", heads * size), ("down_proj", intermediate)):
        row = _load(linear.RowParallelLinear(inputs, hidden, prefix=f"m.{name}", **args), tensors, **{name: None})
        wide = x.repeat(1, inputs // hidden).chunk(tp, dim=-1)[rank]
        found[name] = row.quant_method.apply(row, wide).float()
    return found


@ON_BOTH
@pytest.mark.parametrize("tp", [2, 4])
def test_the_dense_checkpoint_computes_the_same_in_parts(
    vllm: vllm_sources.Ranks, tp: int, checkpoints: dict[str, tuple[dict[str, Any], Tensors]]
) -> None:
    """Columns are those of one rank; at 4, two ranks hold each KV head. Rows sum up to those of one rank."""
    config, tensors = checkpoints["tp4"]
    x = torch.randn(5, config["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = _attention_and_mlp(config, tensors, x, 1, 0)
    vllm.size = tp
    parts = []
    for vllm.rank in range(tp):
        parts.append(_attention_and_mlp(config, tensors, x, tp, vllm.rank))
    copies = max(1, tp // config["num_key_value_heads"])
    for name in ("q", "k", "v", "gate", "up"):
        pieces = [part[name] for part in parts]
        if name in "kv":
            assert all(pieces[i].equal(pieces[i - i % copies]) for i in range(tp))
            pieces = pieces[::copies]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), whole[name], rtol=0.01, atol=0.01)
    for name in ("o_proj", "down_proj"):
        total = torch.stack([part[name] for part in parts]).sum(dim=0)
        assert (total - whole[name]).norm() < 0.05 * whole[name].norm(), name


@ON_BOTH
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_experts_are_taken_at_every_size(
    vllm: vllm_sources.Ranks, tp: int, checkpoints: dict[str, tuple[dict[str, Any], Tensors]]
) -> None:
    """Every rank's part of every expert is one that the grouped kernel takes, and is there after loading."""
    config, tensors = checkpoints["tp4-moe"]
    sizes = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    vllm.size = tp
    for vllm.rank in range(tp):
        layer = make_experts(
            _plugin_config(config["quantization_config"]), make_moe_config(*sizes, tp, vllm.rank), QWEN
        )
        experts = {k.removeprefix("experts."): v for k, v in tensors.items() if k.startswith("experts.")}
        assert len(list(layer.load_weights(iter(experts.items())))) == len(experts)
        layer.quant_method.process_weights_after_loading(layer)
        part = config["moe_intermediate_size"] // tp
        for expert in (0, config["num_experts"] - 1):
            gate, down = (tensors[f"experts.{expert}.{name}.weight_chan_scale"] for name in QWEN[:2])
            assert layer.w13_weight_chan_scale[expert, :part].equal(gate[part * vllm.rank :][:part])
            assert layer.w2_weight_chan_scale[expert].equal(down)


def test_the_checkpoint_says_what_the_tests_assume(
    checkpoints: dict[str, tuple[dict[str, Any], Tensors]],
) -> None:
    """Fewer KV heads than ranks at size 4; not every expert for every token."""
    for config, _ in checkpoints.values():
        assert config["num_key_value_heads"] == 2
    moe = checkpoints["tp4-moe"][0]
    assert moe["num_experts_per_tok"] < moe["num_experts"]
