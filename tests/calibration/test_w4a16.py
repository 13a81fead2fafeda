"""`targets.W4A16`: what others make of it, and that it is what a conversion takes."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_json
from compressed_tensors.quantization.lifecycle.helpers import disable_quantization
from safetensors.torch import load_file
from tiny_models import samples_of, transformers, write_llama, write_mixtral, write_qwen3_moe

from convert_w4a8 import Options, api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.tables import decode
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4Linear
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.targets import W4A16, find_target


@pytest.fixture(scope="module", params=["fast", "full"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a model and its W4A16."""
    root = tmp_path_factory.mktemp("w4a16")
    model = write_llama(root / "in", layers=1)
    options = QuantizeOptions(format=W4A16, preset=request.param)
    api.quantize(model, root / "out", options, samples=samples_of([100, 60]), device="cpu")
    return model, root / "out"


def ours(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of all layers as this project reads them back, float32 [N, K]."""
    checkpoint = open_checkpoint(out)
    target = find_target(checkpoint)
    found = {}
    for module in target.find_layers(checkpoint):
        layer = target.decode(checkpoint, module, read_tensor)
        assert isinstance(layer, W4Linear)
        assert layer.is_kernel_ready
        found[module] = decode(layer)
    return found


def test_transformers_and_compressed_tensors_read_it(pair: tuple[Path, Path]) -> None:
    """They decompress the same weights, in BF16, and the model that they run is close to the original."""
    model, out = pair
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    theirs.apply(disable_quantization)
    tokens = torch.arange(64)[None] * 3
    with torch.inference_mode():
        logits = theirs(tokens).logits
    for module, weight in ours(out).items():
        assert torch.equal(theirs.get_submodule(module).weight, weight.bfloat16()), module
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        error = (plain(tokens).logits - logits).float().square().sum()
        assert sqnr_db(float(plain(tokens).logits.float().square().sum()), float(error)) > 12


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
def test_a_conversion_takes_it(pair: tuple[Path, Path], form: str, tmp_path: Path) -> None:
    """All codes are kept, value for value."""
    _, out = pair
    result = api.convert(out, tmp_path / "w4a8", Options(format=form), device="cpu")
    assert all(stats.codes_kept for _, stats in result.converted)
    assert len(result.converted) == 7
    assert api.verify(tmp_path / "w4a8", out).problems == ()


@pytest.mark.parametrize("write", [write_qwen3_moe, write_mixtral])
def test_experts(write: object, tmp_path: Path) -> None:
    """With data, in every preset; each expert has its own layers."""
    assert callable(write)
    model = write(tmp_path / "in")
    for preset in ("fast", "full"):
        options = QuantizeOptions(format=W4A16, preset=preset)  # type: ignore[arg-type]
        api.quantize(model, tmp_path / preset, options, samples=samples_of([100]), device="cpu")
        assert api.verify(tmp_path / preset, model).problems == ()
        assert sum(".experts." in module for module in ours(tmp_path / preset)) == 12


def test_full_is_closer_than_fast_in_the_outputs(tmp_path: Path) -> None:
    """With activations in 16 bits."""
    model = write_llama(tmp_path / "in", layers=1)
    outputs = []
    for preset in ("fast", "full"):
        options = QuantizeOptions(format=W4A16, preset=preset)  # type: ignore[arg-type]
        outputs.append(api.quantize(model, tmp_path / preset, options, samples=samples_of([300]), device="cpu"))
    for fast, full in zip(outputs[0].layers, outputs[1].layers, strict=True):
        assert full.notes["output_sqnr_db"] > fast.notes["output_sqnr_db"] + 1


def test_without_data(tmp_path: Path) -> None:
    """From the weights alone; nothing of FP8 stands in its settings."""
    model = write_llama(tmp_path / "in", layers=1)
    api.quantize(model, tmp_path / "out", QuantizeOptions(format=W4A16), device="cpu")
    assert api.verify(tmp_path / "out", model).problems == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "float" not in json.dumps(config)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())


def test_damage_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Settings that say something else, and what is no W4A16 of a model."""
    model, out = pair
    copy = tmp_path / "out"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    edit_json(copy / "config.json", "quantization_config", kv_cache_scheme={"num_bits": 8})
    assert api.verify(copy, model).problems
    with pytest.raises(ConvertError, match="W4A16, which no conversion writes"):
        api.verify(out, out)
    with pytest.raises(ConvertError, match="no FP8 tables"):
        api.make_report(out, model)
