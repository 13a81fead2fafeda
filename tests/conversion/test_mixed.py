"""Checkpoints of mixed precision: INT4 layers are converted, FP8 layers beside them carried over byte for byte."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_edits import edit_json, edit_quantization, edit_tensors
from click.testing import CliRunner, Result
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from factories.checkpoints import write
from factories.formats import Awq, Format, Gptq
from factories.layers import Scheme
from factories.models import Model, llama, mixtral, qwen3_moe
from mixtures import ATTENTION, PRESETS, add_fp8, config_group, quantize, write_mixture
from safetensors.torch import load_file

from convert_w4a8 import api
from convert_w4a8.cli.main import main
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.options import Options

FORMATS = ("lut", "compressed-tensors")
Q_PROJ = "model.layers.0.self_attn.q_proj"
ROLES = ("weight", "weight_scale", "input_scale")
KINDS = {
    "FP8": "FP8, a scale per tensor, static FP8 activations",
    "FP8_DYNAMIC": "FP8, a scale per channel, dynamic FP8 activations",
    "FP8_BLOCK": "FP8, a scale per block of 128×128, dynamic FP8 activations",
}
SKIPPED = ("q_proj", "k_proj", "v_proj", "o_proj")
UNTOUCHED: dict[str, dict[str, Any]] = {"-:.*self_attn.*": {}}
LAST = r"model\.layers\.1\.mlp\.experts.*"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def block_of(path: Path) -> dict[str, Any]:
    block: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return block


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def problems_of(path: Path, form: str = "lut") -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        api.make_plan(path, Options(format=form))
    return tuple(map(str, caught.value.problems))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", [llama, qwen3_moe], ids=["llama", "qwen3-moe"])
def test_fp8_layers_are_carried_over(form: str, preset: str, model: Callable[[], Model], tmp_path: Path) -> None:
    """Plan, output, configuration, proof: every FP8 tensor keeps its bytes, and no layer is of two kinds."""
    source, out = tmp_path / "in", tmp_path / "out"
    meant = write_mixture(source, model(), preset)
    assert len(meant) == 8
    plan = json.loads(succeed("convert", source, out, "--format", form, "--dry-run", "--json"))
    plan = plan.get("plan", plan)
    assert plan["carried"] == {KINDS[preset]: 8}
    assert not set(plan["ignore"]) & meant.keys()
    text = run("convert", source, out, "--format", form)
    assert text.exit_code == 0, text.output
    assert f"8 layers, byte for byte: {KINDS[preset]}" in text.output
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for module in meant:
        names = [f"{module}.{role}" for role in ROLES if f"{module}.{role}" in before]
        assert len(names) == (3 if preset == "FP8" else 2)
        assert all(same_bytes(before[name], after[name]) for name in names)
    assert f"carried    {len(meant)} layers, byte for byte" in succeed("verify", out, "--source", source)

    block = block_of(out)
    assert not set(block["ignore"]) & meant.keys()
    if form == "lut":
        assert block["version"] == 2
        block = block["carried"]
    parsed = QuantizationConfig.model_validate(block)
    for module, weight in meant.items():
        (scheme,) = (
            group
            for group in parsed.config_groups.values()
            if any(match_name(module, target) for target in group.targets)
        )
        found = {role: after[f"{module}.{role}"] for role in ROLES if f"{module}.{role}" in after}
        library = BaseCompressor.get_value_from_registry(scheme.format)
        # The library multiplies in the scale's dtype.
        found["weight_scale"] = found["weight_scale"].float()
        assert torch.equal(library.decompress(found, scheme)["weight"].float(), weight)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_rounded(form: str, tmp_path: Path) -> None:
    """Scales in FP16 stay so, though everything else in FP16 becomes BF16."""
    source, out = tmp_path / "in", tmp_path / "out"
    meant = write_mixture(source, llama(), "FP8", dtype=torch.float16)
    api.convert(source, out, Options(format=form))
    tensors = load_file(out / "model.safetensors")
    assert {tensors[f"{module}.{role}"].dtype for module in meant for role in ROLES[1:]} == {torch.float16}
    assert tensors["model.norm.weight"].dtype == torch.bfloat16
    assert not api.verify(out, source).problems


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", ["byte", "dtype", "gone"])
def test_the_proof_sees_what_became_of_them(form: str, role: str, damage: str, tmp_path: Path) -> None:
    """One bit, another dtype, a tensor that is missing."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama(), "FP8", dtype=torch.float16)
    api.convert(source, out, Options(format=form))
    name = f"{Q_PROJ}.{role}"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        match damage:
            case "byte":
                tensors[name].view(torch.uint8).flatten()[0] ^= 1
            case "dtype":
                tensors[name] = tensors[name].bfloat16()
            case _:
                del tensors[name]

    edit_tensors(out, edit)
    assert name in {problem.subject for problem in api.verify(out, source).problems}


