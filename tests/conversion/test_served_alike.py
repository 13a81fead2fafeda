"""What vLLM serves in 16 bits it is told so, in both formats: asked of vLLM's own functions."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from vllm_ignore import Asked, asked
from vllm_sources import VERSIONS

import convert_w4a8
from convert_w4a8 import Options
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.fingerprint import fingerprint
from convert_w4a8.errors import PlanError, Problem, grouped

FORMATS = ("lut", "compressed-tensors")
LAYER = "model.layers.0"
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
QWEN3_VL = {
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
}
"""The prefixes of Qwen3-VL's and GLM-4.1V's `hf_to_vllm_mapper`."""


@pytest.fixture(params=[(form, version) for form in FORMATS for version in VERSIONS], ids="-".join)
def served(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return an output format and a version of vLLM."""
    found: tuple[str, str] = request.param
    return found


def case(shared: Path, number: str, out: Path) -> Path:
    """Write one of the shared cases."""
    (script,) = (shared / "cases").glob(f"{number}-*.py")
    subprocess.run([sys.executable, str(script), str(out)], check=True)
    return out


def convert(source: Path, form: str, **options: Any) -> dict[str, Any]:
    """Convert and verify; return the output's quantization_config."""
    out = source.parent / "out"
    convert_w4a8.convert(source, out, Options(format=form, **options), device="cpu")
    assert convert_w4a8.verify(out, source).problems == ()
    block: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return block


def converted(source: Path) -> set[str]:
    """Return the modules of the output that are W4A8."""
    tensors = load_file(source.parent / "out" / "model.safetensors")
    return {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}


