"""One conversion, one answer: whether a layer keeps its codes is the same for everybody who says so."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_tensors, set_zero_point
from click.testing import CliRunner
from factories import CASES, SEVENS, Case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.conversion.plan import Codes, kinds, make_plan
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.options import Options
from convert_w4a8.regression.check import check
from convert_w4a8.report.collect import collect
from convert_w4a8.verification.proof import verify

CPU = torch.device("cpu")
LAYERS = 14
ODD = "model.layers.1.mlp.up_proj"
FORMATS = pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
CASE = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SEVENS])


def answers(source: Path, out: Path, options: Options) -> dict[str, Mapping[str, bool]]:
    """Convert a checkpoint; return who says of which layer whether its codes are kept."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, options)
    result = carry_out(checkpoint, plan, out, device=CPU)
    converted = open_checkpoint(out)
    verification = verify(converted, checkpoint)
    assert not verification.problems
    outcome = check(checkpoint, options, out=out, device=CPU)
    assert not outcome.problems
    assert outcome.figures is not None
    return {
        "result": {layer.module: stats.codes_kept for layer, stats in result.converted},
        "verify": {layer.module: layer.codes_kept for layer in verification.layers},
        "report": {layer.module: layer.codes_kept for layer in collect(converted, checkpoint).layers},
        "check": {module: layer.codes_kept for module, layer in outcome.figures.layers.items()},
    }


def counts(out: Path, options: Options) -> dict[str, tuple[int, int]]:
    """Return what a converted directory itself says: layers with codes kept, and with new ones."""
    card = dict(re.findall(r"(?m)^\| (\S.*?) \| (\d+) layers?\b", (out / "README.md").read_text()))
    found = {"card": (int(card["INT4 codes kept, value for value"]), int(card.get("new INT4 codes", 0)))}
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    if options.format == "lut":  # readers of compressed-tensors reject keys that they do not know
        conversion = block["conversion"]
        found["config"] = (conversion["layers_with_codes_kept"], conversion["layers_with_new_codes"])
    return found


@FORMATS
@CASE
def test_zero_points_of_seven_are_kept_says_everybody(case: Case, form: str, tmp_path: Path) -> None:
    """The values −7 … 8 are −8 … 7 of the negated scale: kept, in figures and in words; the plan does not know yet."""
    source, options = case.write(tmp_path / "in"), Options(format=form)
    plan = make_plan(open_checkpoint(source.path), options)
    assert {layer.codes for layer in plan.layers} == {Codes.UNDECIDED}
    assert kinds(plan)["codes_decided_when_read"] == LAYERS
    kept = dict.fromkeys(source.layers, True)
    assert len(kept) == LAYERS
    for who, said in answers(source.path, tmp_path / "out", options).items():
        assert said == kept, who
    for who, numbers in counts(tmp_path / "out", options).items():
        assert numbers == (LAYERS, 0), who


@FORMATS
@CASE
def test_one_other_zero_point_makes_new_codes_says_everybody(case: Case, form: str, tmp_path: Path) -> None:
    """A single 9 in one of 14 layers: that one is new everywhere, and the others are kept."""
    source, options = case.write(tmp_path / "in"), Options(format=form)
    edit_tensors(source.path, lambda t: set_zero_point(t, ODD, 9))
    expected = {module: module != ODD for module in source.layers}
    for who, said in answers(source.path, tmp_path / "out", options).items():
        assert said == expected, who
    for who, numbers in counts(tmp_path / "out", options).items():
        assert numbers == (LAYERS - 1, 1), who


@CASE
def test_sevens_and_eights_may_be_mixed(case: Case, tmp_path: Path) -> None:
    """Each group has a sign of its own."""
    source, options = case.write(tmp_path / "in"), Options()
    edit_tensors(source.path, lambda t: set_zero_point(t, ODD, 8))
    for who, said in answers(source.path, tmp_path / "out", options).items():
        assert all(said.values()), who


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id)
        for case in CASES
        if case.id in ("gptq-desc-act-trivial", "gptq-g256", "awq-per-channel", "ct-g64", "gptq-desc-act", "awq-odd-n")
    ],
)
def test_everybody_agrees(case: Case, tmp_path: Path) -> None:
    """Groups of any size, activation order, layers kept in BF16: what the case says of its codes, all say."""
    names = dict(zip(case.needs[::2], case.needs[1::2], strict=True))
    options = Options(**{name.lstrip("-").replace("-", "_"): value for name, value in names.items()})  # type: ignore[arg-type]
    source = case.write(tmp_path / "in")
    converted = [module for module in source.layers if not module.endswith(case.dequantized or ("\0",))]
    expected = dict.fromkeys(converted, not case.requantized)
    for who, said in answers(source.path, tmp_path / "out", options).items():
        assert said == expected, who
    kept = 0 if case.requantized else len(converted)
    for who, numbers in counts(tmp_path / "out", options).items():
        assert numbers == (kept, len(converted) - kept), who


def test_the_commands_say_the_same(tmp_path: Path) -> None:
    """On the command line: kept where all are 7 or 8, new for a 9, with the same word."""
    written, out = SEVENS[0].write(tmp_path / "in"), tmp_path / "out"
    source, modules = written.path, written.layers.keys()
    edit_tensors(source, lambda t: set_zero_point(t, ODD, 9))
    runner = CliRunner()

    def run(*arguments: object) -> str:
        command = convert if arguments[0] == source else main
        result = runner.invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    converted = json.loads(run(source, out, "--json"))
    assert converted["plan"]["codes"] == {"decided when read (zero-points: kept where all are 8 or 7)": LAYERS}
    said = {
        "convert": {layer["module"]: layer["codes_kept"] for layer in converted["layers"]},
        "verify": {
            layer["module"]: layer["codes_kept"]
            for layer in json.loads(run("verify", out, "--source", source, "--json"))["layers"]
        },
        "check": {
            module: layer["codes_kept"]
            for module, layer in json.loads(run("check", source, "--out", out, "--json"))["figures"]["layers"].items()
        },
        "report": {
            layer["module"]: layer["codes_kept"]
            for layer in json.loads(run("report", out, "--source", source, "--json"))["layers"]
        },
    }
    for who, layers in said.items():
        assert {module for module, kept in layers.items() if not kept} == {ODD}, who
        assert len(layers) == LAYERS, who
    rows = [line.split() for line in run("verify", out, "--source", source).splitlines() if "×" in line]
    words = {row[0]: row[2] for row in rows if row[0] in modules}
    assert words == {module: "new" if module == ODD else "kept" for module in modules}
