"""What vLLM's loaders do to converted layers, by running them: the table `vllm_loaders.TOUCHED` is what comes out.

Each function is given one layer as a 16-bit `weight`, and as each output format stores it. Where the tensors that come
out stand for the weights that come out of the 16-bit one, the layer is loaded right.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_functions import Loader, cut_out, parameters
from vllm_sources import VERSIONS

from convert_w4a8.checkpoint.vllm_loaders import Effect
from convert_w4a8.checkpoint.vllm_models import VllmModel
from convert_w4a8.encoding.lut_layout import restore
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.encoding.tables import decode, expand_tables
from convert_w4a8.linear import Packing, W4A8Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference
from convert_w4a8.targets import target_named, target_names

Tensors = dict[str, torch.Tensor]
Run = Callable[[Tensors, str | None], Tensors]
N, K, HEADS = 512, 1024, 4
"""Such that a dimension of any tensor can be divided among the heads: what could be silent is."""


@dataclass(frozen=True)
class Case:
    """A loader, and a layer of its model.

    make: from vLLM's version to what runs the loader on the layer's tensors; the second argument is their format.
    """

    id: str
    config: dict[str, Any]
    module: str
    make: Callable[[str], Run]
    versions: tuple[str, ...] = VERSIONS
    size: tuple[int, int] = (N, K)


def _each(function: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Run:
    return lambda tensors, _: dict(function(name, tensor) for name, tensor in tensors.items())


def _stream(function: Callable[[Iterable[tuple[str, torch.Tensor]]], Iterable[tuple[str, torch.Tensor]]]) -> Run:
    return lambda tensors, _: dict(function(iter(tensors.items())))


def _loads(function: Callable[..., object], rename: tuple[str, str] = ("", ""), **config: Any) -> Run:
    """Run a `load_weights` that looks its parameters up."""

    def run(tensors: Tensors, target: str | None) -> Tensors:
        found = parameters({name.replace(*rename): tensor for name, tensor in tensors.items()}, target)
        model = SimpleNamespace(config=SimpleNamespace(**config), named_parameters=lambda **_: found)
        function(model, iter(tensors.items()))
        return next(iter(found.values())).loaded

    return run


_SURROUNDINGS = {"is_pp_missing_parameter": lambda *_: False, "default_weight_loader": None}


def _llama4(version: str) -> Run:
    permute = cut_out(version, "llama4.py", "Llama4ForCausalLM.permute_qk_weight_for_rotary")
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=HEADS)
    return _each(lambda name, tensor: permute(SimpleNamespace(config=config), name, tensor))


def _mistral(version: str) -> Run:
    remap = cut_out(version, "mistral.py", "MistralForCausalLM.maybe_remap_mistral")
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=N // HEADS, hidden_size=K)
    model = SimpleNamespace(config=config, mistral_mapping={})
    return _each(lambda name, tensor: remap(model, name, tensor))


def _glm5_next(version: str) -> Run:
    projections = {".o_proj.": ("o_proj", "o_proj", None, False)}
    load = cut_out(version, "models/glm5next/common/model.py", "_try_load_fp8_attn_proj", _FP8_ATTN_PROJS=projections)
    return lambda tensors, _: {
        name: tensor for name, tensor in tensors.items() if not load(name, tensor, {}, {}, set(), 0)
    }


def _whisper(version: str) -> Run:
    return _stream(
        lambda weights: cut_out(version, "whisper.py", "_create_fake_bias_for_k_proj")(weights, ".k_proj.weight")
    )


def _jina(version: str) -> Run:
    adapter = {
        f"base_model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in {"A": (1, K), "B": (N, 1)}.items()
    }
    surroundings = {
        "AutoWeightsLoader": Loader,
        "defaultdict": defaultdict,
        "logger": logging.getLogger(__name__),
        "_load_adapter": lambda *_: ({"lora_alpha": 1, "r": 1}, adapter),
        "_build_lora_pairs": None,
    }
    surroundings["_build_lora_pairs"] = cut_out(version, "jina.py", "_build_lora_pairs", **surroundings)
    model = SimpleNamespace(_model_name="", _task="", _revision="", hf_to_vllm_mapper=None)
    name = "_load_jina_v5_weights" if version == "0.33.0" else "JinaEmbeddingsV5Model.load_weights"
    load = cut_out(version, "jina.py", name, **surroundings)
    return lambda tensors, _: load(model, iter(tensors.items()))


def _gpt_oss(version: str) -> Run:
    parallel = SimpleNamespace(flatten_tp_across_dp_and_pcp=lambda **_: (1, 0))
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    surroundings = _SURROUNDINGS | {
        "FusedMoEParallelConfig": parallel,
        "get_tensor_model_parallel_world_size": lambda: 1,
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_dp_group": lambda: group,
        "get_pcp_group": lambda: group,
        "cdiv": lambda a, b: -(-a // b),
        "remap_moe_expert_weights": lambda weights, _: weights,
        "_get_weight_loader": lambda parameter: parameter.weight_loader,
    }
    load = cut_out(version, "gpt_oss.py", "GptOssModel._load_weights_other", **surroundings)

    def run(tensors: Tensors, target: str | None) -> Tensors:
        if target is None:
            return tensors  # vLLM reads one 3-D tensor instead, which the format does not have
        found = parameters({"layers.0.mlp.experts.routed_experts.w13_weight": torch.empty(0)}, None)
        model = SimpleNamespace(
            config=SimpleNamespace(intermediate_size=K, num_attention_heads=HEADS),
            named_parameters=lambda **_: found,
            parallel_config=SimpleNamespace(enable_expert_parallel=False),
            _try_load_streamed_expert=lambda *_: False,
        )
        heads = (HEADS, 0) if version == "0.25.1" else ()
        load(model, 1, 0, *heads, iter(tensors.items()), [(".qkv_proj", ".q_proj", "q")])
        return next(iter(found.values())).loaded

    return run


def _bloom(version: str) -> Run:
    if version == "0.25.1":
        load = cut_out(version, "bloom.py", "BloomModel.load_weights", **_SURROUNDINGS)
        return _loads(load, num_attention_heads=HEADS)
    repack = cut_out(version, "bloom.py", "BloomModel._repack_qkv")
    model = SimpleNamespace(config=SimpleNamespace(num_attention_heads=HEADS))
    return _stream(lambda weights: repack(model, weights))


def _falcon(version: str) -> Run:
    load = cut_out(version, "falcon.py", "FalconModel.load_weights", **_SURROUNDINGS)
    return _loads(load, num_attention_heads=HEADS, new_decoder_architecture=True, num_kv_heads=2, multi_query=False)


def _telechat(version: str) -> Run:
    if version == "0.25.1":
        load = cut_out(version, "telechat2.py", "TeleChat2Model.load_weights", **_SURROUNDINGS)
        return _loads(load, ("key_value", "qkv_proj"), n_head=HEADS, hidden_size=N // 2)
    split = cut_out(version, "telechat2.py", "TeleChat2Model._split_key_value")
    model = SimpleNamespace(config=SimpleNamespace(n_head=HEADS, hidden_size=N // 2))
    return _stream(lambda weights: split(model, weights))


def _plamo2(version: str) -> Run:
    load = cut_out(version, "plamo2.py", "Plamo2Model.load_weights", **_SURROUNDINGS)
    return _loads(load, mamba_num_heads=HEADS)


def _hunyuan(version: str) -> Run:
    split = cut_out(version, "hunyuan_v1.py", "HunYuanModel._split_qkv_weight")
    config = SimpleNamespace(num_attention_heads=2, num_key_value_heads=1, hidden_size=K, head_dim=N // 4)
    return _each(lambda name, tensor: (name, split(SimpleNamespace(config=config), tensor)))


def _step3(version: str) -> Run:
    load = cut_out(version, "step3_text.py", "Step3TextModel.load_weights", **_SURROUNDINGS)
    config = SimpleNamespace(share_q_dim=N, head_dim=0)  # q fills all of the merged layer

    def run(tensors: Tensors, target: str | None) -> Tensors:
        found = {}
        for name, parameter in parameters(tensors, target).items():
            found[name.replace("q_proj", "qkv_proj")] = tensor = torch.zeros_like(tensors[name])
            vars(tensor).update(vars(parameter))
        load(SimpleNamespace(config=config, named_parameters=lambda: found), iter(tensors.items()))
        return found

    return run


def _gte(version: str) -> Run:
    split = cut_out(version, "bert_with_rope.py", "GteNewModel.split_up_gate_proj")
    return _stream(lambda weights: split(None, weights))


def _gpt2(version: str) -> Run:
    if version == "0.25.1":
        return _loads(cut_out(version, "gpt2.py", "GPT2Model.load_weights", **_SURROUNDINGS))
    transpose = cut_out(version, "gpt2.py", "GPT2Model._transpose_conv1d")
    return _stream(lambda weights: transpose(None, weights))


CASES = (
    Case("llama4", {"model_type": "llama4_text"}, "model.layers.0.self_attn.q_proj", _llama4),
    Case("mistral", {"model_type": "mistral"}, "layers.0.attention.wq", _mistral),
    Case(
        "glm5-next",
        {"architectures": ["Glm5NextForCausalLM"]},
        "model.layers.0.self_attn.o_proj",
        _glm5_next,
        ("0.33.0",),
    ),
    Case("whisper", {"model_type": "whisper"}, "model.encoder.layers.0.self_attn.k_proj", _whisper),
    Case("jina", {"architectures": ["JinaEmbeddingsV5Model"]}, "layers.0.self_attn.q_proj", _jina),
    Case("bloom", {"model_type": "bloom"}, "h.0.self_attention.query_key_value", _bloom, size=(384, 1536)),
    Case("gpt-oss", {"model_type": "gpt_oss"}, "layers.0.mlp.experts.0.gate_proj", _gpt_oss),
    Case("falcon", {"model_type": "falcon"}, "h.0.self_attention.query_key_value", _falcon),
    Case("telechat", {"model_type": "telechat2"}, "layers.0.self_attn.key_value", _telechat),
    Case("plamo2", {"model_type": "plamo2"}, "layers.0.mixer.in_proj", _plamo2, ("0.25.1",)),
    Case("hunyuan", {"model_type": "hunyuan_v1_dense"}, "layers.0.self_attn.qkv_proj", _hunyuan, ("0.25.1",)),
    Case("step3", {"model_type": "step3_text"}, "layers.0.self_attn.q_proj", _step3),
    Case("gte", {"architectures": ["GteNewModel"]}, "encoder.layer.0.mlp.up_gate_proj", _gte),
)
BY_ID = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def the_layer(n: int, k: int, *, tables: bool) -> W4A8Linear:
    """Return a random layer, its tables as scales or as entries."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    source = torch.rand(k // 128, n, generator=generator).add(0.1).bfloat16()
    group, channel = quantize_reference(source)
    entries = expand_tables(group) if tables else None
    return W4A8Linear(
        pack_codes(codes), Packing.PACK_QUANTIZED, None if tables else group, entries, channel, source_scale=source
    )


