"""Layers that are not there: vLLM would serve what the memory held, and says nothing where a model is quantized."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from checkpoint_edits import edit_json
from safetensors.torch import load_file, save_file
from tiny_models import write_llama, write_mixtral, write_qwen3_moe

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.errors import PlanError

MIXTURES = ("mlp", "block_sparse_moe")


def without(model: Path, names: Iterable[str]) -> Path:
    """Take tensors away, by the ends of what is before `.weight`."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    left = {name: tensor for name, tensor in tensors.items() if not name.removesuffix(".weight").endswith(tuple(names))}
    assert len(left) < len(tensors)
    save_file({name: tensor.contiguous() for name, tensor in left.items()}, file, {"format": "pt"})
    return model


def problems(model: Path) -> list[str]:
    """Return what a plan refuses."""
    try:
        plan_quantization(open_checkpoint(model), QuantizeOptions())
    except PlanError as error:
        return list(map(str, error.problems))
    return []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0.mlp.up_proj"], "model.layers.0.mlp: has no up_proj"),
        (["1.mlp.gate_proj", "1.mlp.down_proj"], "model.layers.1.mlp: has no down_proj and gate_proj"),
        (["0.self_attn.q_proj"], "model.layers.0.self_attn: has no q_proj"),
        (["1.self_attn.o_proj", "1.self_attn.k_proj"], "model.layers.1.self_attn: has no k_proj and o_proj"),
    ],
)
def test_half_of_a_pair(names: list[str], said: str, tmp_path: Path) -> None:
    """Gate without up is refused, and so is what else others like it have."""
    model = write_llama(tmp_path / "in")
    assert problems(model) == []
    (found,) = problems(without(model, names))
    assert found.startswith(f"{said}, which others like it have; download")


@pytest.mark.parametrize(("write", "up"), [(write_mixtral, "w3"), (write_qwen3_moe, "up_proj")])
def test_experts(write: Callable[..., Path], up: str, tmp_path: Path) -> None:
    """A projection of one; one in the middle; the last one of a layer, which models may do without."""
    assert problems(write(tmp_path / "whole", layers=2)) == []
    (found,) = problems(without(write(tmp_path / "half", layers=2), [f"0.{end}.experts.2.{up}" for end in MIXTURES]))
    assert f".experts.2: has no {up}, which" in found
    leaves = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
    names = [f"1.{end}.experts.1.{leaf}" for end in MIXTURES for leaf in leaves]
    middle = without(write(tmp_path / "middle", layers=2), names)
    (found,) = problems(middle)
    assert ".experts: has no 1, but a 3; download" in found
    last = without(write(tmp_path / "last", layers=2), [name.replace("experts.1", "experts.3") for name in names])
    warnings = plan_quantization(open_checkpoint(last), QuantizeOptions()).warnings
    assert any(".experts: 3 experts, others 4: wrong" in text for text in warnings)


def test_shared_keys_and_values(tmp_path: Path) -> None:
    """Models may do without; where the configuration does not say so it is a warning."""
    model = without(write_llama(tmp_path / "in", layers=3), ["2.self_attn.v_proj"])
    plan = plan_quantization(open_checkpoint(model), QuantizeOptions())
    (warning,) = [text for text in plan.warnings if "v_proj" in text]
    assert warning.startswith("no v_proj in model.layers.2.self_attn, which others have: wrong, unless")
    edit_json(model / "config.json", text_config={"attention_k_eq_v": True})
    plan = plan_quantization(open_checkpoint(model), QuantizeOptions())
    assert not [text for text in plan.warnings if "v_proj" in text]
