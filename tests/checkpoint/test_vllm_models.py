"""What is known of vLLM's model code, by model and module."""

import re
import runpy
from typing import Any

import pytest
from paths import ROOT

from convert_w4a8.checkpoint.names import merged_name
from convert_w4a8.checkpoint.vllm_layers import MERGED, UNQUANTIZED
from convert_w4a8.checkpoint.vllm_loaders import KEPT, TOUCHED
from convert_w4a8.checkpoint.vllm_models import VllmModel
from convert_w4a8.targets import target_names

LLAMA4: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {"model_type": "llama4_text"},
    "vision_config": {"model_type": "llama4_vision_model"},
}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LAYER = "model.layers.0"


def _names(config: dict[str, Any]) -> frozenset[str]:
    return VllmModel.of(config).names


def test_names_of_a_configuration_and_of_those_in_it() -> None:
    """Damaged values, and what lies deeper than any model has it, are no names."""
    assert _names(LLAMA4) == {
        "Llama4ForConditionalGeneration",
        "llama4",
        "llama4_text",
        "llama4_vision_model",
    }
    assert _names({}) == set()
    assert _names({"architectures": "Llama", "model_type": 4, "text_config": ["x"]}) == set()
    assert _names({"architectures": [1, "A"], "thinker_config": {"text_config": {"model_type": "b"}}}) == {
        "A",
        "b",
    }
    deep: dict[str, Any] = {"model_type": "deep"}
    for _ in range(2000):
        deep = {"inner": deep}
    assert _names(deep) == set()


@pytest.mark.parametrize(
    ("config", "module", "formats"),
    [
        (LLAMA4, f"language_model.{LAYER}.self_attn.q_proj", {"lut"}),
        (LLAMA4, f"language_model.{LAYER}.self_attn.k_proj", {"lut"}),
        (LLAMA4, f"language_model.{LAYER}.self_attn.v_proj", set()),
        (LLAMA4, "vision_model.model.layers.0.self_attn.q_proj", set()),
        (LLAMA, f"{LAYER}.self_attn.q_proj", set()),
        ({"model_type": "mistral"}, f"{LAYER}.self_attn.q_proj", set()),
        ({"model_type": "mistral"}, "layers.0.attention.wq", {"lut", "compressed-tensors"}),
        ({"architectures": ["Glm5NextForCausalLM"]}, f"{LAYER}.self_attn.q_b_proj", {"lut", "compressed-tensors"}),
        ({"architectures": ["Glm5NextForCausalLM"]}, f"{LAYER}.mlp.down_proj", set()),
        ({"model_type": "gpt_oss"}, f"{LAYER}.mlp.experts.3.up_proj", {"lut", "compressed-tensors"}),
        ({"model_type": "gpt_oss"}, f"{LAYER}.self_attn.q_proj", set()),
        (LLAMA, f"{LAYER}.mlp.experts.3.gate_up_proj", {"lut", "compressed-tensors"}),
        ({"model_type": "bloom"}, "h.0.self_attention.query_key_value", {"lut", "compressed-tensors"}),
        ({"model_type": "bloom"}, "h.0.self_attention.dense", set()),
        ({"model_type": "step3_text"}, f"{LAYER}.self_attn.q_proj", {"compressed-tensors"}),
        ({}, "lm_head", set()),
    ],
)
def test_layers_that_model_code_touches(config: dict[str, Any], module: str, formats: set[str]) -> None:
    """By model, module and output format."""
    assert {name for name in target_names() if VllmModel.of(config).loader_row(module, name)} == formats


@pytest.mark.parametrize(("groups", "row"), [(1, True), (8, False)])
@pytest.mark.parametrize("inner", [False, True])
def test_only_at_tensor_parallel_sizes(groups: int, row: bool, inner: bool) -> None:
    """A Mamba 2 layer with one group cannot be split: that is said apart, since on one GPU it is right."""
    config: dict[str, Any] = {"model_type": "falcon_h1", "mamba_n_groups": groups}
    if inner:
        config = {"architectures": ["Wrapper"], "text_config": config}
    module = f"{LAYER}.mamba.in_proj"
    assert VllmModel.of(config).loader_row(module, "lut") is None
    assert (VllmModel.of(config).loader_row(module, "lut", split=True) is not None) == row


