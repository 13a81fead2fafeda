"""Models in FP8 with a scale for each block of 128 × 128, DeepSeek's, are read as their weights in BF16."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_json, edit_tensors
from safetensors.torch import load_file
from tiny_models import samples_of, write_llama, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.errors import PlanError, W4A8Error

SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Put the linear layers of all blocks into FP8, in place."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        n, k = weight.shape
        blocks = weight.view(n // 128, 128, k // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale


def from_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Return them to BF16."""
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        wide = torch.kron(scale, torch.ones(128, 128))
        tensors[weight] = (tensors[weight].float() * wide).bfloat16()


@pytest.mark.parametrize("options", [None, "fast", "full"])
@pytest.mark.parametrize("write", [write_llama, write_qwen3_moe])
def test_it_is_the_model_in_16_bits(write: Callable[[Path], Path], options: str | None, tmp_path: Path) -> None:
    """The same bytes as from that, without data and with; verified against either."""
    fp8 = write(tmp_path / "fp8")
    edit_tensors(fp8, to_fp8)
    plain = write(tmp_path / "plain")
    edit_tensors(plain, to_fp8)
    edit_tensors(plain, from_fp8)
    edit_json(fp8 / "config.json", quantization_config=SETTINGS)
    chosen = QuantizeOptions(preset=options or "full")  # type: ignore[arg-type]
    samples = None if options is None else samples_of([80])
    found = []
    for model in (fp8, plain):
        out = tmp_path / f"{model.name}-out"
        api.quantize(model, out, chosen, samples=samples, device="cpu")
        assert api.verify(out, model).problems == ()
        found.append({k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor.view(torch.uint8), found[1][name].view(torch.uint8)), name
    assert api.verify(tmp_path / "fp8-out", plain).problems == ()


def test_kept_layers_are_in_bf16(tmp_path: Path) -> None:
    """With --keep."""
    model = write_llama(tmp_path / "in", layers=1)
    edit_tensors(model, to_fp8)
    edit_json(model / "config.json", quantization_config=SETTINGS)
    options = QuantizeOptions(keep=(r"re:.*down_proj",))
    api.quantize(model, tmp_path / "out", options, samples=samples_of([40]), device="cpu")
    assert api.verify(tmp_path / "out", model).problems == ()


def test_what_is_refused(tmp_path: Path) -> None:
    """Scales of another shape, FP8 without scales, FP8 outside the blocks, blocks of another size."""
    for what in ("shape", "no scale", "lm_head", "block size"):
        model = write_llama(tmp_path / what, layers=1)
        edit_tensors(model, to_fp8)
        edit_json(model / "config.json", quantization_config=SETTINGS)
        name = "model.layers.0.mlp.up_proj.weight_scale_inv"

        def damage(tensors: dict[str, torch.Tensor], what: str = what, name: str = name) -> None:
            if what == "shape":
                tensors[name] = tensors[name][:1]
            elif what == "no scale":
                del tensors[name]
            elif what == "lm_head":
                tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

        edit_tensors(model, damage)
        if what == "block size":
            edit_json(model / "config.json", quantization_config={**SETTINGS, "weight_block_size": [64, 64]})
        with pytest.raises((PlanError, W4A8Error)):
            api.quantize(model, tmp_path / "out", QuantizeOptions(), device="cpu")
        assert not (tmp_path / "out").exists()