def test_rows_that_llama_4_reorders(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """Only [N, K/8] bears that vLLM permutes dimension 0: elsewhere q, k and what is merged with them stay in BF16."""
    source = case(shared, "01", tmp_path / "in")
    form, version = served
    modes = ("search", "direct") if form == "lut" else ("search",)
    for mode in modes:
        block = convert(source, form, scales=mode)
        attention = {name for name in converted(source) if "self_attn" in name}
        expected = {"o_proj"} if form == "lut" else {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert attention == {f"{LAYER}.self_attn.{name}" for name in expected}
        with asked(version, block, {}, QKV) as vllm:
            assert vllm.quantizes(f"{LAYER}.self_attn.qkv_proj") == (form != "lut")
            assert vllm.quantizes(f"{LAYER}.self_attn.o_proj")
        (tmp_path / "out").rename(tmp_path / f"out-{mode}")


def test_a_shard_that_does_not_exist(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """Gemma 4's full attention has no v_proj, and vLLM asks for it."""
    form, version = served
    block = convert(case(shared, "02", tmp_path / "in"), form)
    for prefixes in ({}, {"model.": "language_model.model."}):
        root = prefixes.get("model.", "model.")
        with asked(version, block, prefixes, QKV) as vllm:
            assert vllm.quantizes(f"{root}layers.0.self_attn.qkv_proj")
            assert not vllm.quantizes(f"{root}layers.1.self_attn.qkv_proj")
            assert not vllm.quantizes(f"{root}layers.1.self_attn.o_proj")
            assert vllm.quantizes(f"{root}layers.1.mlp.gate_up_proj")


def test_a_quantized_router(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """It is dequantized, without an option; the experts are not."""
    form, version = served
    source = case(shared, "08", tmp_path / "in")
    with asked(version, convert(source, form), {}, QKV) as vllm:
        assert not vllm.quantizes(f"{LAYER}.mlp.gate")
        assert vllm.quantizes_experts(f"{LAYER}.mlp.experts")
        assert vllm.quantizes(f"{LAYER}.self_attn.qkv_proj")
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.mlp.gate.weight"].dtype == torch.bfloat16


def test_experts_in_tensors_for_all(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """Qwen3-VL-MoE's experts, in 16 bits, and its vision tower, under the names of vLLM's model."""
    form, version = served
    with asked(version, convert(case(shared, "16", tmp_path / "in"), form), QWEN3_VL, QKV | {"qkv": ["qkv"]}) as vllm:
        layer = "language_model.model.layers.0"
        assert not vllm.quantizes_experts(f"{layer}.mlp.experts")
        assert not vllm.quantizes(f"{layer}.mlp.gate")
        assert vllm.quantizes(f"{layer}.self_attn.qkv_proj")
        for name in ("blocks.0.attn.qkv", "blocks.0.mlp.linear_fc1", "merger.linear_fc2", "patch_embed.proj"):
            assert not vllm.quantizes(f"visual.{name}")


def test_experts_of_which_some_are_not_quantized(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """VLLM serves all of a layer or none: none."""
    form, version = served
    source = case(shared, "20", tmp_path / "in")
    plan = convert_w4a8.make_plan(source, Options(format=form))
    (kind,) = (kind for kind in plan.sixteen_bits if not kind.of_source)
    assert (kind.count, kind.nbytes) == (9, 9 * 256 * 256 * 2)
    with asked(version, convert(source, form), {}, QKV) as vllm:
        assert not vllm.quantizes_experts(f"{LAYER}.mlp.experts")
        assert vllm.quantizes(f"{LAYER}.self_attn.qkv_proj")
    assert not any(".experts." in name for name in converted(source))


def test_experts_under_another_name(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """Granite 4 calls its experts `input_linear`, and its router `router.layer`; vLLM does not."""
    form, version = served
    packed = {name: [name] for name in ("input_linear", "in_proj", "conv1d")} | QKV
    source = case(shared, "24", tmp_path / "in")
    for patterns in (True, False):  # what the source's own pattern says, the names say too
        if not patterns:
            config = json.loads((source / "config.json").read_text())
            config["quantization_config"]["ignore"] = ["lm_head"]
            (source / "config.json").write_text(json.dumps(config))
            (tmp_path / "out").rename(tmp_path / "out-1")
        with asked(version, convert(source, form), {}, packed) as vllm:
            for number in (0, 1):
                layer = f"model.layers.{number}"
                assert not vllm.quantizes_experts(f"{layer}.block_sparse_moe.experts")
                assert not vllm.quantizes(f"{layer}.block_sparse_moe.gate")
                assert vllm.quantizes(f"{layer}.shared_mlp.input_linear")
            assert vllm.quantizes("model.layers.0.mamba.in_proj")


def test_a_tower_that_vllm_merges_otherwise(shared: Path, served: tuple[str, str], tmp_path: Path) -> None:
    """GLM-4.1V's `attn.qkv` is qkv_proj in vLLM, and gate_up_proj is not what packed_modules_mapping says."""
    form, version = served
    packed = {"qkv_proj": QKV["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
    source = case(shared, "25", tmp_path / "in")
    for patterns in (True, False):  # without the source's pattern, one is made
        if not patterns:
            config = json.loads((source / "config.json").read_text())
            config["quantization_config"]["ignore"] = ["lm_head"]
            (source / "config.json").write_text(json.dumps(config))
            (tmp_path / "out").rename(tmp_path / "out-1")
        with asked(version, convert(source, form), QWEN3_VL, packed) as vllm:
            for name in ("blocks.0.attn.qkv_proj", "blocks.0.mlp.gate_up_proj", "merger.gate_up_proj", "merger.proj"):
                assert not vllm.quantizes(f"visual.{name}")
            assert vllm.quantizes("language_model.model.layers.0.mlp.gate_up_proj")
            assert vllm.quantizes("language_model.model.layers.0.self_attn.qkv_proj")


def test_a_refusal_says_once_what_holds_for_many(shared: Path, tmp_path: Path) -> None:
    """Not a line for each of 69,120 experts."""
    source = case(shared, "32", tmp_path / "in")
    with pytest.raises(PlanError) as caught:
        convert_w4a8.make_plan(source)
    assert len(caught.value.problems) == 6
    (line,) = str(caught.value).splitlines()
    assert line.count("experts.") == 6
    assert line.endswith("pass --group-size requantize to choose new codes (with a loss that is reported)")


# Siblings of these cases.


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def write(
    path: Path, quantized: Mapping[str, tuple[int, int]], plain: Mapping[str, tuple[int, ...]], **config: Any
) -> Path:
    """Write a compressed-tensors checkpoint of these layers and these other tensors."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape).mul(0.02).bfloat16() for name, shape in plain.items()}
    for module, (n, k) in quantized.items():
        tensors[f"{module}.weight_packed"] = words(n, k // 8)
        tensors[f"{module}.weight_scale"] = torch.rand(n, k // 128).mul(0.01).add(0.005).bfloat16()
        tensors[f"{module}.weight_shape"] = torch.tensor([n, k])
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": config.pop("ignore", ["lm_head"]),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    config = {"architectures": ["SomeForCausalLM"], "model_type": "some", "dtype": "bfloat16"} | config
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return path


ATTENTION = {f"{LAYER}.self_attn.{name}": (256, 256) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def plan_of(source: Path, form: str = "lut", **options: Any) -> dict[str, str | None]:
    """Return what becomes of each layer: None where it is converted, else why it is not."""
    return {
        layer.module: layer.dequantize
        for layer in convert_w4a8.make_plan(source, Options(format=form, **options)).layers
    }


@pytest.mark.parametrize("form", FORMATS)
def test_experts_of_128_are_for_our_kernels(form: str, tmp_path: Path) -> None:
    """Stock vLLM serves multiples of 256 only."""
    experts = [f"{LAYER}.mlp.experts.{e}" for e in range(2)]
    quantized = {f"{expert}.{name}": (256, 128) for expert in experts for name in ("gate_proj", "up_proj")}
    quantized |= {f"{expert}.down_proj": (128, 256) for expert in experts}
    found = plan_of(write(tmp_path / "in", quantized, {}), form)
    assert all((reason is None) == (form == "lut") for reason in found.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("quantized", "plain", "kept"),
    [
        pytest.param(
            {f"{LAYER}.self_attn.q_proj": (256, 256), f"{LAYER}.self_attn.k_proj": (256, 256)},
            {f"{LAYER}.self_attn.v_proj.weight": (256, 256)},
            {"q_proj", "k_proj"},
            id="v-in-16-bits",
        ),
        pytest.param(
            {f"{LAYER}.self_attn.q_proj": (256, 256), f"{LAYER}.self_attn.k_proj": (128, 256)}, {}, set(), id="v-is-k"
        ),
        pytest.param(
            {f"{LAYER}.linear_attn.in_proj_b": (32, 256), f"{LAYER}.linear_attn.in_proj_a": (32, 256)},
            {},
            {"in_proj_b", "in_proj_a"},
            id="in_proj_ba-of-64",
        ),
        pytest.param(
            {f"{LAYER}.linear_attn.in_proj_qkv": (256, 256)},
            {f"{LAYER}.linear_attn.in_proj_z.weight": (256, 256)},
            {"in_proj_qkv"},
            id="z-in-16-bits",
        ),
        pytest.param({"model.embed_tokens": (512, 256)}, {}, {"embed_tokens"}, id="embeddings"),
        pytest.param({f"{LAYER}.mlp.shared_expert_gate": (16, 256)}, {}, {"shared_expert_gate"}, id="shared-gate"),
        pytest.param({f"{LAYER}.feed_forward.router": (128, 256)}, {}, {"router"}, id="router"),
        pytest.param({f"{LAYER}.mlp.gate": (128, 256)}, {}, set(), id="a-gate-without-experts"),
        pytest.param(
            {f"{LAYER}.mixer.experts.{e}.{name}_proj": (256, 256) for e in range(2) for name in ("up", "down")},
            {},
            {"up_proj", "down_proj"},
            id="ungated-experts",
        ),
    ],
)
def test_what_is_kept_without_being_asked(
    quantized: dict[str, tuple[int, int]], plain: dict[str, tuple[int, ...]], kept: set[str], form: str, tmp_path: Path
) -> None:
    """As lm_head is: in BF16, with the reason, no error; the rest is converted, and verify agrees."""
    source = write(tmp_path / "in", {f"{LAYER}.mlp.down_proj": (256, 256)} | quantized, plain)
    found = {name.rpartition(".")[2] for name, reason in plan_of(source, form).items() if reason}
    assert found == kept
    assert plan_of(source, form)[f"{LAYER}.mlp.down_proj"] is None
    ignore = convert(source, form)["ignore"]
    assert {name for name in quantized if name.rpartition(".")[2] in kept} - {"model.embed_tokens"} <= set(ignore)
    assert {name.rpartition(".")[2] for name in converted(source)} == (
        {name.rpartition(".")[2] for name in quantized} - kept | {"down_proj"} - (kept & {"down_proj"})
    ) | {"down_proj"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("quantized", "kept", "kept_by_lut"),
    [
        pytest.param({"q_proj": 256, "k_proj": 144}, {"q_proj", "k_proj"}, set(), id="v-is-k"),
        pytest.param(
            {"q_a_proj": 1536, "kv_a_proj_with_mqa": 576}, {"q_a_proj", "kv_a_proj_with_mqa"}, set(), id="mla"
        ),
        pytest.param({"qkv_proj": 384, "o_proj": 320}, {"o_proj"}, set(), id="alone"),
        pytest.param({"in_proj": 6448}, {"in_proj"}, {"in_proj"}, id="granite"),
        pytest.param({"q_proj": 128, "k_proj": 96, "v_proj": 96}, *[{"q_proj", "k_proj", "v_proj"}] * 2, id="narrow"),
    ],
)
def test_widths_that_are_no_multiples_of_128(
    quantized: dict[str, int], kept: set[str], kept_by_lut: set[str], form: str, tmp_path: Path
) -> None:
    """Left to vLLM's kernel they are kept; ours takes them, unless they are narrow."""
    layers = {f"{LAYER}.self_attn.{name}": (n, 256) for name, n in quantized.items()}
    source = write(tmp_path / "in", {f"{LAYER}.mlp.down_proj": (256, 256)} | layers, {})
    expected = kept_by_lut if form == "lut" else kept
    found = {name.rpartition(".")[2] for name, reason in plan_of(source, form).items() if reason}
    assert found == expected
    assert {f"{LAYER}.self_attn.{name}" for name in expected} <= set(convert(source, form)["ignore"])


def test_embeddings_of_a_group_of_their_own(tmp_path: Path) -> None:
    """Some recipes have a config group for `Embedding`."""
    source = write(tmp_path / "in", ATTENTION | {"model.embed_tokens": (512, 256)}, {})
    config = json.loads((source / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["Embedding"]}
    groups["group_0"] = groups["group_0"] | {"targets": [r"re:.*self_attn.*"]}
    (source / "config.json").write_text(json.dumps(config))
    assert plan_of(source)["model.embed_tokens"] == "the kernel does not serve embeddings"
    assert "model.embed_tokens" not in convert(source, "lut")["ignore"]


@pytest.mark.parametrize(
    ("model_type", "kept", "asked_for"),
    [
        ("granitemoehybrid", "mamba.in_proj", "mixer.in_proj"),
        ("falcon_h1", "self_attn.x_proj", "x_proj"),
        ("minimax_m2", "block_sparse_moe.gate", "mlp.gate"),
        ("phimoe", "block_sparse_moe.gate", "mlp.router"),
    ],
)
def test_layers_that_vllm_asks_for_under_another_name(
    model_type: str, kept: str, asked_for: str, served: tuple[str, str], tmp_path: Path
) -> None:
    """Where its model gives a layer another prefix than the attribute that it is loaded into."""
    form, version = served
    quantized = ATTENTION | {f"{LAYER}.{kept}": (272, 256)}
    source = write(tmp_path / "in", quantized, {}, model_type=model_type)
    block = convert(source, form, keep=(f"{LAYER}.{kept}",))
    with asked(version, block, {}, QKV) as vllm:
        assert not vllm.quantizes(f"{LAYER}.{asked_for}")
        assert vllm.quantizes(f"{LAYER}.self_attn.qkv_proj")
        assert vllm.quantizes(f"{LAYER}.qkv_proj")


@pytest.mark.parametrize(
    ("model_type", "kept", "asked_for"),
    [
        ("whisper", "model.encoder.layers.0.fc1", ".encoder.layers.0.layers.mlp.fc1"),
        ("whisper", "model.encoder.layers.0.self_attn.o_proj", ".encoder.layers.0.layers.self_attn.o_proj"),
        ("zamba2", "model.layers.1.mamba.in_proj", "4.mixer.in_proj"),
        ("zamba2", "model.layers.1.mamba_decoder.mamba.in_proj", "4.mixer.in_proj"),
        ("zamba2", "model.layers.1.linear", "4.linear"),
        ("zamba2", "model.layers.1.shared_transformer.self_attn.o_proj", "model.o_proj"),
        ("zamba2", "model.layers.1.shared_transformer.feed_forward.down_proj", "model.feed_forward.down_proj"),
        ("gemma3n_text", "model.altup_projections.0", "model.self_decoder.altup_projections.0"),
        ("gemma3n_text", "model.per_layer_model_projection", "model.self_decoder.per_layer_model_projection"),
    ],
)
def test_layers_that_vllm_asks_for_under_another_prefix(
    model_type: str, kept: str, asked_for: str, served: tuple[str, str], tmp_path: Path
) -> None:
    """Where its model calls the modules around a layer otherwise."""
    form, version = served
    plain = {f"{kept}.weight": (256, 256)}
    source = write(tmp_path / "in", ATTENTION, plain, model_type=model_type, hybrid_layer_ids=[1, 4, 7])
    block = convert(source, form)
    with asked(version, block, {}, QKV) as vllm:
        assert not vllm.quantizes(asked_for)
        assert vllm.quantizes(f"{LAYER}.self_attn.qkv_proj")


def test_experts_whose_prefix_vllm_maps_and_asks_for_unmapped(served: tuple[str, str], tmp_path: Path) -> None:
    """Aria's `hf_to_vllm_mapper` takes `.model` away, which its modules' prefixes have."""
    form, version = served
    attention = {f"model.language_model.{name.removeprefix('model.')}": size for name, size in ATTENTION.items()}
    plain = {f"model.language_model.layers.0.mlp.experts.fc{which}.weight": (4, 256, 256) for which in (1, 2)}
    config = {"num_experts": 4, "architectures": ["AriaForConditionalGeneration"], "model_type": "aria"}
    block = convert(write(tmp_path / "in", attention, plain, **config), form)
    mapper = {"model.language_model.": "language_model.model.", "language_model.model": "language_model"}
    with asked(version, block, mapper, QKV) as vllm:
        assert not vllm.quantizes_experts("language_model.model.layers.0.mlp.experts")
        assert vllm.quantizes("language_model.model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize("form", FORMATS)
def test_experts_whose_names_vllm_maps_away(form: str, tmp_path: Path) -> None:
    """gpt-oss' `hf_to_vllm_mapper` has `down_proj` as a suffix, which spoils a name and no pattern."""
    experts = f"{LAYER}.mlp.experts"
    plain = {f"{experts}.{name}": (4, 256, 256) for name in ("gate_up_proj", "down_proj")}
    source = write(tmp_path / "in", ATTENTION, plain, model_type="gpt_oss", num_local_experts=4)
    patterns = [entry.removeprefix("re:") for entry in convert(source, form)["ignore"] if entry.startswith("re:")]
    assert any(re.match(pattern, f"{experts}.0.down_proj") for pattern in patterns)
    assert not any(re.match(pattern, name) for pattern in patterns for name in ATTENTION)


@pytest.mark.parametrize("form", FORMATS)
def test_layers_without_a_name_stay_quantized(form: str, tmp_path: Path) -> None:
    """MiniCPM3 of vLLM merges nothing of MLA, and asks for q_a_proj without a prefix."""
    q_a, kv_a = f"{LAYER}.self_attn.q_a_proj", f"{LAYER}.self_attn.kv_a_proj_with_mqa"
    source = write(tmp_path / "in", {q_a: (128, 256), kv_a: (192, 256)}, {}, model_type="minicpm3")
    assert {name for name, why in plan_of(source, form).items() if why} == (set() if form == "lut" else {kv_a})
    with pytest.raises(PlanError, match="without a name"):
        plan_of(source, form, keep=(q_a,))


def test_sizes_that_do_not_fit_still_need_the_option(tmp_path: Path) -> None:
    """What the format cannot hold is refused, unless it is kept for another reason anyway."""
    source = write(tmp_path / "in", ATTENTION | {f"{LAYER}.mlp.gate_proj": (40, 256)}, {})
    with pytest.raises(PlanError, match="pass --unsupported dequantize"):
        plan_of(source)
    assert plan_of(source, unsupported="dequantize")[f"{LAYER}.mlp.gate_proj"] == "N = 40 is not a multiple of 16"
    assert plan_of(source, keep=(f"{LAYER}.mlp.gate_up_proj",))[f"{LAYER}.mlp.gate_proj"]


@pytest.mark.parametrize("part", ["vision_tower", "audio_tower", "model.multi_modal_projector", "model.visual"])
@pytest.mark.parametrize(
    "excluded", [["lm_head"], ["lm_head", "re:.*(tower|visual|projector).*"]], ids=["made", "given"]
)
def test_parts_in_which_nothing_is_quantized(
    part: str, excluded: list[str], served: tuple[str, str], tmp_path: Path
) -> None:
    """Whatever vLLM calls the layers inside, and wherever it puts them."""
    form, version = served
    inside = {f"{part}.blocks.0.attn.qkv.weight": (384, 128), f"{part}.linear_1.weight": (256, 128)}
    source = write(tmp_path / "in", ATTENTION, inside, ignore=excluded)
    leaf = part.rpartition(".")[2]
    with asked(version, convert(source, form), {"model.": "language_model.model."}, QKV) as vllm:
        for prefix in ("", "model.", "thinker.", "language_model.model."):
            assert not vllm.quantizes(f"{prefix}{leaf}.blocks.0.attn.qkv_proj")
            assert not vllm.quantizes(f"{prefix}{leaf}.layers.0.fc1")
        assert vllm.quantizes("language_model.model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*\.o_proj$",
        r"re:model\.layers\.0\.self_attn.*",
        "re:.*qkv_proj.*",
        r"re:^language_model\.model\.layers\..*",
    ],
)
def test_a_pattern_that_matches_what_is_quantized_is_not_carried(pattern: str, tmp_path: Path) -> None:
    """By its name, its merged name, or where vLLM puts it; the plan says so."""
    source = write(tmp_path / "in", ATTENTION, {}, ignore=["lm_head", pattern])
    plan = convert_w4a8.make_plan(source)
    assert plan.ignore == ("lm_head",)
    (warning,) = plan.warnings
    assert repr(pattern) in warning
    assert "which is quantized" in warning
    if pattern.endswith("o_proj$"):
        assert " matches model.layers." in warning  # the source's own name, where that matches, too


@pytest.mark.parametrize("pattern", ["re:(", "re:.*(x+x+)+y", r"re:\p{L}+"])
def test_a_pattern_that_is_none_or_takes_for_ever_is_not_carried(pattern: str, tmp_path: Path) -> None:
    """The layers that it means are listed by name."""
    long = {f"{LAYER}.self_attn.{'x' * 40}": (256, 256)}
    source = write(tmp_path / "in", ATTENTION | long, {}, ignore=[pattern])
    plan = convert_w4a8.make_plan(source)
    assert plan.ignore == ("lm_head",)
    assert len(plan.warnings) == 1


def test_awq_names_are_parts_of_names(tmp_path: Path) -> None:
    """`modules_to_not_convert` matches anywhere in a name, as in vLLM's `is_layer_skipped`; not what is quantized."""
    source = write(tmp_path / "in", ATTENTION, {"model.visual.blocks.0.attn.qkv.weight": (384, 128)})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["visual", "lm_head", "proj", "mlp.gate"]
    (source / "config.json").write_text(json.dumps(config))
    plan = convert_w4a8.make_plan(source)
    assert "re:.*visual" in plan.ignore
    assert r"re:.*mlp\.gate" in plan.ignore
    assert r"re:(?:.*\.)?proj(?:\.|$)" in plan.ignore  # a whole part of a name, since q_proj is quantized
    note = "settings that are not known, and are passed over: modules_to_not_convert = a list of 4"  # of this method
    assert plan.warnings == (note,)


def test_negative_rules_of_gptqmodel_are_patterns(tmp_path: Path) -> None:
    """`-:` in `dynamic`."""
    source = write(tmp_path / "in", ATTENTION, {"model.visual.blocks.0.attn.qkv.weight": (384, 128)})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"-:.*visual\..*": {}, r"+:.*o_proj.*": {"bits": 4}}
    (source / "config.json").write_text(json.dumps(config))
    assert convert_w4a8.make_plan(source).ignore[-2:] == (r"re:.*visual\..*", r"re:(?:.*\.)?visual\.")


def test_the_format_has_version_2_only_where_it_holds_patterns(tmp_path: Path) -> None:
    """What older plugins can read stays as it was."""
    assert convert(write(tmp_path / "in", ATTENTION, {}), "lut")["version"] == 1
    other = tmp_path / "other"
    other.mkdir()
    source = write(other / "in", ATTENTION, {"visual.blocks.0.fc1.weight": (128, 128)})
    assert convert(source, "lut")["version"] == 2


def test_the_plan_names_all_that_stays_in_16_bits(shared: Path, tmp_path: Path) -> None:
    """Every byte of the output is W4A8 or of a kind that the plan names."""
    for number in ("01", "16", "20", "24", "25"):
        plan = convert_w4a8.make_plan(case(shared, number, tmp_path / number))
        w4a8 = sum(spec.nbytes for layer in plan.converted for spec in layer.specs)
        assert w4a8 + sum(kind.nbytes for kind in plan.sixteen_bits) == plan.nbytes_out
        count = sum(kind.count for kind in plan.sixteen_bits if kind.of_source)
        assert count == len(plan.tensors)


# --keep.


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ((f"{LAYER}.self_attn.o_proj",), {"o_proj"}),
        ((f"{LAYER}.self_attn.q_proj",), {"q_proj", "k_proj", "v_proj"}),
        ((f"{LAYER}.self_attn.qkv_proj",), {"q_proj", "k_proj", "v_proj"}),
        ((r"re:.*\.self_attn\.", f"{LAYER}.mlp.down_proj"), {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_layers_to_keep(patterns: tuple[str, ...], kept: set[str], form: str, tmp_path: Path) -> None:
    """By name, by pattern, or by vLLM's name of what it merges; with everything that is merged with them."""
    quantized = ATTENTION | {f"{LAYER}.mlp.{name}": (256, 256) for name in ("gate_proj", "up_proj", "down_proj")}
    source = write(tmp_path / "in", quantized, {})
    block = convert(source, form, keep=patterns)
    assert {name.rpartition(".")[2] for name in converted(source)} == {
        name.rpartition(".")[2] for name in quantized
    } - kept
    assert {entry.rpartition(".")[2] for entry in block["ignore"]} == kept | {"lm_head"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"kept by --keep {patterns[0]}" in card


def test_a_pattern_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    """It is a mistake, and the layer would be converted."""
    source = write(tmp_path / "in", ATTENTION, {"lm_head.weight": (512, 256)})
    with pytest.raises(PlanError, match=r"--keep model\.layers\.0\.q_proj: matches no layer"):
        plan_of(source, keep=("model.layers.0.q_proj",))
    assert not any(plan_of(source, keep=("lm_head",)).values())  # which is in 16 bits as it is


def test_another_choice_is_another_conversion(tmp_path: Path) -> None:
    """`--resume` does not continue with other layers kept."""
    checkpoint = convert_w4a8.open_checkpoint(write(tmp_path / "in", ATTENTION, {}))
    plain, kept = (fingerprint(checkpoint, Options(keep=keep)) for keep in ((), (f"{LAYER}.self_attn.o_proj",)))
    assert {name for name in plain if plain[name] != kept[name]} == {"--keep"}


def test_keep_on_the_command_line(tmp_path: Path) -> None:
    """It can be given again; what is no pattern is wrong usage, and what matches nothing a refusal."""
    source = write(tmp_path / "in", ATTENTION, {})
    command = ["convert", str(source), str(tmp_path / "out"), "--dry-run", "--json"]
    o_proj, q_proj = f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.q_proj"
    result = CliRunner().invoke(main, [*command, "--keep", o_proj, "--keep", r"re:.*\.q_proj"])
    document = json.loads(result.stdout)
    assert document["dequantize"][o_proj] == f"kept by --keep {o_proj}"
    assert set(document["dequantize"]) == ATTENTION.keys()
    kinds = {kind["kind"]: kind for kind in document["in_16_bits"]}
    assert kinds["served together with a layer that stays in 16 bits"] == {
        "kind": "served together with a layer that stays in 16 bits",
        "quantized_in_source": True,
        "count": 2,
        "bytes": 2 * 256 * 256 * 2,
        "first": [f"{LAYER}.self_attn.k_proj", f"{LAYER}.self_attn.v_proj"],
    }
    assert q_proj in document["dequantize"]
    wrong = CliRunner().invoke(main, [*command, "--keep", "re:("])
    assert wrong.exit_code == 2
    assert "is not a regular expression" in wrong.stderr
    nothing = CliRunner().invoke(main, [*command, "--keep", "re:.*gate"])
    assert nothing.exit_code == 1
    assert json.loads(nothing.stdout)["problems"][0]["subject"] == "--keep re:.*gate"


def test_verify_reads_the_list(tmp_path: Path) -> None:
    """An output whose `ignore` covers what is quantized, or misses what is not, is not right."""
    source = write(
        tmp_path / "in",
        ATTENTION,
        {"visual.blocks.0.fc1.weight": (128, 128), f"{LAYER}.mlp.experts.down_proj": (4, 256, 256)},
    )
    convert(source, "compressed-tensors")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    right = config["quantization_config"]["ignore"]
    without = [entry for entry in right if "experts" not in entry]
    for ignore, reason in (
        ([*right, r"re:.*qkv_proj"], "covers what is quantized"),
        ([*right, r"re:language_model\.model\.layers\.0\.self_attn\.o_proj"], "covers what is quantized"),
        ([*right, f"{LAYER}.self_attn.o_proj"], "covers what is quantized"),
        ([entry for entry in right if "visual" not in entry], "does not list the modules that are not quantized"),
        (without, f"does not list {LAYER}.mlp.experts"),
        ([*right, "re:("], "holds what is not a regular expression"),
        ("lm_head", "is not a list of names"),
    ):
        config["quantization_config"]["ignore"] = ignore
        path.write_text(json.dumps(config))
        problems = convert_w4a8.verify(tmp_path / "out", source).problems
        assert [problem.subject for problem in problems] == ["quantization_config: ignore"], ignore
        assert reason in problems[0].reason


def test_many_problems_of_one_kind_are_one_line() -> None:
    """Of experts, and more than twenty others; each kind once, in the order of the first."""
    dense = [Problem(f"layers.{i}.o_proj", "is bad", "mend it") for i in range(21)]
    experts = [Problem(f"layers.0.experts.{i}.up_proj", "is bad", "mend it") for i in range(2)]
    few = [Problem(f"layers.{i}.q_proj", "is worse", "mend it") for i in range(20)]
    groups = grouped([experts[0], *dense, *few, experts[1]])
    assert [group.count for group in groups] == [2, 21, *[1] * 20]
    assert groups[0].as_dict() == experts[0].as_dict() | {
        "subjects": [problem.subject for problem in experts],
        "count": 2,
    }
    assert str(groups[1]).endswith("layers.5.o_proj and 15 more: is bad; mend it")
    assert groups[2].as_dict() == few[0].as_dict()


def test_asked_is_a_witness(served: tuple[str, str]) -> None:
    """The questions of this file can be answered either way."""
    form, version = served
    method = "w4a8_lut" if form == "lut" else form
    block = {"quant_method": method, "version": 2, "layout": "cutlass_sm90_16x32", "bits": 4, "group_size": 128}
    block |= {"tables": "scale", "ignore": ["a.experts.0.gate_proj", "a.b", "re:c"]}
    with asked(version, block, {}, {}) as vllm:
        assert isinstance(vllm, Asked)
        assert not vllm.quantizes("a.b")
        assert not vllm.quantizes("cd")
        assert vllm.quantizes("a.c")
        with pytest.raises(ValueError, match="quantiz"):
            vllm.quantizes_experts("a.experts")
        assert vllm.quantizes_experts("b.experts")
