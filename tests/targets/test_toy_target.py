"""A new output format is one file: a toy of one, put beside the others, converts and verifies without another change.

It is the `lut` format with other names for its tensors, and for itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_edits import case_named, edit_tensors, write_case
from safetensors.torch import load_file

from convert_w4a8 import api, targets
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.options import Options

TOY = '''
"""The tensors of the `lut` format by other names."""

from dataclasses import replace

from convert_w4a8.targets import lut

NAME = "toy-format"
SCHEME = "W4A8"
SCALES_AT_LOAD = False
EXPERT_MULTIPLE = 128
MODES = lut.MODES
unsupported_size, unserved_width = lut.unsupported_size, lut.unserved_width
find_problems = lut.find_problems
_NAMES = {"weight_packed": "codes", "weight_scale": "scale", "weight_lut": "entries", "weight_chan_scale": "channel"}


def _ours(name):
    module, _, role = name.rpartition(".")
    return f"{module}.{_NAMES.get(role, role)}"


def _theirs(name):
    module, _, role = name.rpartition(".")
    roles = {ours: theirs for theirs, ours in _NAMES.items()}
    return f"{module}.{roles.get(role, role)}"


def _as_lut(checkpoint):
    return replace(checkpoint, tensors={_theirs(name): info for name, info in checkpoint.tensors.items()})


def matches(quantization_config):
    return quantization_config.get("quant_method") == "toy"


def tensor_specs(module, n, k, mode):
    return tuple(replace(spec, name=_ours(spec.name)) for spec in lut.tensor_specs(module, n, k, mode))


def encode(module, w):
    return {_ours(name): parts for name, parts in lut.encode(module, w).items()}


def find_layers(checkpoint):
    return checkpoint.modules_with("codes")


def decode(checkpoint, module, read):
    return lut.decode(_as_lut(checkpoint), module, read)


def stored_mode(checkpoint):
    return lut.stored_mode(_as_lut(checkpoint))


def quantization_config(source_config, ignore, mode, conversion):
    return {**lut.quantization_config(source_config, ignore, mode, conversion), "quant_method": "toy"}


def serve_command(name):
    return f"toy serve {name}"


def card_section():
    return "## Serve it\\n\\nWith toys."
'''
NAMES = {"weight_packed": "codes", "weight_scale": "scale", "weight_lut": "entries", "weight_chan_scale": "channel"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the toy."""
    path = tmp_path_factory.mktemp("formats")
    (path / "toy_format.py").write_text(TOY)
    return path


@pytest.fixture
def _toy(folder: Path) -> Iterator[None]:
    """Let the toy's folder count as one of output formats, and no longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "__path__", [*targets.__path__, str(folder)])
        targets.targets.cache_clear()
        yield
    targets.targets.cache_clear()
    sys.modules.pop("convert_w4a8.targets.toy_format", None)
    vars(targets).pop("toy_format", None)


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of the lut format the names of the toy."""
    parts = {name: name.rpartition(".") for name in tensors}
    return {f"{parts[name][0]}.{NAMES.get(parts[name][2], parts[name][2])}": tensor for name, tensor in tensors.items()}


