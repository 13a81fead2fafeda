"""What vLLM's own code makes of the outputs with FP8 layers beside W4A8 ones: which layer gets which method."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_sources
from factories.models import Model, llama, mixtral, qwen3_moe
from mixtures import config_group
from vllm_layers import MIXTRAL, ON_BOTH, QWEN, make_moe_config

from convert_w4a8.checkpoint.mixture import ConfigGroup, Mixture
from convert_w4a8.options import ScalesMode
from convert_w4a8.targets import compressed_tensors, lut

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
W4A8, FP8, PLAIN = "W4A8", "FP8", "16 bits"


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Iterator[vllm_sources.Ranks]:
    """Import the loading code of one version of vLLM, with stand-ins for the rest."""
    with vllm_sources.loading(request.param) as ranks:
        yield ranks


def scheme(preset: str = "FP8_BLOCK") -> dict[str, Any]:
    return {key: value for key, value in config_group(preset, []).items() if key != "targets"}


def mixture_of(model: Model, carried: str, prefix: str = "") -> Mixture:
    """Make the layers whose names contain `carried` FP8, all others W4A8."""
    modules = [prefix + module for module in model.linears]
    fp8 = tuple(module for module in modules if carried in module)
    return Mixture(tuple(module for module in modules if module not in fp8), (ConfigGroup(scheme(), fp8),))


class Served:
    """Asks vLLM for the method of a layer by its name there, for one format's block."""

    def __init__(self, form: str, mixture: Mixture, ignore: tuple[str, ...] = ("lm_head",)) -> None:
        target = lut if form == "lut" else compressed_tensors
        block = target.quantization_config({}, ignore, ScalesMode.SEARCH, {}, mixture)
        if form == "lut":
            module, name = "convert_w4a8.vllm_plugin.config", "W4A8LutConfig"
        else:
            package = "vllm.model_executor.layers.quantization.compressed_tensors"
            module, name = f"{package}.compressed_tensors", "CompressedTensorsConfig"
        self.config = getattr(importlib.import_module(module), name).from_config(block)
        self.config.packed_modules_mapping = FUSED

    def linear(self, name: str) -> str:
        """Return the kind of a linear layer, of the class that its name is usually of."""
        linear = importlib.import_module("vllm.model_executor.layers.linear")
        cls = {"qkv_proj": linear.QKVParallelLinear, "gate_up_proj": linear.MergedColumnParallelLinear}
        kind = cls.get(name.rpartition(".")[2], linear.RowParallelLinear)
        return self._kind(kind.__new__(kind), name)

    def lm_head(self, name: str) -> str:
        """Return the kind of an output projection."""
        package = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
        return self._kind(package.ParallelLMHead(), name)

    def experts(self, name: str, projections: tuple[str, str, str]) -> str:
        """Return the kind of the experts of a layer, which the model calls by these names (gate, down, up)."""
        routed = importlib.import_module("vllm.model_executor.layers.fused_moe.routed_experts")
        layer = routed.RoutedExperts.__new__(routed.RoutedExperts)
        torch.nn.Module.__init__(layer)
        layer.moe_config = make_moe_config(4, 256, 256, 1, 0)
        layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name = projections
        return self._kind(layer, name)

    def _kind(self, layer: Any, name: str) -> str:
        if not hasattr(layer, "_modules"):
            torch.nn.Module.__init__(layer)
        method = self.config.get_quant_method(layer, name)
        said = f"{type(method).__name__} {getattr(method, '__name__', '')} {type(getattr(layer, 'scheme', 0)).__name__}"
        if method is None or "Unquantized" in said:
            return PLAIN
        if "W8A8Fp8" in said:
            return FP8
        assert "W4A8Fp8" in said or "W4A8Lut" in said, said
        return W4A8


BOTH_FORMATS = pytest.mark.parametrize("form", ["lut", "compressed-tensors"])


@ON_BOTH
@BOTH_FORMATS
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_merged_layers(vllm: vllm_sources.Ranks, form: str, prefix: str) -> None:  # noqa: ARG001
    """FP8 attention beside a W4A8 MLP, and the other way round; the parts of a merged layer lead to its kind."""
    for carried, attention, mlp in (("self_attn", FP8, W4A8), ("mlp", W4A8, FP8)):
        served = Served(form, mixture_of(llama(), carried, prefix), (f"{prefix}visual.proj", "lm_head"))
        for layer in range(2):
            name = f"{prefix}model.layers.{layer}"
            assert served.linear(f"{name}.self_attn.qkv_proj") == attention
            assert served.linear(f"{name}.self_attn.o_proj") == attention
            assert served.linear(f"{name}.mlp.gate_up_proj") == mlp
            assert served.linear(f"{name}.mlp.down_proj") == mlp
        assert served.linear(f"{prefix}visual.proj") == PLAIN
        assert served.lm_head("lm_head") == PLAIN


