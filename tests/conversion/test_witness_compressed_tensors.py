"""compressed-tensors reads AWQ as we do, and every real checkpoint converts into both formats."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.encoding import packing
from convert_w4a8.errors import Problem
from convert_w4a8.sources import awq

REAL = (
    "llama-31m-awq-zp",
    "llama-31m-ct",
    "llama-31m-gptq",
    "tiny-llama-ct-asym",
    "tiny-mixtral-awq-zp",
    "tiny-qwen3moe-gptq",
)


@pytest.mark.parametrize("directory", ["llama-31m-awq-zp", "tiny-mixtral-awq-zp"])
def test_awq_is_read_as_compressed_tensors_reads_it(directory: str, shared: Path) -> None:
    """Codes, zero-points and scales of every layer are those that AutoAWQConverter finds in the same file."""
    path = shared / "models" / directory
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    converter = AutoAWQConverter.from_autoawq_config(block)
    theirs = converter.process(load_file(path / "model.safetensors"))
    checkpoint = open_checkpoint(path)
    problems: list[Problem] = []
    specs = awq.find_layers(checkpoint, problems)
    assert not problems
    assert {spec.name for spec in specs} == {
        name.removesuffix(".weight_packed") for name in theirs if name.endswith(".weight_packed")
    }
    for spec in specs:
        w = awq.read_layer(spec, read_tensor)
        assert torch.equal(packing.to_pack_quantized(w.packed, w.packing), theirs[f"{spec.name}.weight_packed"])
        assert torch.equal(w.scales.T, theirs[f"{spec.name}.weight_scale"])
        assert w.zeros is not None
        packed = theirs[f"{spec.name}.weight_zero_point"]
        zeros = unpack_from_int32(packed, 4, torch.Size(w.zeros.T.shape), packed_dim=0)
        assert torch.equal(w.zeros.T.to(torch.int8) - 8, zeros)


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
@pytest.mark.parametrize("directory", REAL)
def test_real_checkpoint_converts_and_verifies(directory: str, form: str, shared: Path, tmp_path: Path) -> None:
    """What the field's tools wrote converts without an option, and `w4a8 verify` finds nothing wrong."""
    source, out = shared / "models" / directory, tmp_path / "out"
    runner = CliRunner()
    result = runner.invoke(convert, [str(source), str(out), "--format", form, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    result = runner.invoke(main, ["verify", str(out), "--source", str(source), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    layers = json.loads(result.stdout)["layers"]
    headers = open_checkpoint(source).tensors
    assert len(layers) == sum(name.endswith((".qweight", ".weight_packed")) for name in headers)