def test_layers_that_must_stay_quantized() -> None:
    """GPT-2's 16-bit weights have another shape than ours."""
    assert VllmModel.of({"model_type": "gpt2"}).kept_wrongly("transformer.h.0.attn.c_proj")
    assert VllmModel.of({"model_type": "gpt2"}).kept_wrongly("transformer.wte") is None
    assert VllmModel.of(LLAMA).kept_wrongly("transformer.h.0.attn.c_proj") is None
    assert VllmModel.of({"model_type": "minicpm3"}).kept_wrongly(f"{LAYER}.self_attn.q_a_proj")
    assert VllmModel.of({"model_type": "minicpm3"}).kept_wrongly(f"{LAYER}.self_attn.q_b_proj") is None


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        (LLAMA, f"{LAYER}.mlp.shared_expert_gate", True),
        (LLAMA, f"{LAYER}.eh_proj", True),
        (LLAMA, f"{LAYER}.self_attn.q_proj", False),
        (LLAMA, "vision_model.layers.0.fc1", False),
        (LLAMA4, "vision_model.model.layers.0.mlp.fc1", True),
        (LLAMA4, "multi_modal_projector.linear_1", True),
        (LLAMA4, f"language_model.{LAYER}.self_attn.o_proj", False),
        ({"architectures": ["JambaForCausalLM"]}, f"{LAYER}.mamba.x_proj", True),
        ({"architectures": ["JambaForCausalLM"]}, f"{LAYER}.self_attn.q_proj", False),
        ({"architectures": ["Lfm2ForCausalLM"]}, f"{LAYER}.conv.in_proj", True),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, f"{LAYER}.self_attn.indexer.wk", True),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, f"{LAYER}.self_attn.indexer.wq_b", False),
        ({"architectures": ["Qwen3OmniMoeForConditionalGeneration"]}, "thinker.audio_tower.layers.0.fc1", True),
    ],
)
def test_layers_that_are_never_quantized(config: dict[str, Any], module: str, expected: bool) -> None:
    """By model and module."""
    assert VllmModel.of(config).always_in_16_bits(module) == expected


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        (LLAMA, f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.self_attn.fused_qkv_a_proj"),
        (LLAMA, f"{LAYER}.linear_attn.in_proj_z", f"{LAYER}.linear_attn.in_proj_qkvz"),
        (LLAMA, f"{LAYER}.self_attn.q_proj", None),
        (LLAMA, "q_a_proj", "fused_qkv_a_proj"),
        ({"model_type": "telechat2"}, "h.0.self_attention.key_value", "h.0.self_attention.qkv_proj"),
        ({"model_type": "olmo_hybrid"}, f"{LAYER}.linear_attn.g_proj", f"{LAYER}.linear_attn.in_proj_qkvg"),
        ({"model_type": "olmo_hybrid"}, f"{LAYER}.self_attn.g_proj", None),
        (
            {"architectures": ["KimiK3ForConditionalGeneration"]},
            f"{LAYER}.self_attn.q_a_proj",
            f"{LAYER}.self_attn.fused_qkv_a_g_proj",
        ),
    ],
)
def test_layers_that_are_merged(config: dict[str, Any], module: str, expected: str | None) -> None:
    """The longest end of a name counts; what `names` merges in every model is not repeated."""
    assert VllmModel.of(config).merged_in(module) == expected


def test_rows_are_in_order() -> None:
    """Patterns compile, formats exist, reasons are one line, and common rows say what names say."""
    for row in TOUCHED:
        re.compile(row.modules)
        assert set(row.effects) <= set(target_names())
        assert row.effects
    for reason in [row.reason for row in (*TOUCHED, *KEPT)]:
        assert "\n" not in reason
        assert not reason.endswith(".")
    for pattern in [row.modules for row in (*KEPT, *UNQUANTIZED)]:
        re.compile(pattern)
    for end, name in VllmModel.of({}).merged_with.items():
        assert "." in end or merged_name(end) in (end, name)
    assert all(row.shards for row in MERGED)


def test_the_document_is_current() -> None:
    """Its tables are those of the modules; otherwise run scripts/vllm_models.py."""
    text = (ROOT / "docs" / "reference" / "vllm-models.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "scripts" / "vllm_models.py"))["current"](text) == text