@pytest.mark.parametrize("form", FORMATS)
def test_the_proof_sees_what_vllm_would_be_told_otherwise(form: str, tmp_path: Path) -> None:
    """Another target, or other activations, in the block of the carried layers."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama(), "FP8_DYNAMIC")
    api.convert(source, out, Options(format=form))
    place, group = (("carried",), "group_0") if form == "lut" else ((), "group_1")
    for change in ({"targets": [Q_PROJ]}, {"input_activations": None}):
        kept = (out / "config.json").read_text()
        edit_json(out / "config.json", "quantization_config", *place, "config_groups", group, **change)
        assert api.verify(out, source).problems
        (out / "config.json").write_text(kept)
    assert not api.verify(out, source).problems


def test_an_output_without_carried_layers_is_of_version_1(tmp_path: Path) -> None:
    """Older plugins read it, and its bytes are what they were; `ignore` holds no patterns either."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama(), fp8="nothing")
    edit_json(source / "config.json", "quantization_config", ignore=["lm_head"])
    api.convert(source, out)
    assert block_of(out)["version"] == 1
    assert "carried" not in block_of(out)


@pytest.mark.parametrize("form", FORMATS)
def test_case_12(form: str, shared: Path, tmp_path: Path) -> None:
    """INT4 experts beside attention in FP8 blocks, as GLM-5.3 is published."""
    (script,) = (shared / "cases").glob("12-*.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "in")], check=True)
    result = api.convert(tmp_path / "in", tmp_path / "out", Options(format=form))
    assert (len(result.converted), len(result.plan.carried)) == (6, 4)
    verification = api.verify(tmp_path / "out", tmp_path / "in")
    assert not verification.problems
    assert verification.carried == 4


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("model", [qwen3_moe(), mixtral(block_sparse_names=False)], ids=["qwen3-moe", "mixtral"])
def test_experts_of_one_layer_in_fp8(form: str, model: Model, tmp_path: Path) -> None:
    """Of a model that has them INT4 elsewhere; a Mixtral's are renamed, whatever they are."""
    source, out = tmp_path / "in", tmp_path / "out"
    meant = write_mixture(source, model, "FP8_DYNAMIC", fp8=LAST, plain="lm_head|.*gate$")
    assert meant
    api.convert(source, out, Options(format=form))
    assert not api.verify(out, source).problems
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    shorts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for module in meant:
        name = module
        if model.config["model_type"] == "mixtral":
            head, _, leaf = module.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
            name = f"{head}.{shorts[leaf]}"
        assert same_bytes(after[f"{name}.weight"], before[f"{module}.weight"])
    groups = block_of(out)["config_groups"] if form != "lut" else block_of(out)["carried"]["config_groups"]
    targets = [target for group in groups.values() for target in group["targets"] if ".experts" in target]
    assert len(targets) == (1 if form == "lut" else 2), "one for each layer, not for each expert"


@pytest.mark.parametrize("form", FORMATS)
def test_the_other_commands_know_them(form: str, tmp_path: Path) -> None:
    """`inspect` of source and output, `report`, `check` whole and of a sample, replacing and converting an output."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama())
    api.convert(source, out, Options(format=form))
    for path in (source, out):
        found = json.loads(succeed("inspect", path, "--json"))
        assert found["carried"] == {KINDS["FP8_BLOCK"]: 8}
        assert sum(kind["count"] for kind in found["layers"]) == 6
        assert f"8 layers: {KINDS['FP8_BLOCK']}" in succeed("inspect", path)
    succeed("report", out, "--source", source, "--json")
    succeed("check", source, "--format", form)
    succeed("check", source, "--format", form, "--sample")
    succeed("convert", source, out, "--format", form, "--overwrite")
    write_mixture(tmp_path / "theirs", llama())
    with pytest.raises(ConvertError, match="is not an output of w4a8-convert"):
        api.convert(source, tmp_path / "theirs", Options(format=form), overwrite=True)
    if form != "lut":
        api.convert(out, tmp_path / "again", Options(format="lut"))
        assert not api.verify(tmp_path / "again", out).problems


def test_what_is_left_for_people_to_read(tmp_path: Path) -> None:
    """The model card counts them."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama())
    api.convert(source, out)
    assert "| carried over in FP8, byte for byte | 8 layers |" in (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("plain", [r".*layers\.0.*k_proj", r".*k_proj"], ids=["one", "all"])
def test_parts_of_a_merged_layer_of_two_kinds_are_refused(plain: str, tmp_path: Path) -> None:
    """In FP8 and 16 bits, and in FP8 and INT4; one line, however many layers there are."""
    source = tmp_path / "in"
    write_mixture(source, llama(), fp8=rf"(?!{plain}){ATTENTION}", plain=f"lm_head|{plain}")
    (problem,) = problems_of(source)
    assert "vLLM serves this as one layer, but its parts are of different kinds" in problem
    assert "k_proj: 16 bits; q_proj, v_proj: FP8" in problem
    other = tmp_path / "other"
    write_mixture(other, llama(), fp8=rf"(?!{plain}){ATTENTION}")
    (problem,) = problems_of(other)
    assert problem.startswith("model.layers.0.self_attn.qkv_proj")
    assert "q_proj, v_proj: FP8, a scale per block of 128×128, dynamic FP8 activations; k_proj: INT4" in problem
    assert (" and 1 more: " in problem) == (plain == ".*k_proj")


def test_experts_of_two_kinds_in_one_layer_are_refused(tmp_path: Path) -> None:
    """One expert in FP8 among those in INT4."""
    write_mixture(tmp_path / "in", qwen3_moe(), fp8=r".*layers\.0.*experts\.1\..*")
    (problem,) = problems_of(tmp_path / "in")
    assert problem.startswith("model.layers.0.mlp.experts: vLLM serves this as one layer")


def test_fp8_alone_is_nothing_to_convert(tmp_path: Path) -> None:
    """Every layer would be carried over."""
    write_mixture(tmp_path / "in", llama(), fp8=r"(?!lm_head|.*embed|.*norm).*")
    (problem,) = problems_of(tmp_path / "in")
    assert problem.endswith("has FP8 layers only: nothing to convert; serve it as it is")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({"num_bits": 8, "type": "int"}, "and 7 more: INT8 weights are neither converted nor carried over"),
    "fp4": ({"num_bits": 4}, "and 7 more: FP4 weights are neither converted nor carried over"),
    "group": ({"strategy": "group", "group_size": 32}, "and 7 more: FP8 weights of strategy 'group' are not carried"),
    "asymmetric": ({"symmetric": False}, "asymmetric or dynamic"),
    "dynamic": ({"dynamic": True}, "asymmetric or dynamic"),
    "block-text": ({"block_structure": "128x128"}, "block_structure '128x128' is not two sizes"),
    "block-bool": ({"block_structure": [True, 128]}, "block_structure [True, 128] is not two sizes"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_one_line_each(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    """The first layer, how many others, what they are."""
    write_mixture(tmp_path / "in", llama())
    edit_json(tmp_path / "in" / "config.json", "quantization_config", "config_groups", "group_1", "weights", **change)
    (problem,) = problems_of(tmp_path / "in")
    assert problem.startswith("model.layers.0.self_attn.k_proj and 7 more: ")
    assert says in problem


STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("activations", "says"),
    [
        (STATIC, "vLLM does not serve FP8 weights with these input_activations"),
        (INT8, "vLLM does not serve FP8 weights with these input_activations"),
        ("token", "config_groups: input_activations"),
    ],
    ids=["static", "int8", "text"],
)
def test_activations_that_vllm_does_not_serve(activations: object, says: str, tmp_path: Path) -> None:
    """Static ones with blocks (an assertion in vLLM), integers."""
    write_mixture(tmp_path / "in", llama())
    place = ("quantization_config", "config_groups", "group_1")
    edit_json(tmp_path / "in" / "config.json", *place, input_activations=activations)
    assert all(says in problem for problem in problems_of(tmp_path / "in"))


@pytest.mark.parametrize(("preset", "strategy"), [("FP8", "token"), ("FP8_DYNAMIC", "tensor")])
def test_activations_of_experts_that_vllm_does_not_serve(preset: str, strategy: str, tmp_path: Path) -> None:
    """It serves FP8 experts by tensor and tensor, by channel and token, or by blocks (an assertion otherwise)."""
    write_mixture(tmp_path / "in", qwen3_moe(), preset, fp8=LAST)
    place = ("quantization_config", "config_groups", "group_1")
    activations = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": True, "symmetric": True}
    edit_json(tmp_path / "in" / "config.json", *place, input_activations=activations)
    (problem,) = problems_of(tmp_path / "in")
    weights = "tensor" if preset == "FP8" else "channel"
    assert f"experts with a scale per {weights}, and activations per {strategy}; quantize" in problem


@pytest.mark.parametrize(
    ("preset", "role", "tensor", "says"),
    [
        ("FP8", "input_scale", None, "input_scale: is missing"),
        ("FP8", "weight_scale", torch.ones(256, 1), "weight_scale: is F32 [256, 1], not F16 or BF16 or F32 [1]"),
        ("FP8_DYNAMIC", "weight_scale", torch.ones(256), "is F32 [256], not F16 or BF16 or F32 [256, 1] = [N, 1]"),
        ("FP8_BLOCK", "weight_scale", torch.ones(2, 1), "not F16 or BF16 or F32 [2, 2] = a scale for each block"),
        ("FP8_BLOCK", "weight", torch.ones(256, 256), "weight: is F32 [256, 256], not a F8_E4M3 matrix"),
        ("FP8_BLOCK", "weight", None, "weight: is missing"),
    ],
)
def test_tensors_that_are_not_of_the_scheme(
    preset: str, role: str, tensor: torch.Tensor | None, says: str, tmp_path: Path
) -> None:
    """What vLLM would not load, or would take for what it is not."""
    write_mixture(tmp_path / "in", llama(), preset)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{Q_PROJ}.{role}")
        if tensor is not None:
            tensors[f"{Q_PROJ}.{role}"] = tensor

    edit_tensors(tmp_path / "in", edit)
    assert any(says in problem for problem in problems_of(tmp_path / "in"))


def test_what_vllm_holds_in_16_bits_is_refused(tmp_path: Path) -> None:
    """Routers and embeddings; and experts with 16-bit activations, for which it has no kernel."""
    source = tmp_path / "in"
    write_mixture(source, qwen3_moe(), fp8=r".*mlp\.gate$|.*embed_tokens")
    problems = problems_of(source)
    assert len(problems) == 2
    assert any("vLLM does not serve embeddings in FP8" in problem for problem in problems)
    assert any("and 1 more: vLLM does not serve routers in FP8" in problem for problem in problems)
    other = tmp_path / "other"
    write_mixture(other, qwen3_moe(), fp8=LAST)
    place = ("quantization_config", "config_groups", "group_1")
    edit_json(other / "config.json", *place, input_activations=None)
    (problem,) = problems_of(other)
    assert "vLLM does not serve FP8 experts with 16-bit activations" in problem


@pytest.mark.parametrize("form", FORMATS)
def test_an_lm_head_in_fp8_is_carried(form: str, tmp_path: Path) -> None:
    """VLLM serves it; as its mappers rename only names with a dot, the target is a pattern."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_mixture(source, llama(tied=False), "FP8_DYNAMIC", fp8=f"lm_head$|{ATTENTION}", plain="nothing")
    api.convert(source, out, Options(format=form))
    block = block_of(out)
    assert "lm_head" not in block["ignore"]
    groups = block["carried"]["config_groups"] if form == "lut" else block["config_groups"]
    assert any(r"re:(?:.*\.)?lm_head$" in group["targets"] for group in groups.values())
    assert not api.verify(out, source).problems


def test_two_schemes_are_two_groups(tmp_path: Path) -> None:
    """Attention by block in one layer, by channel in another."""
    source, out = tmp_path / "in", tmp_path / "out"
    first, second = (rf".*layers\.{i}\.self_attn\.[qkvo]_proj$" for i in range(2))
    write_mixture(source, llama(), "FP8_BLOCK", fp8=first, plain=f"lm_head|{second}")
    edit_quantization(source, ignore=["lm_head"])
    add_fp8(source, second, "FP8_DYNAMIC")
    plan = api.convert(source, out, Options(format="compressed-tensors")).plan
    assert {layer.kind for layer in plan.carried} == {KINDS["FP8_BLOCK"], KINDS["FP8_DYNAMIC"]}
    groups = block_of(out)["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["group", "block", "channel"]
    assert groups["group_1"] == {**config_group("FP8_BLOCK", groups["group_1"]["targets"])}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", [Awq(Scheme(), skip=SKIPPED), Gptq(dynamic=UNTOUCHED)], ids=["awq", "gptq"])
def test_deepseeks_blocks_beside_int4_of_other_formats(case: Format, form: str, tmp_path: Path) -> None:
    """FP8 with a weight_scale_inv, of which the settings of AWQ and GPTQ say nothing; the scale gets vLLM's name."""
    source, out = tmp_path / "in", tmp_path / "out"
    written = write(source, llama(), case)
    fp8 = [name.removesuffix(".weight") for name in written.dense if ".self_attn." in name]
    assert len(fp8) == 8

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for module in fp8:
            found = quantize(tensors.pop(f"{module}.weight"), "FP8_BLOCK")
            tensors[f"{module}.weight"] = found["weight"]
            tensors[f"{module}.weight_scale_inv"] = found["weight_scale"].float()

    edit_tensors(source, edit)
    plan = api.convert(source, out, Options(format=form)).plan
    assert {layer.kind for layer in plan.carried} == {KINDS["FP8_BLOCK"]}
    assert not api.verify(out, source).problems
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for module in fp8:
        assert same_bytes(after[f"{module}.weight_scale"], before[f"{module}.weight_scale_inv"])

    edit_tensors(source, lambda tensors: tensors.pop(f"{Q_PROJ}.weight_scale_inv"))
    assert any(
        problem.startswith(f"{Q_PROJ}.weight: is FP8, and neither quantization_config nor a weight_scale_inv says")
        for problem in problems_of(source)
    )


def test_nan_is_refused(tmp_path: Path) -> None:
    """As in every other tensor that is copied."""
    write_mixture(tmp_path / "in", llama())

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q_PROJ}.weight"].view(torch.uint8)[3, 5] = 0xFF

    edit_tensors(tmp_path / "in", edit)
    with pytest.raises(ConvertError, match=rf"{Q_PROJ}\.weight: holds NaN"):
        api.convert(tmp_path / "in", tmp_path / "out")