def test_formats_are_the_files_of_the_folder() -> None:
    """All of them, by name, with dashes; what is beside them is no format, and the toy is not there by itself."""
    assert targets.target_names() == ("compressed-tensors", "lut")
    assert [target.NAME for target in targets.targets()] == ["compressed-tensors", "lut"]
    for target in targets.targets():
        assert targets.target_named(target.NAME) is target
    for name in ("base", "toy-format", "compressed_tensors", "../lut", ""):
        with pytest.raises(KeyError):
            targets.target_named(name)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "w4a8_lut"}, "lut"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "awq"}, None),
        ({"quant_method": "toy"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_converted_checkpoint_is_known_by_its_method(
    quantization: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    """What is none of ours is refused."""
    checkpoint = open_checkpoint(write_case("gptq-v1", tmp_path / "in").path)
    checkpoint = replace(checkpoint, quantization_config=quantization)
    if expected:
        assert targets.find_target(checkpoint) is targets.target_named(expected)
        return
    with pytest.raises(ConvertError, match="is not an output format; convert it first"):
        targets.find_target(checkpoint)


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize("scales", ["search", "reference", "direct"])
@pytest.mark.parametrize("case", ["gptq-v1", "awq-zero-points", "awq-odd-n"])
def test_it_converts_and_verifies(case: str, scales: str, tmp_path: Path) -> None:
    """All scale modes, layers in BF16, many files: the bytes are those of `lut` under the toy's names."""
    source = write_case(case, tmp_path / "in").path
    changes = {"scales": scales, "unsupported": "dequantize", "max_shard_size": 100_000}
    for form in ("lut", "toy-format"):
        result = api.convert(source, tmp_path / form, Options(format=form, **changes), device="cpu")  # type: ignore[arg-type]
        assert len(result.plan.shards) > 3
    assert not api.verify(tmp_path / "toy-format", source).problems
    found: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "toy-format").glob("*.safetensors"):
        found |= load_file(file)
    for file in (tmp_path / "lut").glob("*.safetensors"):
        expected |= load_file(file)
    expected = renamed(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    config = json.loads((tmp_path / "toy-format" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "toy"
    assert "With toys." in (tmp_path / "toy-format" / "README.md").read_text()


@pytest.mark.usefixtures("_toy")
def test_everything_else_knows_it_too(tmp_path: Path) -> None:
    """Inspection, report, the check for CI; and damage in it is noticed."""
    source = write_case("gptq-qwen3-moe-sharded", tmp_path / "in").path
    options = Options(format="toy-format")
    api.convert(source, tmp_path / "out", options, device="cpu")
    assert api.inspect(tmp_path / "out").format == "toy"
    report = api.make_report(tmp_path / "out", source)
    assert (report.target_format, len(report.layers)) == ("toy-format", 32)
    outcome = api.check(source, options, sample=True, device="cpu")
    assert not outcome.problems
    assert outcome.figures is not None
    assert outcome.figures.format == "toy-format"
    module = "model.layers.0.mlp.experts.2.down_proj"
    edit_tensors(tmp_path / "out", lambda t: t[f"{module}.codes"].bitwise_xor_(0x01010101))
    assert {problem.subject for problem in api.verify(tmp_path / "out", source).problems} == {module}


@pytest.mark.slow
@pytest.mark.usefixtures("_toy")
def test_the_toy_decides_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it cannot hold, which sizes it cannot take and which scales it has: nobody else is asked."""
    source, options = write_case("gptq-v1", tmp_path / "in").path, Options(format="toy-format")
    toy = targets.target_named("toy-format")
    monkeypatch.setattr(toy, "unsupported_size", lambda n, _k: "is too wide" if n == 512 else None)
    monkeypatch.setattr(toy, "MODES", toy.MODES[:1])
    with pytest.raises(PlanError) as caught:
        api.make_plan(source, options)
    reasons = [problem.reason for problem in caught.value.problems]
    assert reasons.count("is too wide") == 4  # gate and up of two layers
    assert reasons.count("cannot be stored by --format toy-format") == 1
    assert len(reasons) == 5


def test_the_command_line_offers_it(folder: Path, tmp_path: Path) -> None:
    """`--format` takes its name, in a process that finds it as it starts; conversion and verification go through."""
    source = case_named("awq-symmetric-bf16").write(tmp_path / "in").path
    program = (
        "import sys, convert_w4a8.targets as targets; targets.__path__.append(sys.argv.pop(1));"
        "from convert_w4a8.cli.main import main; main()"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(folder), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(targets.__file__).parents[2])}  # the same package
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    help_text = run("convert", "--help")
    assert "[compressed-tensors|lut|toy-format]" in "".join(help_text.stdout.split())
    converted = run("convert", source, tmp_path / "out", "--format", "toy-format", "--device", "cpu")
    assert converted.returncode == 0, converted.stderr
    assert f"serve      toy serve {tmp_path / 'out'}" in converted.stdout
    verified = run("verify", tmp_path / "out", "--source", source)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    refused = run("convert", source, tmp_path / "out2", "--format", "toy")
    assert refused.returncode == 2
    assert "'toy' is not one of 'compressed-tensors', 'lut', 'toy-format'" in refused.stderr
