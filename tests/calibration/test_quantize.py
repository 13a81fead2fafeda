"""From a model in 16 bits to an output: with data and without, for every kind of model, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_json, edit_tensors, snapshot, write_case
from safetensors.torch import load_file
from tiny_models import fuse_experts, samples_of, write_llama, write_mixtral, write_qwen3_moe

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.conversion.result import Result
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.samples.sample import SampleSet

FAST = QuantizeOptions(preset="fast")  # type: ignore[arg-type]
FULL = QuantizeOptions()


def quantize(model: Path, out: Path, options: QuantizeOptions = FULL, samples: SampleSet | None = None) -> Result:
    """Quantize a model on the CPU, and let the output be verified."""
    result = api.quantize(model, out, options, samples=samples, device="cpu")
    assert api.verify(out, model).problems == ()
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_data(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every linear layer of the blocks has free tables; all else is as it was, and nothing says of calibration data."""
    model = write_llama(tmp_path / "in", dtype=dtype)
    result = quantize(model, tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    layers = {name.removesuffix(".weight") for name in before if "layers" in name and "norm" not in name}
    assert {name.removesuffix(".weight_lut") for name in after if name.endswith("weight_lut")} == layers
    assert {layer.plan.module for layer in result.layers} == layers
    others = {name for name in before if name.removesuffix(".weight") not in layers}
    for name in others:
        want = before[name].bfloat16() if dtype is torch.float16 else before[name]
        assert torch.equal(after[name], want)
    conversion = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["conversion"]
    assert conversion["calibration"] is None
    assert "no calibration data was used" in (tmp_path / "out" / "README.md").read_text()


def test_free_tables_are_better_than_scales(tmp_path: Path) -> None:
    """Of weights alone: by a decibel and more."""
    model = write_llama(tmp_path / "in", layers=1)
    free = quantize(model, tmp_path / "free")
    scale = quantize(model, tmp_path / "scale", QuantizeOptions(tables="scale"))  # type: ignore[arg-type]
    for ours, theirs in zip(free.converted, scale.converted, strict=True):
        assert ours[1].sqnr_db > theirs[1].sqnr_db + 1


@pytest.mark.parametrize("preset", ["fast", "full"])
def test_compressed_tensors(preset: str, tmp_path: Path) -> None:
    """The output has scales that stock vLLM loads as they were chosen."""
    model = write_llama(tmp_path / "in", layers=1)
    options = QuantizeOptions(format="compressed-tensors", tables="scale", preset=preset)  # type: ignore[arg-type]
    quantize(model, tmp_path / "out", options, samples_of([48, 32]))


@pytest.mark.parametrize("preset", ["fast", "full"])
@pytest.mark.parametrize("write", [write_llama, write_qwen3_moe, write_mixtral])
def test_with_data(write: Callable[[Path], Path], preset: str, tmp_path: Path) -> None:
    """Every layer is calibrated on the tokens that count, an expert on at least as many as it has inputs."""
    model = write(tmp_path / "in")
    samples = samples_of([200, 150, 200], masked=[10, 0, 20])
    result = quantize(model, tmp_path / "out", QuantizeOptions(preset=preset), samples)  # type: ignore[arg-type]
    names = load_names(tmp_path / "out")
    for layer in result.layers:
        assert f"{layer.plan.module}.weight_lut" in names
        routed = layer.notes.get("routed_tokens")
        if routed is None:
            assert layer.notes["tokens"] == samples.kept == 520
        else:
            assert layer.notes["tokens"] == max(routed, 256)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "calibrated on 3 samples with 520 tokens that count" in card


def load_names(directory: Path) -> set[str]:
    """Return the names of all tensors of a checkpoint."""
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def test_full_is_better_in_the_outputs(tmp_path: Path) -> None:
    """On the calibration data, by decibels."""
    model = write_llama(tmp_path / "in", layers=1)
    samples = samples_of([300, 300])
    fast = quantize(model, tmp_path / "fast", FAST, samples)
    full = quantize(model, tmp_path / "full", FULL, samples)
    for ours, theirs in zip(full.layers, fast.layers, strict=True):
        assert ours.notes["output_sqnr_db"] > theirs.notes["output_sqnr_db"] + 1


@pytest.mark.parametrize("options", [None, FAST, FULL], ids=["no data", "fast", "full"])
def test_experts_in_one_tensor(options: QuantizeOptions | None, tmp_path: Path) -> None:
    """What transformers 5 holds experts in becomes the same layers, byte for byte, under the names of each expert."""
    samples = None if options is None else samples_of([100])
    plain, fused = write_qwen3_moe(tmp_path / "plain"), write_qwen3_moe(tmp_path / "fused")
    edit_tensors(fused, fuse_experts)
    assert len(load_names(fused)) < len(load_names(plain))
    outputs = []
    for name, model in (("a", plain), ("b", fused)):
        quantize(model, tmp_path / name, options or FULL, samples)
        outputs.append(
            {k: v for file in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(file).items()}
        )
    assert outputs[0].keys() == outputs[1].keys()
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor.view(torch.uint8), outputs[1][name].view(torch.uint8)), name


