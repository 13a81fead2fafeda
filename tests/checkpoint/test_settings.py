"""The settings of a quantization are found wherever a tool puts them, and never in two places that differ."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.checkpoint.settings import find_settings, where_looked, without_settings
from convert_w4a8.errors import ConvertError

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64}
PACKED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top": ({"quantization_config": GPTQ}, GPTQ, "quantization_config"),
    "llm_config": ({"llm_config": {"quantization_config": AWQ}}, AWQ, "llm_config.quantization_config"),
    "text_config": ({"text_config": {"quantization_config": AWQ}}, AWQ, "text_config.quantization_config"),
    "language_config": ({"language_config": {"quantization_config": AWQ}}, AWQ, "language_config.quantization_config"),
    "two-levels": (
        {"thinker_config": {"text_config": {"quantization_config": GPTQ}}},
        GPTQ,
        "thinker_config.text_config.quantization_config",
    ),
    "in-a-list": ({"parts": [{}, {"quantization_config": GPTQ}]}, GPTQ, "parts[1].quantization_config"),
    "null-at-the-top": (
        {"quantization_config": None, "text_config": {"quantization_config": GPTQ}},
        GPTQ,
        "text_config.quantization_config",
    ),
    "empty-at-the-top": (
        {"quantization_config": {}, "text_config": {"quantization_config": GPTQ}},
        GPTQ,
        "text_config.quantization_config",
    ),
    "compression_config": ({"compression_config": PACKED}, PACKED, "compression_config"),
    "compression_config-in-a-part": (
        {"text_config": {"compression_config": PACKED}},
        PACKED,
        "text_config.compression_config",
    ),
    "compression_config-of-sparseml": (
        {"compression_config": {**PACKED, "quant_method": "sparseml"}},
        PACKED,
        "compression_config",
    ),
    "compression_config-without-method": (
        {"compression_config": {"format": "pack-quantized"}},
        PACKED,
        "compression_config",
    ),
    "method-in-capitals": ({"quantization_config": {**AWQ, "quant_method": "AWQ"}}, AWQ, "quantization_config"),
    "twice-the-same": (
        {"quantization_config": GPTQ, "text_config": {"quantization_config": {**GPTQ, "dynamic": None}}},
        GPTQ,
        "quantization_config",
    ),
    "sparsity-beside-it": (
        {"quantization_config": PACKED, "sparsity_config": {"format": "sparse-bitmask"}},
        {**PACKED, "sparsity_config": {"format": "sparse-bitmask"}},
        "quantization_config",
    ),
}


@pytest.mark.parametrize(("config", "block", "place"), CONFIGS.values(), ids=CONFIGS)
def test_settings_in_config_json(config: dict[str, Any], block: dict[str, Any], place: str, tmp_path: Path) -> None:
    """At the top or in any part, under today's name or that of 2024; the place is told."""
    found = find_settings(tmp_path, config)
    assert found.block == block
    assert found.place == f"config.json: {place}"


FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "autogptq": ("quantize_config.json", {"bits": 4, "group_size": 128}, GPTQ),
    "autogptq-marlin": (
        "quantize_config.json",
        {"bits": 4, "group_size": 128, "is_marlin_format": True, "quant_method": None},
        {**GPTQ, "is_marlin_format": True},
    ),
    "gptqmodel-of-awq": ("quantize_config.json", AWQ, AWQ),
    "autoawq": (
        "quant_config.json",
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM", "quant_method": "awq"},
    ),
    "quant_config-of-another-tool": ("quant_config.json", {"weights": 4}, None),
    "autoround": (
        "quantization_config.json",
        {"quant_method": "auto-round", "bits": 4},
        {"quant_method": "auto-round", "bits": 4},
    ),
    "quantization_config-without-method": ("quantization_config.json", {"bits": 4}, None),
    "modelopt": (
        "hf_quant_config.json",
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}},
        {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "W4A16_AWQ"},
            "quant_method": "modelopt",
        },
    ),
}


@pytest.mark.parametrize(("name", "content", "block"), FILES.values(), ids=FILES)
def test_settings_in_files(name: str, content: dict[str, Any], block: dict[str, Any] | None, tmp_path: Path) -> None:
    """Each tool's own file; config.json wins over all of them; a file that says no method is named."""
    (tmp_path / name).write_text(json.dumps(content))
    found = find_settings(tmp_path, {})
    assert found.block == (block or {})
    assert found.place == (name if block else "")
    assert find_settings(tmp_path, {"llm_config": {"quantization_config": PACKED}}).block == PACKED
    assert f"; of {name} the meaning is not known" in where_looked(tmp_path, {})


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": GPTQ, "text_config": {"quantization_config": {**GPTQ, "bits": 8}}},
        {"a": {"quantization_config": GPTQ}, "b": {"quantization_config": AWQ}},
        {"quantization_config": GPTQ, "compression_config": PACKED},
    ],
)
def test_two_settings_that_differ_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    """Both places are named."""
    with pytest.raises(ConvertError, match=r"has two settings of its quantization that differ: ") as caught:
        find_settings(tmp_path, config)
    assert caught.value.problem.reason.count("config.json: ") == 2


def test_two_files_that_differ_are_refused(tmp_path: Path) -> None:
    """As two repositories that were mixed."""
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4}))
    with pytest.raises(ConvertError, match=r"differ: quantize_config.json, and quant_config.json"):
        find_settings(tmp_path, {})


@pytest.mark.parametrize("value", ["int4", 4, [], [GPTQ], True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_that_are_no_object_are_refused(value: object, key: str, tmp_path: Path) -> None:
    """In a part of config.json too, by its place."""
    with pytest.raises(ConvertError, match=rf"config.json: llm_config.{key}: is not a JSON object"):
        find_settings(tmp_path, {"llm_config": {key: value}})


@pytest.mark.parametrize("content", ["[]", "{", "4"])
def test_files_that_are_no_settings_are_refused(content: str, tmp_path: Path) -> None:
    """By name."""
    (tmp_path / "quant_config.json").write_text(content)
    with pytest.raises(ConvertError, match=r"quant_config.json: (does not hold a JSON object|is not valid JSON)"):
        find_settings(tmp_path, {})


keys = st.sampled_from(["quantization_config", "compression_config", "sparsity_config", "text_config", "a", "dtype"])
values = st.recursive(st.none() | st.integers() | st.just("x"), lambda v: st.lists(v) | st.dictionaries(keys, v))


@given(st.dictionaries(keys, values))
def test_no_settings_stay(config: dict[str, Any]) -> None:
    """At whatever depth; everything else stays as it is."""
    text = json.dumps(without_settings(config))
    assert "quantization_config" not in text
    assert "compression_config" not in text
    assert "sparsity_config" not in text
    if not {"quantization_config", "compression_config", "sparsity_config"} & set(json.dumps(config).split('"')):
        assert without_settings(config) == config
