"""Configurations that lie: every one is a problem with its name and value, never another exception."""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import REMOVE, Tensors, edit_json, edit_quantization, edit_tensors, write_case
from layer_specs import find_layers

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.sources import find_source
from convert_w4a8.sources.checks import resolve_groups, setting

Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
FIRST = "model.layers.0.mlp.down_proj"


# Configurations that lie. Every one must be a Problem or a ConvertError, never another exception.


LIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gptq-bits-8": ("gptq-v1", {"bits": 8}, Q_PROJ, "has 8 bits"),
    "gptq-bits-text": ("gptq-v1", {"bits": "4"}, Q_PROJ, "has '4' bits, which is no number"),
    "gptq-bits-null": ("gptq-v1", {"bits": None}, Q_PROJ, "has None bits"),
    "gptq-bits-list": ("gptq-v1", {"bits": [4]}, Q_PROJ, "has [4] bits"),
    "gptq-group-0": ("gptq-v1", {"group_size": 0}, Q_PROJ, "group_size 0 does not divide in_features = 256"),
    "gptq-group-minus-7": ("gptq-v1", {"group_size": -7}, Q_PROJ, "group_size -7 does not divide"),
    "gptq-group-100": ("gptq-v1", {"group_size": 100}, Q_PROJ, "group_size 100 does not divide in_features = 256"),
    "gptq-group-huge": ("gptq-v1", {"group_size": 10**30}, Q_PROJ, "does not divide in_features = 256"),
    "gptq-group-text": ("gptq-v1", {"group_size": "128"}, "quantization_config: group_size", "is '128', not int"),
    "gptq-group-inf": ("gptq-v1", {"group_size": float("inf")}, "quantization_config: group_size", "is inf, not int"),
    "gptq-group-float": ("gptq-v1", {"group_size": 128.0}, "quantization_config: group_size", "is 128.0, not int"),
    "gptq-group-true": ("gptq-v1", {"group_size": True}, "quantization_config: group_size", "is True, not int"),
    "gptq-group-of-another": (
        "gptq-v1",
        {"group_size": 64},
        f"{Q_PROJ}.qzeros",
        "is I32 [2, 32], not I32 [4, 32] = [K/group_size, N/8]",
    ),
    "gptq-marlin": ("gptq-v1", {"checkpoint_format": "marlin"}, "quantization_config: checkpoint_format", "'marlin'"),
    "gptq-format-list": (
        "gptq-v1",
        {"checkpoint_format": ["gptq"]},
        "quantization_config: checkpoint_format",
        "['gptq']",
    ),
    "gptq-sym-text": ("gptq-v1", {"sym": "yes"}, "quantization_config: sym", "is 'yes', not bool"),
    "gptq-desc-act-number": ("gptq-v1", {"desc_act": 1}, "quantization_config: desc_act", "is 1, not bool"),
    "gptq-dynamic-list": ("gptq-v1", {"dynamic": ["x"]}, "quantization_config: dynamic", "is ['x'], not dict"),
    "gptq-dynamic-regex": (
        "gptq-v1",
        {"dynamic": {"+:(": {"bits": 4}}},
        "quantization_config: dynamic",
        "'(' is not a regular expression",
    ),
    "gptq-dynamic-number": (
        "gptq-v1",
        {"dynamic": {".*": 4}},
        "quantization_config: dynamic: .*",
        "is 4, not dict",
    ),
    "gptq-dynamic-bits": ("gptq-v1", {"dynamic": {r".*q_proj": {"bits": 8}}}, Q_PROJ, "has 8 bits"),
    "gptq-dynamic-sym": (
        "gptq-v1",
        {"dynamic": {r".*": {"sym": 1}}},
        "quantization_config: sym",
        "is 1, not bool",
    ),
    "awq-bits-3": ("awq-zero-points", {"bits": 3}, Q_PROJ, "has 3 bits"),
    "awq-group-0": ("awq-zero-points", {"group_size": 0}, Q_PROJ, "group_size 0 does not divide"),
    "awq-group-text": ("awq-zero-points", {"group_size": "128"}, "quantization_config: group_size", "not int"),
    "awq-group-of-another": (
        "awq-zero-points",
        {"group_size": 256},
        f"{Q_PROJ}.qzeros",
        "is I32 [2, 32], not I32 [1, 32] = [K/group_size, N/8]",
    ),
    "awq-gemv": ("awq-zero-points", {"version": "gemv"}, "quantization_config: version", "is 'gemv'"),
    "awq-gemv-fast": ("awq-zero-points", {"version": "GEMV_FAST"}, "quantization_config: version", "'gemv_fast'"),
    "awq-marlin": ("awq-zero-points", {"version": "marlin"}, "quantization_config: version", "is 'marlin'"),
    "awq-version-list": ("awq-zero-points", {"version": ["gemm"]}, "quantization_config: version", "gemm"),
    "awq-zero-point-text": ("awq-zero-points", {"zero_point": "no"}, "quantization_config: zero_point", "not bool"),
    "ct-groups-list": ("ct-w4a16", {"config_groups": [1]}, "quantization_config: config_groups", "not dict"),
    "ct-groups-empty": ("ct-w4a16", {"config_groups": {}}, Q_PROJ, "no config group targets it"),
    "ct-groups-absent": ("ct-w4a16", {"config_groups": REMOVE}, Q_PROJ, "no config group targets it"),
    "ct-groups-null": ("ct-w4a16", {"config_groups": {"group_0": None}}, Q_PROJ, "no config group targets it"),
    "ct-transform": (
        "ct-w4a16",
        {"transform_config": {"config_groups": {"R1": {}}}},
        "quantization_config: transform_config",
        "rotations",
    ),
    "ct-sparse": (
        "ct-w4a16",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "quantization_config: sparsity_config",
        "sparse",
    ),
}

