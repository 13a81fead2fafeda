"""Infinities in tensors that are copied: a warning wherever somebody looks, and no refusal. NaN is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_tensors, write_case
from click.testing import CliRunner

from convert_w4a8 import Options, convert, inspect, make_plan, make_report, verify
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.cli.convert import convert_command
from convert_w4a8.cli.main import main
from convert_w4a8.conversion import layer as converting
from convert_w4a8.conversion import run as running
from convert_w4a8.errors import ConvertError, DiskError
from convert_w4a8.linear import DenseLinear

NORM = "model.norm.weight"
BIAS = "model.layers.1.mlp.gate_proj.bias"
"""Of a layer that is quantized."""
Damage = Callable[[dict[str, torch.Tensor]], None]


def put(name: str, value: float, dtype: torch.dtype = torch.bfloat16, count: int = 1) -> Damage:
    """Return damage to the end of a tensor, which is made if it is absent."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name].float() if name in tensors else torch.ones(512)
        tensor[-count:] = value
        tensors[name] = tensor.to(dtype)

    return damage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a small checkpoint."""
    return write_case("gptq-v1", tmp_path / "in").path


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [NORM, BIAS, "model.mask"])
def test_infinities_are_warned_of_everywhere(
    name: str, dtype: torch.dtype, value: float, source: Path, tmp_path: Path
) -> None:
    """The conversion, inspect and report say so, as text and as JSON; what is written is what was there."""
    edit_tensors(source, put(name, value, dtype))
    warning = f"{name} holds an infinity: as a mask may, but a weight may not"
    out = tmp_path / "out"
    assert convert(source, out, device="cpu").warnings == (warning,)
    assert verify(out, source).problems == ()
    assert inspect(source).warnings == inspect(out).warnings == make_report(out, source).warnings == (warning,)
    for command in (["inspect", str(source)], ["inspect", str(out)], ["report", str(out), "--source", str(source)]):
        runner = CliRunner()
        assert f"warning    {warning}\n" in runner.invoke(main, command).stdout
        assert json.loads(runner.invoke(main, [*command, "--json"]).stdout)["warnings"] == [warning]


def test_a_conversion_says_so_at_its_end(source: Path, tmp_path: Path) -> None:
    """How many, of the first tensor, and of how many others."""
    edit_tensors(source, put(NORM, math.inf, count=3))
    edit_tensors(source, put(BIAS, -math.inf))
    warning = f"{BIAS} holds an infinity, and 1 other tensor too: as a mask may, but a weight may not"
    command = [str(source), str(tmp_path / "out")]
    assert f"warning    {warning}\n" in CliRunner().invoke(convert_command, command).stdout
    again = CliRunner().invoke(convert_command, [*command, "--overwrite", "--json"])
    assert json.loads(again.stdout)["warnings"] == [warning]


def test_without_infinities_nothing_is_said(source: Path, tmp_path: Path) -> None:
    """The largest finite values of both signs are values."""
    edit_tensors(source, put(NORM, torch.finfo(torch.bfloat16).max))
    edit_tensors(source, put(BIAS, torch.finfo(torch.bfloat16).min))
    assert convert(source, tmp_path / "out", device="cpu").warnings == ()
    assert inspect(source).warnings == make_report(tmp_path / "out", source).warnings == ()


def test_resuming_knows_what_was_copied_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the journal says of a finished file holds for its infinities, too."""
    edit_tensors(source, put(NORM, math.inf))

    def fail(*_: object) -> None:
        raise DiskError("OUT", "is full", "free space")

    monkeypatch.setattr(running, "model_card", fail)
    with pytest.raises(DiskError):
        convert(source, tmp_path / "out", device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr(running, "run_jobs", list)  # converts nothing
    result = convert(source, tmp_path / "out", device="cpu", resume=True)
    assert result.warnings == (f"{NORM} holds an infinity: as a mask may, but a weight may not",)


@pytest.mark.parametrize("name", [NORM, BIAS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_is_refused(name: str, dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    """In whatever floats; inspect says so too, and still shows the rest."""
    edit_tensors(source, put(name, math.nan, dtype))
    with pytest.raises(ConvertError, match=f"{name}: holds NaN"):
        convert(source, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert inspect(source).warnings == (f"{name} holds NaN: the checkpoint is damaged",)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_to_be_quantized_are_finite(
    value: float, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no scale for what is not: in a layer that the source has in 16 bits, also as a part of a tensor."""
    weight = torch.ones(8, 2, 128, dtype=torch.bfloat16)
    weight[3, 0, 100] = value
    dense = type("Dense", (), {"read_layer": staticmethod(lambda *_: DenseLinear(weight[:, 0]))})
    monkeypatch.setattr(converting, "source_named", lambda _: dense)
    layer = make_plan(source).layers[0]
    with pytest.raises(ConvertError, match=f"{layer.spec.name}: holds NaN or infinite weights"):
        converting.convert_layer(layer, read_tensor, Options(), torch.device("cpu"))
