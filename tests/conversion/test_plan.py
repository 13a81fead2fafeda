"""The plan: from headers alone, all problems at once, and figures that hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import (
    Tensors,
    edit_json,
    edit_quantization,
    edit_tensors,
    set_zero_point,
    snapshot,
    write_case,
)
from factories import CASES, SEVENS, Case, Checkpoint, Options
from factories.formats import Awq, CompressedTensors, Gptq
from factories.layers import Scheme
from factories.models import Model, llama, qwen3_moe

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.names import natural_key
from convert_w4a8.conversion.plan import Plan, check_tensors, kinds, make_plan
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.options import Options as PlanOptions
from convert_w4a8.options import Policy, ScalesMode, Unsupported
from convert_w4a8.targets import targets

ALL_REQUANTIZED = PlanOptions(
    act_order=Policy.REQUANTIZE, group_size=Policy.REQUANTIZE, unsupported=Unsupported.DEQUANTIZE
)
WORKING = [pytest.param(case, id=case.id) for case in CASES if not case.refused]


def plan(source: Checkpoint | Path, options: PlanOptions = ALL_REQUANTIZED) -> Plan:
    """Plan a conversion; with every policy that converts, unless told otherwise."""
    return make_plan(open_checkpoint(source if isinstance(source, Path) else source.path), options)


def problems(source: Checkpoint | Path, **options: Any) -> list[Problem]:
    """Return what the plan refuses."""
    with pytest.raises(PlanError) as caught:
        plan(source, PlanOptions(**options))
    return list(caught.value.problems)


def written_as(form: Any, model: Model, path: Path, options: Options | None = None) -> Checkpoint:
    """Write a checkpoint of a model in a format."""
    return Case("", form, lambda: model, options or Options()).write(path)


# Over every input format.


@pytest.mark.parametrize("case", WORKING)
def test_plan_accounts_for_every_tensor(case: Case, tmp_path: Path) -> None:
    """Each tensor of the input is part of one layer or copied; each output is written once; sizes add up."""
    source = case.write(tmp_path / "in")
    before = snapshot(tmp_path)
    for target in targets():
        _check_accounts(case, source, replace(ALL_REQUANTIZED, format=target.NAME, max_shard_size=200_000))
    assert snapshot(tmp_path) == before


def _check_accounts(case: Case, source: Checkpoint, options: PlanOptions) -> None:
    """Check the plan of one case."""
    checkpoint = open_checkpoint(source.path)
    p = make_plan(checkpoint, options)
    inputs = [part.name for layer in p.layers for part in layer.spec.parts.values()] + [t.info.name for t in p.tensors]
    assert sorted(inputs) == sorted(checkpoint.tensors)
    outputs = [spec for layer in p.layers for spec in layer.specs] + [tensor.output for tensor in p.tensors]
    names = [spec.name for spec in outputs]
    assert len(names) == len(set(names))
    assert [spec.name for shard in p.shards for spec in shard.specs] == sorted(names, key=natural_key)
    assert p.nbytes_in == checkpoint.nbytes
    assert p.nbytes_out == sum(spec.nbytes for spec in outputs) == sum(shard.nbytes for shard in p.shards)
    assert p.disk_nbytes == p.nbytes_out + sum((source.path / name).stat().st_size for name in checkpoint.side_files)
    kept = {layer.spec.name for layer in p.layers if layer.dequantize}
    assert kept == {name for name in source.layers if name.endswith(case.dequantized or ("\0",))}
    assert kinds(p)["converted"] + kinds(p)["in_bf16"] == len(source.layers)
    assert not any(spec.dtype == "F16" for spec in outputs)


# What is refused, all at once, each with its remedy.


def test_all_problems_come_together(tmp_path: Path) -> None:
    """Every layer that cannot be converted is named, not the first only, with a reason and a remedy each."""
    form = CompressedTensors(
        {
            r"re:.*\.down_proj$": Scheme(bits=8, scale_dtype=torch.bfloat16),
            r"re:.*\.o_proj$": Scheme(group_size=64, scale_dtype=torch.bfloat16),
            "Linear": Scheme(scale_dtype=torch.bfloat16),
        }
    )
    source = written_as(form, llama(kv_dim=136), tmp_path / "in")
    edit_quantization(source.path, kv_cache_scheme={"num_bits": 8}, transform_config={"x": 1})
    found = problems(source, scales=ScalesMode.REFERENCE)
    reasons = {problem.subject: problem.reason for problem in found}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        assert reasons[f"{prefix}.self_attn.o_proj"] == "group_size 64 is not a multiple of the kernel's 128"
        assert reasons[f"{prefix}.self_attn.k_proj"] == "N = 136 is not a multiple of 16"
        assert reasons[f"{prefix}.self_attn.v_proj"] == "N = 136 is not a multiple of 16"
    assert reasons["model.layers.0.mlp.down_proj and 1 more"].startswith("INT8 weights are neither converted")
    assert reasons["quantization_config: kv_cache_scheme"] == "is not part of --format lut"
    assert "rotations" in reasons["quantization_config: transform_config"]
    assert len(found) == len(reasons) == 9
    assert all(problem.remedy and problem.reason for problem in found)


@pytest.mark.parametrize(
    ("case", "option", "remedy"),
    [
        ("gptq-g32", {"group_size": Policy.REQUANTIZE}, "--group-size requantize"),
        ("awq-odd-n", {"unsupported": Unsupported.DEQUANTIZE}, "--unsupported dequantize"),
        ("gptq-odd-k", {"unsupported": Unsupported.DEQUANTIZE}, "--unsupported dequantize"),
    ],
)
def test_the_remedy_helps(case: str, option: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    """The option that a problem names makes the plan pass."""
    source = write_case(case, tmp_path / "in")
    found = problems(source)
    assert found
    assert all(remedy in problem.remedy for problem in found)
    assert plan(source, PlanOptions(**option)).layers


def test_direct_scales_need_the_lut_format(tmp_path: Path) -> None:
    """Tables that are no multiples of a scale cannot be stored for stock vLLM."""
    source = write_case("gptq-v1", tmp_path / "in")
    (found,) = problems(source, format="compressed-tensors", scales=ScalesMode.DIRECT)
    assert str(found) == "--scales direct: cannot be stored by --format compressed-tensors; use --format lut"
    assert plan(source, PlanOptions(format="lut", scales=ScalesMode.DIRECT)).layers


def test_a_checkpoint_without_quantized_layers_is_refused(tmp_path: Path) -> None:
    """A quantization_config over plain weights converts nothing, which is said rather than done."""
    source = written_as(Awq(skip=("proj",)), llama(), tmp_path / "in")
    (found,) = problems(source)
    assert found.reason == "has no awq layers"


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("gptq-v1", "qweight"),
        ("awq-zero-points", "qweight"),
        ("ct-w4a16", "weight_scale"),
    ],
)
def test_parts_without_their_layer_are_refused(case: str, lost: str, tmp_path: Path) -> None:
    """Scales, zero-points and so on whose weight is gone are not copied as if they were ordinary tensors."""
    source = write_case(case, tmp_path / "in")
    module = "model.layers.0.mlp.up_proj"
    left: list[str] = []

    def damage(t: Tensors) -> None:
        del t[f"{module}.{lost}"]
        left.extend(name for name in t if name.startswith(f"{module}."))

    edit_tensors(source.path, damage)
    found = problems(source)
    assert sorted(problem.subject for problem in found) == sorted(left)
    assert {problem.reason for problem in found} == {"belongs to no quantized layer"}


def test_a_packed_layer_with_a_plain_weight_beside_it_is_refused(tmp_path: Path) -> None:
    """The same for compressed-tensors, whose own `weight` is another way to store codes."""
    source = write_case("ct-w4a16", tmp_path / "in")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source.path, lambda t: t.update({name: torch.ones(512, 256)}))
    (found,) = problems(source)
    assert str(found).startswith(f"{name}: stands beside a packed weight")


@pytest.mark.parametrize(
    ("case", "changes", "subject"),
    [
        ("gptq-v1", {"group_size": "128"}, "quantization_config: group_size"),
        ("gptq-v1", {"checkpoint_format": "marlin"}, "quantization_config: checkpoint_format"),
        ("awq-zero-points", {"version": "gemv"}, "quantization_config: version"),
        ("awq-zero-points", {"zero_point": 1}, "quantization_config: zero_point"),
        ("ct-w4a16", {"config_groups": [1]}, "quantization_config: config_groups"),
    ],
)
def test_one_wrong_setting_is_one_problem(case: str, changes: dict[str, Any], subject: str, tmp_path: Path) -> None:
    """A setting that is wrong for all layers is said once, and does not make their tensors orphans."""
    source = write_case(case, tmp_path / "in")
    edit_quantization(source.path, **changes)
    assert [problem.subject for problem in problems(source)] == [subject]


def test_a_damaged_layer_is_not_also_an_orphan(tmp_path: Path) -> None:
    """A layer that is refused for its scales is not refused again for each of its other tensors."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(source.path, lambda t: t.pop("model.layers.0.mlp.up_proj.scales"))
    assert [problem.subject for problem in problems(source)] == ["model.layers.0.mlp.up_proj.scales"]


