"""W4AFP8 as TensorRT-LLM's and SGLang's tools write it, in both of its configurations."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from factories.models import Model, qwen3_moe
from layer_specs import opened
from safetensors.torch import load_file, save_file

from convert_w4a8 import api
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.options import Options
from convert_w4a8.sources import find_source

FORMATS = ("lut", "compressed-tensors")
SHORT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
IN_CONFIG = {"config.json": {"quantization_config": {"quant_method": "w4afp8"}}}
IN_FILE = {"hf_quant_config.json": {"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}}}


def write(path: Path, files: dict[str, Any], model: Model | None = None) -> dict[str, torch.Tensor]:
    """Write a checkpoint with INT4 experts and FP8 attention; return what the experts' weights mean."""
    model = model or qwen3_moe()
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for module, (n, k) in model.linears.items():
        if ".experts." in module:
            values = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
            scale = torch.rand(n, k // 128, generator=generator) * 0.01 + 0.005
            low, high = values[:, 0::2] & 0xF, values[:, 1::2] & 0xF
            tensors[f"{module}.weight"] = (low | (high << 4)).to(torch.int8)
            tensors[f"{module}.weight_scale_inv"] = scale
            head, _, leaf = module.rpartition(".")
            tensors[f"{head}.{SHORT[leaf]}.input_scale"] = torch.tensor([0.01])
            meant[module] = values.float() * scale.repeat_interleave(128, dim=1)
        else:
            weight = torch.randn(n, k, generator=generator)
            tensors[f"{module}.weight"] = weight.to(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale_inv"] = torch.rand(-(-n // 128), -(-k // 128), generator=generator)
    for name, shape in model.dense.items():
        tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = model.config | {"torch_dtype": "bfloat16"}
    for name, content in ({"config.json": {}} | files).items():
        (path / name).write_text(json.dumps(content if name != "config.json" else config | content))
    return meant


@pytest.mark.parametrize("files", [IN_CONFIG, IN_FILE], ids=["config.json", "hf_quant_config.json"])
def test_the_experts_mean_what_they_meant(files: dict[str, Any], tmp_path: Path) -> None:
    """Signed nibbles, the even channel in the low one, times the scale of their group."""
    meant = write(tmp_path / "in", files)
    _, source, specs = opened(tmp_path / "in")
    assert source.NAME == "w4afp8"
    assert {spec.name for spec in specs} == meant.keys()
    for spec in specs:
        w = source.read_layer(spec, read_tensor)
        assert torch.equal(dequantize(w), meant[spec.name])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("files", [IN_CONFIG, IN_FILE], ids=["config.json", "hf_quant_config.json"])
def test_it_converts_and_verifies(form: str, files: dict[str, Any], tmp_path: Path) -> None:
    """The FP8 layers keep their bytes, their scales under vLLM's name; static scales of the experts are gone."""
    source, out = tmp_path / "in", tmp_path / "out"
    meant = write(source, files)
    plan = api.convert(source, out, Options(format=form)).plan
    assert len(plan.converted) == len(meant)
    assert {layer.kind for layer in plan.carried} == {"FP8, a scale per block of 128×128, dynamic FP8 activations"}
    found = api.verify(out, source)
    assert not found.problems
    assert found.carried == len(plan.carried) == 8
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert not [name for name in after if name.endswith(("_inv", "input_scale"))]
    for layer in plan.carried:
        assert torch.equal(after[f"{layer.name}.weight_scale"], before[f"{layer.name}.weight_scale_inv"])
        weight = f"{layer.name}.weight"
        assert torch.equal(after[weight].view(torch.uint8), before[weight].view(torch.uint8))


def test_a_sample_of_it(tmp_path: Path) -> None:
    """`check --sample` converts one expert of each kind."""
    write(tmp_path / "in", IN_CONFIG)
    assert not api.check(tmp_path / "in", sample=True).problems


@pytest.mark.parametrize(
    ("role", "tensor", "says"),
    [
        ("weight", None, "has a weight_scale_inv but no weight"),
        ("weight", torch.zeros(256, 256, dtype=torch.int8), r"weight_scale_inv: is F32 \[256, 2\]"),
        ("weight", torch.zeros(256, 30, dtype=torch.int8), r"weight: has 30 columns, not K/2"),
        ("weight", torch.zeros(256, 128, dtype=torch.uint8), r"is U8 \[256, 128\], not a I8 matrix"),
        ("weight_scale_inv", torch.ones(256, 4), r"is F32 \[256, 4\], not .* \[256, 2\] = \[N, K/128\]"),
    ],
)
def test_tensors_that_are_not_of_the_format(role: str, tensor: torch.Tensor | None, says: str, tmp_path: Path) -> None:
    """Another shape or dtype, or a part that is missing, is named."""
    write(tmp_path / "in", IN_CONFIG)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.experts.0.gate_proj.{role}"
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file)
    with pytest.raises(PlanError) as caught:
        api.make_plan(tmp_path / "in")
    assert any(re.search(says, str(problem)) for problem in caught.value.problems)


def test_scales_that_are_damaged(tmp_path: Path) -> None:
    """NaN in the scales of an expert."""
    write(tmp_path / "in", IN_CONFIG)
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"][3, 1] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ConvertError, match="holds NaN or infinite scales"):
        api.convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("content", [{}, {"quantization": 1}, {"quantization": {"quant_algo": "FP8"}}])
def test_other_settings_of_modelopt_are_not_taken_for_it(content: dict[str, Any], tmp_path: Path) -> None:
    """The file may say anything else."""
    write(tmp_path / "in", {"hf_quant_config.json": content})
    with pytest.raises(ConvertError, match=r"does not say how|is not supported"):
        find_source(api.open_checkpoint(tmp_path / "in"))