@pytest.mark.parametrize("options", [FAST, FULL], ids=["fast", "full"])
def test_an_expert_that_is_never_chosen(options: QuantizeOptions, tmp_path: Path) -> None:
    """It borrows tokens, as many as its layers have inputs, and is as good as the others."""
    model = write_qwen3_moe(tmp_path / "in", num_experts_per_tok=1)

    def never(tensors: dict[str, torch.Tensor]) -> None:
        # Experts 0 and 1 have the opposite of each other's score: one of them is above 0, which 2 and 3 have.
        gate = tensors["model.layers.0.mlp.gate.weight"]
        gate[1] = -gate[0]
        gate[2:] = 0.0

    edit_tensors(model, never)
    result = quantize(model, tmp_path / "out", options, samples_of([200, 200]))
    found = {layer.plan.module.removeprefix("model.layers.0.mlp.experts."): layer for layer in result.layers}
    assert [found[f"{expert}.down_proj"].notes["routed_tokens"] == 0 for expert in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert {found[f"{expert}.up_proj"].notes["tokens"] for expert in (2, 3)} == {256}
    for name, layer in found.items():
        if "self_attn" not in name:
            assert layer.stats is not None
            assert layer.stats.sqnr_db > 14
            assert float(layer.notes["output_sqnr_db"]) > 14


def test_kept_layers_stay_as_they_are(tmp_path: Path) -> None:
    """By --keep, and with what vLLM serves together with them; calibration goes through them unrounded."""
    model = write_llama(tmp_path / "in", layers=1)
    options = QuantizeOptions(keep=(r"re:.*\.q_proj",))
    result = quantize(model, tmp_path / "out", options, samples_of([40]))
    kept = {layer.plan.module.rpartition(".")[2] for layer in result.layers if layer.stats is None}
    assert kept == {"q_proj", "k_proj", "v_proj"}


def test_sizes_that_the_kernel_refuses_are_kept_with_a_warning(tmp_path: Path) -> None:
    """An intermediate size that is no multiple of 128 as K, nor of 16 as N."""
    model = write_llama(tmp_path / "in", layers=1, intermediate_size=200)
    result = quantize(model, tmp_path / "out", FAST, samples_of([40]))
    kept = {layer.plan.module.rpartition(".")[2] for layer in result.layers if layer.stats is None}
    assert kept == {"gate_proj", "up_proj", "down_proj"}


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    """In one line, which says what to use instead."""
    write_case("awq-symmetric-fp16-sharded", tmp_path / "in")
    with pytest.raises(ConvertError, match=r"is quantized already .* w4a8-convert"):
        api.quantize(tmp_path / "in", tmp_path / "out")


def test_a_plain_model_is_no_input_of_convert(tmp_path: Path) -> None:
    """It says what to use instead."""
    model = write_llama(tmp_path / "in", layers=1)
    with pytest.raises(ConvertError, match="w4a8 quantize"):
        api.convert(model, tmp_path / "out")


def test_free_tables_are_no_compressed_tensors(tmp_path: Path) -> None:
    """Refused before anything is written."""
    model = write_llama(tmp_path / "in", layers=1)
    with pytest.raises((ConvertError, PlanError), match="use --tables scale"):
        api.quantize(model, tmp_path / "out", QuantizeOptions(format="compressed-tensors"))
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    """Without data it is quantized; with data one line says why not."""
    model = write_llama(tmp_path / "in", layers=1)
    edit_json(model / "config.json", model_type="nobody_knows", architectures=["NobodyForCausalLM"])
    quantize(model, tmp_path / "out")
    with pytest.raises(ConvertError, match="without --data"):
        api.quantize(model, tmp_path / "other", FAST, samples=samples_of([40]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """They are refused, and nothing is left."""
    model = write_llama(tmp_path / "in", layers=1)
    edit_tensors(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 5].fill_(torch.nan))
    for samples in (None, samples_of([40])):
        with pytest.raises(ConvertError, match="NaN"):
            api.quantize(model, tmp_path / "out", FAST, samples=samples)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("preset", [FAST, FULL], ids=["fast", "full"])
def test_hidden_states_on_the_disk_change_nothing(preset: QuantizeOptions, tmp_path: Path) -> None:
    """The same bytes as with all of them in memory, and nothing of them is left."""
    from convert_w4a8.calibration import run
    from convert_w4a8.calibration.plan import plan_quantization, with_samples

    model = api.open_checkpoint(write_qwen3_moe(tmp_path / "in"))
    samples = samples_of([60, 80, 60])
    options = with_samples(preset, samples)
    for name, limit in (("memory", 1 << 30), ("disk", 1)):
        plan = plan_quantization(model, options)
        run.quantize(model, plan, tmp_path / name, samples, device=torch.device("cpu"), states_bytes=limit)
    assert snapshot(tmp_path / "memory") == snapshot(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "in", "memory"]