@ON_BOTH
@BOTH_FORMATS
@pytest.mark.parametrize(
    ("model", "projections"),
    [(qwen3_moe(), QWEN), (mixtral(block_sparse_names=True), MIXTRAL)],
    ids=["qwen", "mixtral"],
)
def test_experts(vllm: vllm_sources.Ranks, form: str, model: Model, projections: tuple[str, str, str]) -> None:  # noqa: ARG001
    """Attention in FP8 beside experts in W4A8; experts of one block in FP8, whatever the projections are called."""
    moe = "mlp" if projections == QWEN else "block_sparse_moe"
    served = Served(form, mixture_of(model, "self_attn"))
    for layer in range(2):
        assert served.experts(f"model.layers.{layer}.{moe}.experts", projections) == W4A8
        assert served.linear(f"model.layers.{layer}.self_attn.qkv_proj") == FP8
    served = Served(form, mixture_of(model, f"layers.1.{moe}.experts"))
    assert served.experts(f"model.layers.0.{moe}.experts", projections) == W4A8
    assert served.experts(f"model.layers.1.{moe}.experts", projections) == FP8
    assert served.linear("model.layers.1.self_attn.qkv_proj") == W4A8


@ON_BOTH
@BOTH_FORMATS
def test_a_model_that_calls_its_layers_otherwise(vllm: vllm_sources.Ranks, form: str) -> None:  # noqa: ARG001
    """Names go through the model's mapper; experts are found from their block on, lm_head wherever it is."""
    model = qwen3_moe()
    fp8 = (*(name for name in model.linears if "self_attn" in name), "lm_head")
    fp8 = tuple(name.replace("model.", "model.language_model.", 1) for name in fp8)
    int4 = [name.replace("model.", "model.language_model.", 1) for name in model.linears if "self_attn" not in name]
    served = Served(form, Mixture(tuple(int4), (ConfigGroup(scheme("FP8_DYNAMIC"), fp8),)), ())

    def rename(name: str) -> str:
        return name.replace("model.language_model.", "language_model.model.", 1)

    mapper = SimpleNamespace(_map_name=rename, apply_list=lambda names: list(map(rename, names)))
    served.config.apply_vllm_mapper(mapper)
    assert served.linear("language_model.model.layers.0.self_attn.qkv_proj") == FP8
    assert served.experts("language_model.model.layers.1.mlp.experts", QWEN) == W4A8
    assert served.lm_head("language_model.lm_head") == FP8


@ON_BOTH
def test_two_stacks_of_blocks_with_the_same_numbers(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """Experts of an MTP module in FP8, those of the model in W4A8: told apart by their full names."""
    parts = ("gate_proj", "up_proj", "down_proj")
    main, mtp = ([f"{root}.layers.0.mlp.experts.{e}.{p}" for e in range(2) for p in parts] for root in ("model", "mtp"))
    mixture = Mixture(tuple(main), (ConfigGroup(scheme(), tuple(mtp)),))
    for form in ("lut", "compressed-tensors"):
        served = Served(form, mixture)
        assert served.experts("model.layers.0.mlp.experts", QWEN) == W4A8
        assert served.experts("mtp.layers.0.mlp.experts", QWEN) == FP8


@ON_BOTH
@pytest.mark.parametrize(("preset", "static", "block"), [("FP8", True, None), ("FP8_BLOCK", False, [128, 128])])
def test_the_scheme_is_that_of_the_source(vllm: vllm_sources.Ranks, preset: str, static: bool, block: Any) -> None:  # noqa: ARG001
    """Strategy, blocks and activations; vLLM is told of blocked weights, for which it sets up its compilation."""
    model = llama()
    fp8 = tuple(name for name in model.linears if "self_attn" in name)
    int4 = tuple(name for name in model.linears if name not in fp8)
    for form in ("lut", "compressed-tensors"):
        served = Served(form, Mixture(int4, (ConfigGroup(scheme(preset), fp8),)))
        linear = importlib.import_module("vllm.model_executor.layers.linear")
        layer = linear.RowParallelLinear.__new__(linear.RowParallelLinear)
        torch.nn.Module.__init__(layer)
        served.config.get_quant_method(layer, "model.layers.0.self_attn.o_proj")
        assert layer.scheme.is_static_input_scheme is static
        assert layer.scheme.weight_quant.block_structure == block
        assert served.config.has_blocked_weights() is (block is not None)


@ON_BOTH
def test_a_class_as_a_target_would_be_wrong(vllm: vllm_sources.Ranks) -> None:  # noqa: ARG001
    """Why there is none: in one of the versions it comes before the parts of a merged layer."""
    block = compressed_tensors.quantization_config({}, [], ScalesMode.SEARCH, {}, mixture_of(llama(), "self_attn"))
    block["config_groups"]["group_0"]["targets"] = ["Linear"]
    served = Served("compressed-tensors", mixture_of(llama(), "self_attn"))
    served.config = type(served.config).from_config(block)
    served.config.packed_modules_mapping = FUSED
    version = importlib.import_module("vllm").__version__
    assert served.linear("model.layers.0.self_attn.qkv_proj") == (W4A8 if version == "0.25.1" else FP8)