def test_two_tensors_of_one_output_name_are_refused(tmp_path: Path) -> None:
    """A module with quantized and plain weights at once would be written twice when it is kept in BF16."""
    source = write_case("gptq-lm-head", tmp_path / "in")
    edit_tensors(source.path, lambda t: t.update({"lm_head.weight": torch.ones(64, 256)}))
    (found,) = problems(source)
    assert found.subject == "lm_head.weight"
    assert found.reason == "is claimed by 2 tensors of the checkpoint"


def test_a_layer_with_a_plain_weight_beside_it_is_refused(tmp_path: Path) -> None:
    """Which of the two weights counts is unknown, so neither is taken silently."""
    source = write_case("gptq-v1", tmp_path / "in")
    module = "model.layers.0.mlp.up_proj"
    edit_tensors(source.path, lambda t: t.update({f"{module}.weight": torch.ones(512, 256)}))
    (found,) = problems(source)
    assert str(found).startswith(f"{module}.weight: is claimed by 2 tensors")


def test_names_that_collide_after_renaming_are_refused(tmp_path: Path) -> None:
    """A Mixtral that holds a router under both names has two tensors for one name of vLLM's."""
    source = write_case("gptq-mixtral", tmp_path / "in")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    edit_tensors(source.path, lambda t: t.update({name: torch.ones(4, 256)}))
    (found,) = problems(source)
    assert found.subject == name
    assert found.reason == "is claimed by 2 tensors of the checkpoint"