def stored(module: str, layer: W4A8Linear, target: str) -> Tensors:
    """Return a layer's tensors in an output format."""
    return {name: torch.cat(list(parts)) for name, parts in target_named(target).encode(module, layer).items()}


def read(module: str, tensors: Tensors, target: str) -> torch.Tensor:
    """Return the weights that tensors stand for, float32 [N, K]; KeyError where one is missing."""
    packed = tensors[f"{module}.weight_packed"]
    if target == "compressed-tensors":
        group, channel = quantize_reference(tensors[f"{module}.weight_scale"].t().contiguous())
        return decode(W4A8Linear(packed.contiguous(), Packing.PACK_QUANTIZED, group, None, channel))
    table = tensors.get(f"{module}.weight_lut")
    entries = None if table is None else table.reshape(len(table), -1, 8)
    scale = None if table is not None else tensors[f"{module}.weight_scale"]
    codes = restore(packed.contiguous())
    return decode(W4A8Linear(codes, Packing.PACK_QUANTIZED, scale, entries, tensors[f"{module}.weight_chan_scale"]))


def effect(run: Run, case: Case, target: str, *, tables: bool) -> Effect | None:
    """Return what becomes of a layer in a format; None where it is loaded right."""
    module, layer = case.module, the_layer(*case.size, tables=tables)
    expected = run({f"{module}.weight": decode(layer)}, None)
    try:
        found = run(stored(module, layer, target), target)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return Effect.DIES
    mode = ScalesMode.DIRECT if tables else ScalesMode.SEARCH
    for name, weight in expected.items():
        part, _, role = name.rpartition(".")
        if role != "weight":
            if name not in found:
                return Effect.SILENT
            continue
        specs = target_named(target).tensor_specs(part, weight.shape[0], weight.shape[1], mode)
        if any(spec.name in found and found[spec.name].shape != spec.shape for spec in specs):
            return Effect.DIES  # as a parameter says of a tensor of another shape
        if target == "lut" and f"{part}.weight_chan_scale" not in found:
            return Effect.DIES  # as our plugin says
        if any(spec.name not in found for spec in specs) or not torch.equal(read(part, found, target), weight):
            return Effect.SILENT
    return None