CT_WEIGHTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "bits-8": ({"num_bits": 8}, f"{FIRST} and 13 more", "INT8 weights are neither converted nor carried over"),
    "bits-absent": ({"num_bits": REMOVE}, Q_PROJ, "has None bits"),
    "float": ({"type": "float"}, f"{FIRST} and 13 more", "FP4 weights are neither converted nor carried over"),
    "float-3": ({"type": "float", "num_bits": 3}, Q_PROJ, "has 3 bits"),
    "type-text": ({"type": "uint"}, Q_PROJ, "has uint weights, not INT4"),
    "tensor-group": ({"strategy": "tensor_group"}, Q_PROJ, "strategy 'tensor_group' is not supported"),
    "block": ({"strategy": "block"}, Q_PROJ, "strategy 'block' is not supported"),
    "strategy-list": ({"strategy": ["group"]}, Q_PROJ, "strategy ['group'] is not supported"),
    "group-0": ({"group_size": 0}, Q_PROJ, "group_size 0 does not divide"),
    "group-text": ({"group_size": "128"}, "group_size", "is '128', not int"),
    "group-inf": ({"group_size": float("inf")}, "group_size", "is inf, not int"),
    "group-of-another": (
        {"group_size": 64},
        f"{Q_PROJ}.weight_scale",
        "is BF16 [256, 2], not F16 or BF16 or F32 [256, 4]",
    ),
    "channel": ({"strategy": "channel"}, f"{Q_PROJ}.weight_scale", "is BF16 [256, 2], not F16 or BF16 or F32 [256, 1]"),
    "asymmetric": ({"symmetric": False}, f"{Q_PROJ}.weight_zero_point", "is missing"),
}

CT_TARGETS: dict[str, tuple[Any, str, str]] = {
    "nothing": ([], Q_PROJ, "no config group targets it"),
    "null": (None, Q_PROJ, "no config group targets it"),
    "number": (7, "targets", "is 7, not list"),
    "text": ("Linear", "targets", "is 'Linear', not list"),
    "regex": (["re:("], "targets", "'(' is not a regular expression"),
    "other-class": (["Conv2d"], Q_PROJ, "no config group targets it"),
}