# Layers that stay in BF16.


def test_merged_layers_are_kept_together(tmp_path: Path) -> None:
    """When k_proj and v_proj stay in BF16, so does q_proj; o_proj and the MLP do not."""
    source = write_case("awq-odd-n", tmp_path / "in")
    p = plan(source)
    reasons = {layer.module: layer.dequantize for layer in p.layers}
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.self_attn"
        assert reasons[f"{prefix}.k_proj"] == "N = 136 is not a multiple of 16"
        together = reasons[f"{prefix}.q_proj"]
        assert together in {f"served together with {prefix}.{name}" for name in ("k_proj", "v_proj")}
        assert reasons[f"{prefix}.o_proj"] is None
        assert {f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")} <= set(p.ignore)
        assert f"{prefix}.o_proj" not in p.ignore
        (output,) = next(item.specs for item in p.layers if item.module == f"{prefix}.q_proj")
        assert (output.name, output.dtype, output.shape) == (f"{prefix}.q_proj.weight", "BF16", (256, 256))


def test_one_odd_expert_keeps_all_experts_of_its_layer(tmp_path: Path) -> None:
    """VLLM fuses the experts of a layer: all or none. The other layer and the attention convert."""
    model = qwen3_moe()
    model.linears["model.layers.0.mlp.experts.2.down_proj"] = (264, 256)
    source = written_as(Gptq(), model, tmp_path / "in")
    p = plan(source)
    kept = {layer.module for layer in p.layers if layer.dequantize}
    assert kept == {name for name in source.layers if name.startswith("model.layers.0.mlp.experts.")}
    assert kept <= set(p.ignore)


def test_lm_head_is_kept_without_being_asked(tmp_path: Path) -> None:
    """VLLM's kernel does not serve lm_head, whatever the options; that is no reason to refuse."""
    source = write_case("gptq-lm-head", tmp_path / "in")
    p = plan(source, PlanOptions())
    assert {layer.module for layer in p.layers if layer.dequantize} == {"lm_head"}
    assert kinds(p)["in_bf16"] == 1


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gptq-v1", {"lm_head"}),
        ("gptq-lm-head", {"lm_head"}),
        ("ct-w4a16-sharded-untied", {"lm_head"}),
        ("gptq-qwen3-moe-sharded", {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}),
        (
            "gptq-mixtral",
            {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"},
        ),
        (
            "awq-mixtral-w1-w2-w3",
            {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"},
        ),
        ("awq-skip-down-proj", {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}),
    ],
)
def test_ignore_lists_what_is_linear_and_not_quantized(case: str, expected: set[str], tmp_path: Path) -> None:
    """Routers, skipped modules and lm_head, the latter also when tied; never embeddings or norms."""
    assert set(plan(write_case(case, tmp_path / "in")).ignore) == expected


def test_mixtral_gets_the_names_that_vllm_loads(tmp_path: Path) -> None:
    """GPTQModel's names of Mixtral become Mistral's; everything else keeps its own."""
    p = plan(write_case("gptq-mixtral", tmp_path / "in"))
    renamed = {layer.spec.name: layer.module for layer in p.layers}
    prefix = "model.layers.1."
    assert renamed[f"{prefix}mlp.experts.3.gate_proj"] == f"{prefix}block_sparse_moe.experts.3.w1"
    assert renamed[f"{prefix}mlp.experts.3.down_proj"] == f"{prefix}block_sparse_moe.experts.3.w2"
    assert renamed[f"{prefix}mlp.experts.3.up_proj"] == f"{prefix}block_sparse_moe.experts.3.w3"
    assert renamed[f"{prefix}self_attn.q_proj"] == f"{prefix}self_attn.q_proj"
    outputs = {tensor.info.name: tensor.output.name for tensor in p.tensors}
    assert outputs[f"{prefix}mlp.gate.weight"] == f"{prefix}block_sparse_moe.gate.weight"
    assert outputs["model.norm.weight"] == "model.norm.weight"


# check_tensors: the tensors decide, not the configuration.


@pytest.mark.parametrize(
    ("case", "policy", "refused"),
    [
        ("gptq-desc-act-trivial", "act_order", False),
        ("gptq-desc-act", "act_order", True),
        ("ct-g-idx-trivial", "act_order", False),
        ("ct-g-idx", "act_order", True),
        ("awq-zero-points", "asymmetric", True),
        ("awq-zero-points-all-8", "asymmetric", False),
        ("gptq-v1-asymmetric-all-8", "asymmetric", False),
        ("gptq-v2-asymmetric", "asymmetric", True),
        ("ct-asymmetric", "asymmetric", True),
        ("ct-asymmetric-all-8", "asymmetric", False),
    ],
)
def test_policies_go_by_the_tensors(case: str, policy: str, refused: bool, tmp_path: Path) -> None:
    """`error` refuses layers whose tensors permute or have zero-points, not those whose configuration says so."""
    source = write_case(case, tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    error: dict[str, Any] = {policy: Policy.ERROR}
    requantize: dict[str, Any] = {policy: Policy.REQUANTIZE}
    p = make_plan(checkpoint, PlanOptions(**error))
    if not refused:
        check_tensors(p)
        return
    with pytest.raises(PlanError) as caught:
        check_tensors(p)
    assert {problem.subject for problem in caught.value.problems} == source.layers.keys()
    option = "--act-order" if policy == "act_order" else "--asymmetric"
    assert all(f"pass {option} requantize" in problem.remedy for problem in caught.value.problems)
    check_tensors(plan(source, PlanOptions(**requantize)))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SEVENS])