def worst(effects: Iterable[Effect | None]) -> Effect | None:
    """Return the most dangerous of what may become of a layer."""
    found = set(effects)
    return next((one for one in (Effect.SILENT, Effect.DIES) if one in found), None)


@pytest.mark.parametrize("target", target_names())
@BY_ID
def test_what_the_table_says_is_what_vllm_does(case: Case, target: str) -> None:
    """The worst of both versions and, in `lut`, of both forms of the tables."""
    forms = (False, True) if target == "lut" else (False,)
    runs = [case.make(version) for version in case.versions]
    row = VllmModel.of(case.config).loader_row(case.module, target)
    found = worst(effect(run, case, target, tables=tables) for run in runs for tables in forms)
    assert found == (None if row is None else row.effects[target])


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("version", VERSIONS)
def test_gpt2_is_right_where_it_is_quantized_and_wrong_where_it_is_not(version: str, target: str) -> None:
    """Its 16-bit weights are stored as [K, N], which vLLM transposes; quantized ones are not touched."""
    config, module = {"model_type": "gpt2"}, "h.0.mlp.c_fc"
    run, layer = _gpt2(version), the_layer(N, K, tables=False)
    assert VllmModel.of(config).loader_row(module, target) is None
    assert torch.equal(read(module, run(stored(module, layer, target), target), target), decode(layer))
    assert VllmModel.of(config).kept_wrongly(module)
    assert run({f"{module}.weight": decode(layer)}, None)[f"{module}.weight"].shape == (K, N)