def assert_refused(path: Path, subject: str, reason: str) -> None:
    """Assert that finding the layers gives or raises a problem of this subject and reason, and no other exception."""
    try:
        found = find_layers(path)[1]
    except ConvertError as error:
        found = [error.problem]
    hits = [problem for problem in found if problem.subject.endswith(subject)]
    assert hits, found
    assert reason in hits[0].reason
    assert hits[0].remedy
    assert "\n" not in str(hits[0])


@pytest.mark.parametrize(("case", "changes", "subject", "reason"), LIES.values(), ids=LIES)
def test_configuration_that_lies_is_refused(
    case: str, changes: dict[str, Any], subject: str, reason: str, tmp_path: Path
) -> None:
    """A setting that cannot be, or that the tensors contradict, is refused with its name and its value."""
    written = write_case(case, tmp_path / "in")
    edit_quantization(written.path, **changes)
    assert_refused(written.path, subject, reason)


@pytest.mark.parametrize(("changes", "subject", "reason"), CT_WEIGHTS.values(), ids=CT_WEIGHTS)
def test_config_group_that_lies_is_refused(changes: dict[str, Any], subject: str, reason: str, tmp_path: Path) -> None:
    """The same within a config group of compressed-tensors."""
    written = write_case("ct-w4a16", tmp_path / "in")
    place = ("quantization_config", "config_groups", "group_0", "weights")
    edit_json(written.path / "config.json", *place, **changes)
    assert_refused(written.path, subject, reason)


@pytest.mark.parametrize(("targets", "subject", "reason"), CT_TARGETS.values(), ids=CT_TARGETS)
def test_targets_that_name_no_layer_are_refused(targets: object, subject: str, reason: str, tmp_path: Path) -> None:
    """Targets of another type, or that match nothing, are refused."""
    written = write_case("ct-w4a16", tmp_path / "in")
    edit_json(written.path / "config.json", "quantization_config", "config_groups", "group_0", targets=targets)
    assert_refused(written.path, subject, reason)


def test_the_most_specific_target_wins(tmp_path: Path) -> None:
    """A module's name goes before a pattern, a pattern before a class, whatever the order of the groups."""
    written = write_case("ct-w4a16", tmp_path / "in")
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "b": {"targets": [Q_PROJ], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}},
        "c": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 3}},
    }
    edit_quantization(written.path, config_groups=groups)
    specs, problems = find_layers(written.path)
    assert [spec.name for spec in specs] == [Q_PROJ]
    reasons = {problem.subject: problem.reason for problem in problems}
    assert reasons[K_PROJ].startswith("has 3 bits")
    assert reasons[f"{FIRST} and 5 more"].startswith("INT8 weights")


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", None, 7, ["gptq"], "w4a8_lut"])
def test_unknown_methods_are_refused(method: object, tmp_path: Path) -> None:
    """A quantization of another kind is one line that names it and lists what is supported."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_quantization(written.path, quant_method=method)
    with pytest.raises(ConvertError) as caught:
        find_source(open_checkpoint(written.path))
    assert caught.value.problem.reason == f"{method!r} is not supported"
    expected = "supported are auto-round, awq, compressed-tensors, gptq, w4afp8, with 4-bit weights"
    assert caught.value.problem.remedy == expected


NOWHERE = (
    "no quantization_config or compression_config in config.json or a part of it, no quantize_config.json,"
    " quant_config.json, quantization_config.json, hf_quant_config.json"
)


def test_quantized_tensors_without_settings_are_called_so(tmp_path: Path) -> None:
    """That it is not quantized would be false; what may hold the settings is named."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_json(written.path / "config.json", quantization_config=REMOVE)

    def reason() -> str:
        with pytest.raises(ConvertError) as caught:
            find_source(open_checkpoint(written.path))
        assert caught.value.problem.remedy == "add its quantization_config to config.json"
        return caught.value.problem.reason

    start = "is quantized (model.layers.0.mlp.down_proj.qweight), but does not say how: "
    assert reason() == start + NOWHERE
    edit_json(
        written.path / "config.json", quantization={"bits": 4}, text_config={"quant": {"a": 1}, "quant_off": None}
    )
    (written.path / "recipe.yaml").write_text("x")
    (written.path / "quant_config.json").write_text('{"weight_bits": 4}')
    assert reason() == start + NOWHERE.replace(" quant_config.json,", "") + (
        "; of config.json: quantization, config.json: text_config.quant, quant_config.json, recipe.yaml"
        " the meaning is not known"
    )