def test_zero_points_of_seven_are_not_refused(case: Case, tmp_path: Path) -> None:
    """`--asymmetric error` refuses what would need new codes: not a 7, but one 9 in one layer."""
    source = case.write(tmp_path / "in")
    options = PlanOptions(asymmetric=Policy.ERROR)
    check_tensors(plan(source, options))
    module = "model.layers.1.mlp.up_proj"
    edit_tensors(source.path, lambda t: set_zero_point(t, module, 9))
    p = plan(source, options)
    with pytest.raises(PlanError) as caught:
        check_tensors(p)
    (found,) = caught.value.problems
    assert (found.subject, found.reason) == (
        module,
        "has zero-points other than 8 and 7, which the kernel does not know",
    )


def test_layers_in_bf16_may_have_zero_points_and_any_order(tmp_path: Path) -> None:
    """What is kept in BF16 needs no codes, so `error` does not refuse it."""
    model = llama(tied=False)
    for name in list(model.linears):
        del model.linears[name]
    source = written_as(Gptq(Scheme(symmetric=False), lm_head=True), model, tmp_path / "in")
    checkpoint = open_checkpoint(source.path)
    check_tensors(make_plan(checkpoint, PlanOptions(asymmetric=Policy.ERROR)))


def test_unknown_formats_are_refused_by_name(tmp_path: Path) -> None:
    """A quantization that is none of ours is one ConvertError."""
    source = write_case("gptq-v1", tmp_path / "in")
    edit_json(source.path / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConvertError, match="'fp8' is not supported"):
        plan(source)
