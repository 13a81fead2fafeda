"""What tensor names tell."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.checkpoint.names import (
    find_mixtures,
    find_stacked_mixtures,
    fusion_key,
    is_expert,
    is_lm_head,
    is_router,
    merged_name,
    natural_key,
    output_name,
)
from convert_w4a8.checkpoint.safetensors_file import TensorSpec

MIXTRAL = {"model_type": "mixtral"}
LAYER = "model.layers.3"


@pytest.mark.parametrize(
    ("module", "expert", "merged", "fused"),
    [
        (f"{LAYER}.self_attn.q_proj", False, f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.self_attn.qkv_proj"),
        (f"{LAYER}.self_attn.k_proj", False, f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.self_attn.qkv_proj"),
        (f"{LAYER}.self_attn.v_proj", False, f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.self_attn.qkv_proj"),
        (f"{LAYER}.self_attn.o_proj", False, f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.o_proj"),
        (f"{LAYER}.mlp.gate_proj", False, f"{LAYER}.mlp.gate_up_proj", f"{LAYER}.mlp.gate_up_proj"),
        (f"{LAYER}.mlp.up_proj", False, f"{LAYER}.mlp.gate_up_proj", f"{LAYER}.mlp.gate_up_proj"),
        (f"{LAYER}.mlp.down_proj", False, f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.down_proj"),
        (f"{LAYER}.mlp.experts.12.up_proj", True, f"{LAYER}.mlp.experts.12.gate_up_proj", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.mlp.experts.0.down_proj", True, f"{LAYER}.mlp.experts.0.down_proj", f"{LAYER}.mlp.experts"),
        (
            f"{LAYER}.block_sparse_moe.experts.1.w1",
            True,
            f"{LAYER}.block_sparse_moe.experts.1.w13",
            f"{LAYER}.block_sparse_moe.experts",
        ),
        (
            f"{LAYER}.block_sparse_moe.experts.1.w2",
            True,
            f"{LAYER}.block_sparse_moe.experts.1.w2",
            f"{LAYER}.block_sparse_moe.experts",
        ),
        # Not routed experts: dense layers beside them.
        (
            f"{LAYER}.mlp.shared_expert.up_proj",
            False,
            f"{LAYER}.mlp.shared_expert.gate_up_proj",
            f"{LAYER}.mlp.shared_expert.gate_up_proj",
        ),
        (f"{LAYER}.mlp.gate", False, f"{LAYER}.mlp.gate", f"{LAYER}.mlp.gate"),
        (f"{LAYER}.mlp.experts.x.up_proj", False, f"{LAYER}.mlp.experts.x.gate_up_proj", None),
        ("lm_head", False, "lm_head", "lm_head"),
        ("q_proj", False, "qkv_proj", "qkv_proj"),
    ],
)
def test_what_vllm_merges(module: str, expert: bool, merged: str, fused: str | None) -> None:
    """q/k/v and gate/up are merged; all experts of a layer are one; what only looks alike is left alone."""
    assert is_expert(module) == expert
    assert merged_name(module) == merged
    assert fusion_key(module) == (merged if fused is None else fused)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("lm_head", True),
        ("model.lm_head", True),
        ("language_model.lm_head", True),
        ("my_lm_head", False),
        ("", False),
        ("embed_out", True),
        ("output", True),
        ("model.layers.0.output", False),
        ("transformer.output_layer", True),
        ("model.layers.61.shared_head.head", True),
        ("head", False),
    ],
)
def test_lm_head(module: str, expected: bool) -> None:
    """The output projection, wherever a multi-modal model puts it."""
    assert is_lm_head(module) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (f"{LAYER}.mlp.gate", True),
        (f"{LAYER}.mlp.gate.wg", True),
        (f"{LAYER}.mlp.gate_proj", False),
        (f"{LAYER}.self_attn.gate", False),
        (f"{LAYER}.mlp.shared_expert_gate", True),
        (f"{LAYER}.feed_forward.router", True),
        (f"{LAYER}.block_sparse_moe.router.layer", True),
        (f"{LAYER}.router.proj", True),
        (f"{LAYER}.altup.modality_router", False),
        (f"{LAYER}.per_layer_input_gate", False),
        ("router", True),
        ("gate", False),
    ],
)
def test_routers(module: str, expected: bool) -> None:
    """What chooses experts, by its name and by whether there are experts beside it."""
    assert is_router(module, {f"{LAYER}.mlp"}) == expected


@pytest.mark.parametrize(
    ("name", "shape", "mixture", "is_stacked"),
    [
        ("mlp.experts.gate_up_proj", (4, 256, 512), "mlp", True),
        ("mlp.experts.mlp.w1", (1024, 256), "mlp", True),
        ("block_sparse_moe.input_linear.weight", (4, 512, 256), "block_sparse_moe", True),
        ("moe.w1", (4, 512, 256), "moe", True),
        ("mlp.experts.0.up_proj.weight", (256, 256), "mlp", False),
        ("mlp.experts.gate_bias", (4,), "mlp", False),
        ("mamba.conv1d.weight", (4, 1, 4), None, False),
        ("visual.patch_embed.weight", (128, 3, 16), None, False),
        ("mlp.up_proj.weight", (512, 256), None, False),
    ],
)
def test_experts_in_one_tensor(name: str, shape: tuple[int, ...], mixture: str | None, is_stacked: bool) -> None:
    """By `.experts` in the name, or by a first dimension that is the model's number of experts."""
    config = {"text_config": {"num_local_experts": 4, "num_experts_per_tok": 3}, "num_experts": True}
    tensors = [TensorSpec(f"{LAYER}.{name}", "BF16", shape)]
    expected = set() if mixture is None else {f"{LAYER}.{mixture}"}
    assert find_mixtures(tensors, config) == expected
    assert find_stacked_mixtures(tensors, config).keys() == (expected if is_stacked else set())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.gate", "block_sparse_moe.gate"),
        ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
        ("mlp.experts.11.gate_proj.weight_packed", "block_sparse_moe.experts.11.w1.weight_packed"),
        ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2"),
        ("mlp.experts.0.up_proj.bias", "block_sparse_moe.experts.0.w3.bias"),
        ("block_sparse_moe.experts.0.w1.weight", "block_sparse_moe.experts.0.w1.weight"),
        ("block_sparse_moe.gate.weight", "block_sparse_moe.gate.weight"),
        ("mlp.gate_proj.weight", "mlp.gate_proj.weight"),
        ("mlp.experts.0.gate_projection", "mlp.experts.0.gate_projection"),
        ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
    ],
)
def test_mixtral_names(name: str, expected: str) -> None:
    """VLLM's Mixtral knows Mistral's own names only; other models keep theirs."""
    assert output_name(f"{LAYER}.{name}", MIXTRAL) == f"{LAYER}.{expected}"
    assert output_name(f"{LAYER}.{name}", {"model_type": "qwen3_moe"}) == f"{LAYER}.{name}"
    assert output_name(f"{LAYER}.{name}", {}) == f"{LAYER}.{name}"


@given(st.lists(st.sampled_from(["mlp", "gate", "experts", "0", "gate_proj", "w1", "up_proj", "x"]), max_size=8))
def test_renaming_twice_is_renaming_once(parts: list[str]) -> None:
    """Names that were renamed are names that stay."""
    once = output_name(".".join(parts), MIXTRAL)
    assert output_name(once, MIXTRAL) == once


def parts_of(name: str) -> list[tuple[int, str]]:
    """Return what natural order compares: text as text, numbers by their digits without leading zeros."""
    parts = ((part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return [(len(number), number) if index % 2 else (-1, part) for index, (part, number) in enumerate(parts)]


NAMES = st.text(alphabet="ab.-_ 0129\x01\x7f²٣é😀", max_size=12)


@given(NAMES, NAMES)
def test_natural_keys_compare_as_text_and_numbers_in_turn(one: str, other: str) -> None:
    """Of any two names; the bytes of an output depend on their order."""
    assert (natural_key(one) < natural_key(other)) == (parts_of(one) < parts_of(other))
    assert (natural_key(one) == natural_key(other)) == (parts_of(one) == parts_of(other))