def test_a_checkpoint_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    """No configuration of a quantization is another thing than an unknown one, and is said so."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_json(written.path / "config.json", quantization_config=REMOVE)
    edit_tensors(written.path, lambda tensors: [tensors.pop(name) for name in [*tensors] if ".mlp." in name])
    edit_tensors(written.path, lambda tensors: [tensors.pop(name) for name in [*tensors] if ".self_attn." in name])
    with pytest.raises(ConvertError) as caught:
        find_source(open_checkpoint(written.path))
    assert caught.value.problem.subject == str(tmp_path / "in")
    reason = f"is not quantized: {NOWHERE}"
    assert caught.value.problem.reason == reason
    known = "auto-round, awq, compressed-tensors, gptq, w4afp8"
    assert caught.value.problem.remedy == f"quantize it (w4a8 quantize), or give a W4A16 checkpoint ({known})"


def test_all_problems_are_found_at_once(tmp_path: Path) -> None:
    """One damaged layer does not hide the next, nor the healthy ones."""
    written = write_case("gptq-v1", tmp_path / "in")

    def damage(t: Tensors) -> None:
        del t[f"{Q_PROJ}.qzeros"]
        t[f"{K_PROJ}.scales"] = t[f"{K_PROJ}.scales"].double()
        t[f"{DOWN}.g_idx"] = t[f"{DOWN}.g_idx"][:-1]

    edit_tensors(written.path, damage)
    specs, problems = find_layers(written.path)
    assert [str(problem) for problem in problems] == [
        f"{K_PROJ}.scales: is F64 [2, 128], not F16 or BF16 or F32 [2, 128] = [K/group_size, N]; "
        "check that the configuration belongs to this checkpoint",
        f"{Q_PROJ}.qzeros: is missing; download or write the checkpoint again",
        f"{DOWN}.g_idx: is I32 [511], not I32 [512] = [K]; check that the configuration belongs to this checkpoint",
    ]
    assert {spec.name for spec in specs} == written.layers.keys() - {Q_PROJ, K_PROJ, DOWN}


def test_activation_order_without_g_idx_is_refused(tmp_path: Path) -> None:
    """With desc_act, g_idx is part of the meaning of the codes."""
    written = write_case("gptq-desc-act", tmp_path / "in")
    edit_tensors(written.path, lambda t: t.pop(f"{Q_PROJ}.g_idx"))
    assert_refused(written.path, f"{Q_PROJ}.g_idx", "is missing")


def test_int8_codes_without_a_scale_are_refused(tmp_path: Path) -> None:
    """A layer that lost its scale is not taken for one that was never quantized."""
    written = write_case("ct-int8-storage", tmp_path / "in")
    edit_tensors(written.path, lambda t: t.pop(f"{Q_PROJ}.weight_scale"))
    assert_refused(written.path, f"{Q_PROJ}.weight_scale", "is missing")


def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path) -> None:
    """A regular expression with nested repetitions ends the search for layers at once."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_quantization(written.path, dynamic={"+:(([a-z_.0-9]+)+)+!": {"bits": 4}})
    with pytest.raises(PlanError, match=r"quantization_config: dynamic: .* takes too long to match"):
        find_layers(written.path)


@pytest.mark.parametrize("value", [None, 3])
def test_settings_of_the_right_type_pass(value: int | None) -> None:
    """Null and absence are the default; a number is itself."""
    assert setting({"a": value}, "a", int, 5) == (5 if value is None else 3)
    assert setting({}, "a", int, 5) == 5
    assert setting({"a": False}, "a", bool, default=True) is False


@pytest.mark.parametrize("group_size", [-1, 264, 265, 1024, 10**30])
def test_a_group_is_no_larger_than_the_layer(group_size: int) -> None:
    """Where the last group may be short, one that is larger than K, of whatever size, is all of it."""
    assert resolve_groups("module", group_size, 264) == (264, 1)
