"""Tensors that are quantized in a way that is not read: refused by name, or named where a model may mean them."""

from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_tensors, write_case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.conversion.plan import Plan, make_plan
from convert_w4a8.errors import PlanError, Problem
from convert_w4a8.options import Options

LAYER = "model.layers.0"
Q_PROJ = f"{LAYER}.self_attn.q_proj"


def plan_with(path: Path, tensors: dict[str, torch.Tensor], case: str = "gptq-v1") -> Plan:
    """Plan a checkpoint that holds some tensors more."""
    written = write_case(case, path)
    edit_tensors(written.path, lambda found: found.update(tensors))
    return make_plan(open_checkpoint(written.path), Options())


def refusal(path: Path, tensors: dict[str, torch.Tensor], case: str = "gptq-v1") -> Problem:
    """Return why such a checkpoint is refused: one problem."""
    with pytest.raises(PlanError) as caught:
        plan_with(path, tensors, case)
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem


def words(*shape: int) -> torch.Tensor:
    """Return int32 words."""
    return torch.ones(shape, dtype=torch.int32)


UNREAD: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "marlin": ({f"{LAYER}.mlp.extra.B": words(16, 64), f"{LAYER}.mlp.extra.s": torch.ones(2, 64)}, "Marlin's own"),
    "fp8": ({f"{LAYER}.mlp.extra.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, "is FP8, and neither"),
    "fp8-scale": ({f"{LAYER}.mlp.extra.weight_scale_inv": torch.ones(1, 1)}, "part of a quantized weight"),
    "int8-weight": ({f"{LAYER}.mlp.extra.weight": torch.ones(8, 8, dtype=torch.int8)}, "part of a quantized weight"),
    "bitsandbytes": ({f"{LAYER}.mlp.extra.weight.absmax": torch.ones(8)}, "part of a quantized weight"),
    "olive": ({f"{LAYER}.mlp.experts.down_proj_qweight": words(4, 8, 8).to(torch.uint8)}, "part of a quantized"),
    "mxfp4": ({f"{LAYER}.mlp.experts.gate_up_proj_blocks": words(4, 8, 2).to(torch.uint8)}, "part of a quantized"),
    "scales": ({f"{LAYER}.mlp.experts.gate_up_proj_scales": torch.ones(4, 8, 2)}, "part of a quantized weight"),
    "stack": ({f"{LAYER}.mlp.experts.w13": words(4, 8, 8)}, "part of a quantized weight"),
    "beside": ({f"{Q_PROJ}.channel_scale": torch.ones(256)}, "stands beside the INT4 weights of a layer"),
    "static": ({f"{Q_PROJ}.input_scale": torch.ones(1)}, "stands beside the INT4 weights of a layer"),
    "adapter": ({f"{Q_PROJ}.lora_A": torch.ones(8, 256)}, "stands beside the INT4 weights of a layer"),
}


@pytest.mark.parametrize(("tensors", "reason"), UNREAD.values(), ids=UNREAD)
def test_quantized_tensors_that_are_not_read_are_refused(
    tensors: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    """They would lie in the output as if they were ordinary, and be served wrong, or not at all."""
    problem = refusal(tmp_path / "in", tensors)
    assert problem.subject in tensors
    assert reason in problem.reason


def test_many_of_a_kind_are_one_problem(tmp_path: Path) -> None:
    """The first is named, and the others are counted."""
    tensors = {f"model.layers.{n}.self_attn.q_proj.input_scale": torch.ones(1) for n in range(2)}
    assert refusal(tmp_path / "in", tensors).reason.endswith("is not known, as 1 more")


HARMLESS: dict[str, dict[str, torch.Tensor]] = {
    "indices": {"model.position_ids": torch.arange(8)[None]},
    "int32-indices": {"model.embeddings.position_ids": words(1, 8)},
    "mask": {f"{LAYER}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)},
    "masked-bias": {f"{LAYER}.attn.masked_bias": torch.ones(1)},
    "relative": {f"{LAYER}.attn.relative_position_index": words(8, 8)},
    "bias": {f"{Q_PROJ}.bias": torch.zeros(256)},
    "kv-scales": {f"{LAYER}.self_attn.k_proj.k_scale": torch.ones(1), f"{LAYER}.self_attn.attn.v_scale": torch.ones(1)},
    "layer-scale": {f"{LAYER}.layer_scale": torch.ones(8), f"{LAYER}.router.per_expert_scale": torch.ones(8)},
    "counter": {"model.bn.num_batches_tracked": torch.tensor(3)},
}


@pytest.mark.parametrize("tensors", HARMLESS.values(), ids=HARMLESS)
def test_what_models_have_is_copied(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Indices, masks, biases and scales that are the model's own are no reason to refuse, nor to speak."""
    found = plan_with(tmp_path / "in", tensors)
    assert tensors.keys() <= {tensor.info.name for tensor in found.tensors}
    assert found.warnings == ()


def test_a_table_of_integers_is_named(tmp_path: Path) -> None:
    """What may be a model's table is copied, and the plan says so."""
    found = plan_with(tmp_path / "in", {f"{LAYER}.mlp.routing": words(8, 8), f"{LAYER}.mlp.table": words(8, 8)})
    assert found.warnings == (f"copied as it is: {LAYER}.mlp.routing, I32 [8, 8] and 1 more",)


def test_marlin_without_a_setting(tmp_path: Path) -> None:
    """A checkpoint of nothing but Marlin's tensors is refused as that, not as one without layers."""
    written = write_case("gptq-v1", tmp_path / "in")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("qweight")]:
            module = name.removesuffix(".qweight")
            tensors[f"{module}.B"], tensors[f"{module}.s"] = tensors.pop(name), tensors.pop(f"{module}.scales")
            del tensors[f"{module}.qzeros"], tensors[f"{module}.g_idx"]

    edit_tensors(written.path, rename)
    with pytest.raises(PlanError, match=r"B: I32 \[64, 256\] is in Marlin's own layout, as 27 more; give the GPTQ"):
        make_plan(open_checkpoint(written.path), Options())
