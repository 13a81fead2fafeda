"""AutoRound's own format: its packings, its names over the years, what is different for single layers."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_edits import REMOVE, edit_quantization, edit_tensors, write_case
from factories import Case
from factories.formats import AutoRound
from factories.layers import Layer, Scheme
from layer_specs import find_layers, opened

from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.linear import W4Linear

Q_PROJ = "model.layers.0.self_attn.q_proj"
PACKED_BY_AUTO_ROUND = {
    ("auto_round:auto_gptq", True): "b0e7920aba8da6c002860cf2960747a1",
    ("auto_round", True): "189d128eba04e2bd1e29bbc21a9e9d77",
    ("auto_round:auto_awq", True): "d9779e68ebda6c1d9c35a58edf6e6d5a",
    ("auto_round:auto_gptq", False): "3d5c79ce5bd15e8ac21c466ca7ade9c4",
    ("auto_round", False): "84e884153c80b945ba82bd996cc1c41b",
    ("auto_round:auto_awq", False): "c646491d0d97f755b2c8c206167ef29c",
}
"""SHA-256, the first half, of qweight, qzeros and scales of `small_layer` as auto-round 0.16.1 packs it on a CPU."""


def small_layer(*, symmetric: bool) -> Layer:
    """Return a layer [32, 64] in groups of 32, half of its scales negative, made by formulas."""
    n, k, g = np.arange(32), np.arange(64), np.arange(2)[:, None]
    codes = ((7 * n[:, None] + 5 * k + n[:, None] * k) % 16).astype(np.uint8)
    sign = np.where((g + n) % 2, -1.0, 1.0)
    scales = torch.from_numpy((1.0 + (3 * g + n) % 5) / 64 * sign).half()
    zeros = np.full((2, 32), 8) if symmetric else (3 * g + n) % 15 + 1
    return Layer(Scheme(32, symmetric), codes, zeros.astype(np.uint8), scales, (k // 32).astype(np.int32))


@pytest.mark.parametrize(("packing", "symmetric"), PACKED_BY_AUTO_ROUND)
def test_the_factory_packs_as_auto_round_does(packing: str, symmetric: bool) -> None:
    """Byte for byte, so that what these tests read is what the tool writes."""
    tensors = AutoRound(packing=packing).tensors("m", small_layer(symmetric=symmetric))
    raw = b"".join(tensors[f"m.{role}"].contiguous().numpy().tobytes() for role in ("qweight", "qzeros", "scales"))
    assert hashlib.sha256(raw).hexdigest()[:32] == PACKED_BY_AUTO_ROUND[packing, symmetric]


SPELLINGS: dict[str, dict[str, Any]] = {
    "0.16": {},
    "underscore": {"quant_method": "auto_round"},
    "one-word": {"quant_method": "autoround"},
    "intel": {"quant_method": "intel/auto-round"},
    "capitals": {"quant_method": "Auto-Round"},
    "absent": {"packing_format": REMOVE},
    "absent-with-a-kernel": {"packing_format": REMOVE, "backend": "gptq:marlin"},
    "absent-auto": {"packing_format": REMOVE, "backend": "auto"},
    "0.4": {"packing_format": REMOVE, "backend": "auto_round:gptq:exllamav2"},
    "0.3": {"packing_format": REMOVE, "backend": "autoround:gptq:triton"},
    "0.2": {"packing_format": REMOVE, "backend": "gptq:exllamav2"},
    "0.5": {"packing_format": "auto_round:auto_gptq:exllamav2"},
}


@pytest.mark.parametrize("values", SPELLINGS.values(), ids=SPELLINGS)
def test_names_of_all_versions(values: dict[str, Any], tmp_path: Path) -> None:
    """The same tensors, under every name that a version of the tool gives to method and packing."""
    written = write_case("auto-round", tmp_path / "in")
    edit_quantization(written.path, **values)
    _, source, specs = opened(written.path)
    assert source.NAME == "auto-round"
    assert {spec.name for spec in specs} == written.layers.keys()
    assert {spec.zero_offset for spec in specs} == {1}
    spec = next(spec for spec in specs if spec.name == Q_PROJ)
    w = source.read_layer(spec, read_tensor)
    assert isinstance(w, W4Linear)
    assert w.is_kernel_ready
    assert np.array_equal(dequantize(w).double().numpy(), written.layers[Q_PROJ].weight)


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "auto_round:triton"])
def test_zero_points_as_they_are(packing: str, tmp_path: Path) -> None:
    """The packings whose zero-points lack nothing, one of them called after a kernel by versions before 0.5."""
    written = write_case("auto-round-plain-asymmetric", tmp_path / "in")
    edit_quantization(written.path, packing_format=packing)
    _, source, specs = opened(written.path)
    for spec in specs:
        zeros = source.read_zeros(spec, read_tensor)
        assert zeros is not None
        assert np.array_equal(zeros.numpy(), written.layers[spec.name].zeros)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "marlin": ({"packing_format": "auto_round:marlin"}, "packing_format", "which is not read"),
    "mxfp": ({"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp"}, "packing_format", "not read"),
    "mlx": ({"packing_format": "auto_round:mlx"}, "packing_format", "not read"),
    "fp8": ({"packing_format": "auto_round:fp8", "data_type": "fp"}, "packing_format", "not read"),
    "list": ({"packing_format": ["auto_round"]}, "packing_format", "not read"),
    "data-type": ({"data_type": "mx_int"}, "data_type", "only integers of 4 bits"),
    "w4a8": ({"act_bits": 8, "act_data_type": "fp8"}, "act_bits", "activations are quantized"),
    "rotated": ({"rotation_config": {"block_size": 32}}, "rotation_config", "rotations"),
    "double": ({"super_bits": 6, "super_group_size": 8}, "super_bits", "scales are quantized themselves"),
    "extra-data-type": (
        {"extra_config": {"o_proj": {"bits": 8, "data_type": "fp"}}},
        "extra_config: o_proj: data_type",
        "only integers",
    ),
    "extra-list": ({"extra_config": ["o_proj"]}, "extra_config", "is ['o_proj'], not dict"),
    "extra-entry": ({"extra_config": {"o_proj": 4}}, "extra_config: o_proj", "is 4, not dict"),
    "sym-text": ({"sym": "yes"}, "sym", "is 'yes', not bool"),
    "pattern": ({"extra_config": {"(": {"bits": 4}}}, "extra_config", "is not a regular expression"),
}


@pytest.mark.parametrize(("values", "key", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused(values: dict[str, Any], key: str, reason: str, tmp_path: Path) -> None:
    """Other layouts and other numbers are refused by the setting that says so, once."""
    written = write_case("auto-round", tmp_path / "in")
    edit_quantization(written.path, **values)
    problems = set(find_layers(written.path)[1])
    hits = [problem for problem in problems if problem.subject == f"quantization_config: {key}"]
    assert len(hits) == 1, problems
    assert reason in hits[0].reason
    assert hits[0].remedy


def test_layers_of_16_bits_may_have_any_type(tmp_path: Path) -> None:
    """What extra_config says of a layer that is not quantized is no reason to refuse the others."""
    written = write_case("auto-round", tmp_path / "in")
    edit_quantization(written.path, extra_config={"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}})
    assert len(opened(written.path)[2]) == len(written.layers)


def test_an_8_bit_layer_is_refused_by_name(tmp_path: Path) -> None:
    """Mixed bits: the layers of 4 bits are found, those of 8 are problems."""
    form = AutoRound(extra={r".*layers\.1\..*down_proj": {"bits": 8}})
    written = Case("mixed", form).write(tmp_path / "in")
    specs, problems = find_layers(written.path)
    assert [(problem.subject, problem.reason[:10]) for problem in problems] == [
        ("model.layers.1.mlp.down_proj", "has 8 bits")
    ]
    assert len(specs) == len(written.layers) - 1


def test_names_go_before_ends_and_patterns(tmp_path: Path) -> None:
    """As in vLLM: a layer's name, the end of it, then patterns, which match anywhere."""
    written = write_case("auto-round", tmp_path / "in")
    extra = {"proj$": {"bits": 3}, "q_proj": {"bits": 2}, Q_PROJ: {"bits": 4}}
    edit_quantization(written.path, extra_config=extra)
    specs, problems = find_layers(written.path)
    assert [spec.name for spec in specs] == [Q_PROJ]
    bits = {problem.subject: problem.reason[:5] for problem in problems}
    assert bits[Q_PROJ.replace("layers.0", "layers.1")] == "has 2"
    assert bits["model.layers.0.mlp.down_proj"] == "has 3"


def test_a_g_idx_is_read_where_there_is_one(tmp_path: Path) -> None:
    """AutoRound's GPTQ exports have one, its own format mostly not."""
    written = write_case("auto-round", tmp_path / "in")
    edit_tensors(
        written.path,
        lambda t: t.update({f"{Q_PROJ}.g_idx": torch.arange(256, dtype=torch.int32) // 128}),
    )
    _, source, specs = opened(written.path)
    spec = next(spec for spec in specs if spec.name == Q_PROJ)
    assert "g_idx" in spec.parts
    assert source.read_g_idx(spec, read_tensor) is None
