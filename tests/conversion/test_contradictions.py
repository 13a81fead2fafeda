"""Settings that contradict the tensors: a plan warns of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import REMOVE, edit_json, edit_quantization, edit_tensors, write_case
from factories import CASES, Case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.options import Options, Policy, Unsupported

WILLING = Options(
    asymmetric=Policy.REQUANTIZE,
    act_order=Policy.REQUANTIZE,
    group_size=Policy.REQUANTIZE,
    unsupported=Unsupported.DEQUANTIZE,
)


def warnings(path: Path) -> tuple[str, ...]:
    """Return the warnings of a plan."""
    return make_plan(open_checkpoint(path), WILLING).warnings


@pytest.mark.parametrize("case", [case for case in CASES if not case.refused], ids=lambda case: str(case.id))
def test_sound_checkpoints_have_none(case: Case, tmp_path: Path) -> None:
    """Whatever the tools write agrees with itself."""
    case.write(tmp_path / "in")
    assert not warnings(tmp_path / "in")


SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "hidden": ("gptq-v1", {"hidden_size": 512}, "hidden_size = 512 in config.json, but "),
    "heads": ("gptq-v1", {"num_attention_heads": 8}, "num_attention_heads × head_dim = 512 in config.json, but "),
    "kv-heads": ("gptq-v1", {"num_key_value_heads": 4}, "num_key_value_heads × head_dim = 256 in config.json, but "),
    "mlp": ("awq-zero-points", {"intermediate_size": 1024}, "intermediate_size = 1024 in config.json, but "),
    "vocabulary": (
        "ct-w4a16",
        {"vocab_size": 65},
        "vocab_size = 65 in config.json, but model.embed_tokens is [64, 256]",
    ),
    "blocks": ("gptq-v1", {"num_hidden_layers": 4}, "there are no tensors of block 2 (2 blocks missing)"),
    "block": ("gptq-v1", {"num_hidden_layers": 3}, "num_hidden_layers = 3 in config.json, but there are no tensors of"),
    "experts": (
        "gptq-qwen3-moe-sharded",
        {"num_experts": 5},
        "num_experts = 5 in config.json, but there are no tensors",
    ),
}


@pytest.mark.parametrize(("name", "values", "said"), SETTINGS.values(), ids=SETTINGS)
def test_widths_and_blocks_of_another_config(name: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A config.json of another model of the family is noticed by what it says of the shapes."""
    write_case(name, tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", **values)
    assert any(said in warning for warning in warnings(tmp_path / "in"))


@pytest.mark.parametrize(
    ("name", "file", "values", "said"),
    [
        (
            "gptq-v1",
            "quantize_config.json",
            {"group_size": 64},
            "group_size 64, and config.json: quantization_config 128",
        ),
        ("gptq-v1", "quantize_config.json", {"checkpoint_format": "gptq_v2"}, "checkpoint_format gptq_v2, and config"),
        ("gptq-v2", "quantize_config.json", {"checkpoint_format": "gptq"}, "checkpoint_format gptq, and config"),
        ("gptq-v2", "quantize_config.json", {"bits": 4}, ""),
        ("awq-zero-points", "quant_config.json", {"w_bit": 4, "zero_point": False}, "zero_point False, and config"),
        ("awq-zero-points", "quant_config.json", {"w_bit": 4, "version": "gemm"}, ""),
        ("gptq-v1", "quantize_config.json", {"damp_percent": 0.5, "bits": 4}, ""),
    ],
)
def test_a_file_beside_config_json_that_says_otherwise(
    name: str, file: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """What it says of how tensors are read; config.json counts, as for vLLM."""
    write_case(name, tmp_path / "in")
    (tmp_path / "in" / file).write_text(json.dumps(values))
    found = [warning for warning in warnings(tmp_path / "in") if warning.startswith(f"{file} says")]
    assert len(found) == bool(said)
    assert all(said in warning and warning.endswith(", which counts") for warning in found)


@pytest.mark.parametrize("value", [10**30, -1, 0, "256", [256], {}, None, True, 0.5, float("inf"), REMOVE])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "model_type"])
def test_what_is_no_size_is_passed_over(key: str, value: object, tmp_path: Path) -> None:
    """Settings that say nothing contradict nothing, and are no reason to fail."""
    write_case("gptq-v1", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", **{key: value})
    assert not [warning for warning in warnings(tmp_path / "in") if f"{key} = {value}" in warning]


def test_other_architectures_are_not_judged(tmp_path: Path) -> None:
    """Only of models that vLLM builds from these settings alone is it known what the shapes are."""
    write_case("gptq-v1", tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", model_type="other", hidden_size=512)
    assert not warnings(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "marked", "zero", "meant"),
    [("gptq-v1", "gptq_v2", 7, "gptq that is marked gptq_v2"), ("gptq-v2", "gptq", 9, "gptq_v2 that is marked gptq")],
)
def test_marked_as_the_other_version(name: str, marked: str, zero: int, meant: str, tmp_path: Path) -> None:
    """Nothing in a file tells v1 from v2, but a symmetric one has 8 everywhere."""
    write_case(name, tmp_path / "in")
    edit_quantization(tmp_path / "in", checkpoint_format=marked)
    (warning,) = warnings(tmp_path / "in")
    assert f"every zero-point is {zero}, not 8, as in a file of checkpoint_format {meant}" in warning


LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq-sym": ("gptq-v1-asymmetric", {"sym": True}, "zero-points other than 8, which count"),
    "awq-zero-point": ("awq-zero-points", {"zero_point": False}, "zero-points other than 8, which count"),
    "desc-act": ("gptq-desc-act", {"desc_act": False}, "desc_act is false, but g_idx reorders"),
}


@pytest.mark.parametrize(("name", "values", "said"), LIES.values(), ids=LIES)
def test_settings_that_the_tensors_contradict(name: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The tensors count, and that is said."""
    write_case(name, tmp_path / "in")
    assert not warnings(tmp_path / "in")
    edit_quantization(tmp_path / "in", **values)
    (warning,) = warnings(tmp_path / "in")
    assert said in warning
    assert "looked at" in warning


@pytest.mark.parametrize("damage", [lambda t: t.fill_(-1), lambda t: t.zero_()], ids=["names-no-group", "uneven"])
def test_what_is_damaged_is_left_to_the_conversion(damage: Callable[[torch.Tensor], object], tmp_path: Path) -> None:
    """A g_idx that cannot be read is refused when the layer is converted, with the name of the tensor."""
    write_case("gptq-v1", tmp_path / "in")
    edit_tensors(tmp_path / "in", lambda tensors: [damage(t) for name, t in tensors.items() if name.endswith("g_idx")])
    assert not warnings(tmp_path / "in")
