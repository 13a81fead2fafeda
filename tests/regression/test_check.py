"""`w4a8 check`: what passes, what fails, what it reads, and what it writes for people and programs."""

import json
import math
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_edits import case_named, edit_tensors, snapshot, write_case
from click.testing import CliRunner, Result
from paths import ROOT

from convert_w4a8 import api
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.cli.options import read_options
from convert_w4a8.conversion.plan import make_plan
from convert_w4a8.errors import ClusterError
from convert_w4a8.options import Options
from convert_w4a8.regression import check as checks
from convert_w4a8.regression.baseline import Figures, LayerFigures, compare, read_baseline

LAYER, OTHER = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lead temporary files to a directory that must be empty in the end, and keep a job's summary out of it."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint that keeps its codes."""
    return write_case("gptq-v1", tmp_path_factory.mktemp("check") / "in").path


@pytest.fixture(scope="module")
def document(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write its baseline once."""
    file = tmp_path_factory.mktemp("baseline") / "baseline.json"
    assert run(source, "--write-baseline", file).exit_code == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def baseline(document: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of baselines: a copy of the true one with a function's changes."""

    def make(change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        copy = json.loads(json.dumps(document))
        change(copy)
        (tmp_path / "baseline.json").write_text(json.dumps(copy))
        return tmp_path / "baseline.json"

    return make


def run(*arguments: object) -> Result:
    """Run `w4a8 check`."""
    return CliRunner().invoke(main, ["check", *map(str, arguments)], catch_exceptions=False)


def found(*arguments: object) -> dict[str, Any]:
    """Run `w4a8 check --json`; exit code and document agree."""
    result = run(*arguments, "--json")
    outcome: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if outcome["ok"] else 1)
    assert outcome["ok"] == (not outcome["problems"])
    return outcome


def subjects(outcome: dict[str, Any]) -> set[str]:
    """Return what a check complains about."""
    return {problem["subject"] for problem in outcome["problems"]}


# A right conversion.


@pytest.mark.parametrize("form", ["lut", "compressed-tensors"])
def test_right_conversion_passes_and_leaves_nothing(source: Path, temporary: Path, form: str) -> None:
    """Every layer is converted and verified; temporary files are gone, and the source is as it was."""
    before = snapshot(source)
    outcome = found(source, "--format", form)
    figures = outcome["figures"]
    assert outcome["ok"]
    assert outcome["verified"]
    assert figures["format"] == form
    assert len(figures["layers"]) == 14
    assert all(layer["codes_kept"] and 25 < layer["sqnr_db"] < 60 for layer in figures["layers"].values())
    assert not list(temporary.iterdir())
    assert snapshot(source) == before


def test_conversion_that_exists_is_taken(
    source: Path, tmp_path: Path, temporary: Path, document: dict[str, Any]
) -> None:
    """`--out` gives the figures that converting anew gives, without converting."""
    CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--quiet"], catch_exceptions=False)
    temporary.rmdir()  # whoever wants to convert fails
    assert found(source, "--out", tmp_path / "out")["figures"] == document


def test_out_of_another_model_fails(source: Path, tmp_path: Path) -> None:
    """`--out` is verified, not believed."""
    CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--quiet"], catch_exceptions=False)
    edit_tensors(tmp_path / "out", lambda t: t[f"{LAYER}.weight_chan_scale"].mul_(2))
    assert subjects(found(source, "--out", tmp_path / "out")) == {LAYER}


def test_least_sqnr(source: Path) -> None:
    """`--min-sqnr-db` applies to every layer."""
    assert len(subjects(found(source, "--min-sqnr-db", 99))) == 14


def test_refused_conversion_fails_with_the_reasons(tmp_path: Path) -> None:
    """What the planner refuses is the outcome, with reasons and remedies, not an error of the check."""
    path = write_case("gptq-desc-act", tmp_path / "in").path
    outcome = found(path)
    assert outcome["figures"] is None
    assert len(outcome["problems"]) == 14
    assert all("--act-order requantize" in problem["remedy"] for problem in outcome["problems"])
    assert "--act-order requantize" in run(path).stdout
    assert found(path, "--act-order", "requantize")["ok"]


# Against a baseline.


def test_unchanged_conversion_agrees_with_its_baseline(source: Path, baseline: Callable[..., Path]) -> None:
    """What was written is what is measured."""
    outcome = found(source, "--baseline", baseline())
    assert outcome["ok"]
    assert not outcome["notes"]


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        (lambda d: d["layers"][LAYER].update(sqnr_db=d["layers"][LAYER]["sqnr_db"] + 0.2), LAYER),
        (lambda d: d["layers"][LAYER].update(sqnr_db=None), LAYER),
        (lambda d: d["layers"][LAYER].update(out_features=128), LAYER),
        (lambda d: d["layers"].pop(LAYER), LAYER),
        (lambda d: d["layers"].update(new=d["layers"][LAYER]), "new"),
        (lambda d: d.update(bytes_out=d["bytes_out"] - 1), "bytes_out"),
        (lambda d: d.update(bytes_in=d["bytes_in"] + 1), "bytes_in"),
        (lambda d: d.update(scales="reference"), "scales"),
        (lambda d: d.update(sample=True), "sample"),
        (lambda d: d.update(source="awq"), "source"),
        (lambda d: d.update(format="compressed-tensors"), "format"),
    ],
    ids=[
        "sqnr", "lossless", "shape", "layer-added", "layer-lost", "output-size", "input-size", "scales", "sample",
        "source-format", "output-format",
    ],
)  # fmt: skip
def test_regression_fails(
    baseline: Callable[..., Path], change: Callable[[dict[str, Any]], object], subject: str
) -> None:
    """Every kind of difference for the worse is found, alone, and names its subject."""
    now = read_baseline(baseline())
    problems, notes = compare(now, read_baseline(baseline(change)), 0.1)
    assert [problem.subject for problem in problems] == [subject]
    assert not notes


def test_regression_fails_the_check_but_not_the_verification(source: Path, baseline: Callable[..., Path]) -> None:
    """A baseline may be written anew then, although the check fails."""
    better = baseline(lambda d: d["layers"][LAYER].update(sqnr_db=40.0))
    outcome = found(source, "--baseline", better)
    assert (outcome["ok"], outcome["verified"], subjects(outcome)) == (False, True, {LAYER})
    assert found(source, "--baseline", better, "--tolerance-db", 12)["ok"]
    assert not found(source, "--baseline", better, "--write-baseline", better)["ok"]
    assert found(source, "--baseline", better)["ok"]


def figures(**layers: LayerFigures) -> Figures:
    """Return figures that differ in their layers only."""
    return Figures("gptq", "lut", "reference", False, 1, 1, layers, ())


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (30.0, 30.1, ""),
        (30.0, 30.2, "problem"),
        (30.2, 30.0, "note"),
        (None, None, ""),
        (None, 30.0, "note"),
        (30.0, None, "problem"),
        (-1000.0, 30.0, "problem"),
    ],
)
def test_tolerance(ours: float | None, theirs: float | None, verdict: str) -> None:
    """SQNR may fall by the tolerance; what rises by more is told; no loss at all is the best there is."""
    now, before = (figures(a=LayerFigures(16, 128, True, value)) for value in (ours, theirs))
    problems, notes = compare(now, before, 0.11)
    assert (bool(problems), bool(notes)) == (verdict == "problem", verdict == "note")


def test_codes_that_are_lost_or_won() -> None:
    """A layer whose codes were kept must keep them; the other way round is good news."""
    kept, new = (figures(a=LayerFigures(16, 128, is_kept, 30.0)) for is_kept in (True, False))
    (problem,), notes = compare(new, kept, 0.1)
    assert "has new INT4 codes" in problem.reason
    assert not notes
    problems, (note,) = compare(kept, new, 0.1)
    assert "keeps its INT4 codes" in note
    assert not problems


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"w4a8_check": 2}',
        '{"w4a8_check": 1}',
        '{"w4a8_check": 1, "layers": [], "dequantized": []}',
        '{"w4a8_check": 1, "layers": {"a": {}}, "dequantized": []}',
    ],
)
def test_what_is_no_baseline_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    """Files of another kind are refused in one line, before anything is converted."""
    (tmp_path / "x.json").write_text(text)
    result = run(source, "--baseline", tmp_path / "x.json")
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*x\.json: .*\n", result.stderr)


def test_figures_must_be_numbers(source: Path, baseline: Callable[..., Path]) -> None:
    """Strings where numbers belong are refused too."""
    for change in (
        lambda d: d["layers"][LAYER].update(sqnr_db="30"),
        lambda d: d.update(bytes_out="1 GB"),
    ):
        assert "is not a version 2 baseline" in run(source, "--baseline", baseline(change)).stderr


def test_baseline_of_a_wrong_conversion_is_not_written(source: Path, tmp_path: Path) -> None:
    """A baseline is a promise; what does not verify makes none."""
    result = run(source, "--min-sqnr-db", 99, "--write-baseline", tmp_path / "b.json")
    assert result.exit_code == 1
    assert not (tmp_path / "b.json").exists()


def test_nan_is_not_taken_for_no_loss() -> None:
    """JSON holds neither infinity; the good one is null, and the bad one a number that fails."""
    assert checks._rounded(math.inf) is None
    assert checks._rounded(-math.inf) == -1000


# One layer of each kind.


@pytest.mark.parametrize(
    "case",
    ["awq-odd-n", "awq-mixtral-w1-w2-w3", "gptq-dynamic", "gptq-odd-k", "gptq-qwen3-moe-sharded", "ct-two-groups"],
)
def test_sample_has_every_kind_once(case: str, tmp_path: Path) -> None:
    """Every projection × shape × group size is there, once, with its tensors and no others."""
    needs = [value.removeprefix("--").replace("-", "_") for value in case_named(case).needs]
    choices = dict(zip(needs[::2], needs[1::2], strict=True))
    source = open_checkpoint(write_case(case, tmp_path / "in").path)
    defaults = {str(p.name): str(p.default) for p in convert.params}
    plan = make_plan(source, read_options(defaults | choices))
    reduced, small = checks.sample_layers(source, plan)

    def kind(layer: Any) -> tuple[str, int, int, int]:
        spec = layer.spec
        return spec.name.rpartition(".")[2], spec.out_features, spec.in_features, spec.group_size

    kinds = [kind(layer) for layer in small.layers]
    assert sorted(kinds) == sorted({kind(layer) for layer in plan.layers})
    assert len(kinds) < len(plan.layers)
    assert reduced.tensors.keys() == {part.name for layer in small.layers for part in layer.spec.parts.values()}


@pytest.mark.parametrize("case", ["gptq-qwen3-moe-sharded", "awq-odd-n", "ct-qwen3-moe", "gptq-lm-head"])
def test_sample_reads_only_its_layers(case: str, tmp_path: Path) -> None:
    """All other scales are NaN, which reading would refuse: the sample passes, the whole does not."""
    written = write_case(case, tmp_path / "in")
    needs = case_named(case).needs
    outcome = found(written.path, "--sample", *needs)
    assert outcome["ok"], outcome["problems"]
    chosen = outcome["figures"]["layers"].keys() | set(outcome["figures"]["dequantized"])
    for file in written.path.glob("*.safetensors"):
        damage(file, chosen)
    assert found(written.path, "--sample", *needs) == outcome
    assert not found(written.path, *needs)["ok"]


def damage(file: Path, spared: set[str]) -> None:
    """Set the scales of all layers but the spared ones to NaN."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name, tensor in tensors.items():
        module, _, role = name.rpartition(".")
        if role in ("scales", "weight_scale") and module not in spared:
            tensors[name] = torch.full_like(tensor, torch.nan)
    save_file(tensors, file)


def test_sample_is_compared_with_samples_only(source: Path, tmp_path: Path, baseline: Callable[..., Path]) -> None:
    """A sample has a baseline of its own, and its figures are those of the whole conversion."""
    sample = found(source, "--sample", "--write-baseline", tmp_path / "sample.json")["figures"]
    assert found(source, "--sample", "--baseline", tmp_path / "sample.json")["ok"]
    whole = json.loads(baseline().read_text())["layers"]
    assert sample["layers"].items() <= whole.items()
    assert "sample" in subjects(found(source, "--sample", "--baseline", baseline()))


def test_sample_does_not_go_with_out(source: Path, tmp_path: Path) -> None:
    """A usage error, in Python a ValueError of the same words."""
    words = "--sample converts layers of its own"
    refused = run(source, "--sample", "--out", tmp_path)
    assert refused.exit_code == 2
    assert words in refused.stderr
    with pytest.raises(ValueError, match=words):
        api.check(source, sample=True, out=tmp_path)


# What people see.


def tables(markdown: str) -> list[list[list[str]]]:
    """Read the tables of a Markdown text; every row must have as many cells as the header."""
    found = []
    for block in re.findall(r"(?m)(?:^\|.*\n?)+", markdown):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, block
        assert all(re.fullmatch(r" ---:? ", cell) for cell in rows[1])
        found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def test_summary_is_appended_for_the_job(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: Callable[..., Path]
) -> None:
    """What GitHub shows is what is printed, after what other steps wrote, also with --json and on failure."""
    summary = tmp_path / "summary.md"
    summary.write_text("# Earlier\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    printed = run(source, "--baseline", baseline()).stdout
    assert printed.startswith("## w4a8 check of `in`: passed\n")
    assert summary.read_text() == "# Earlier\n" + printed
    assert run(source, "--min-sqnr-db", 99, "--json").exit_code == 1
    assert "`in`: failed" in summary.read_text().removeprefix("# Earlier\n" + printed)


def test_tables_hold_the_figures(source: Path, baseline: Callable[..., Path], document: dict[str, Any]) -> None:
    """The summary's numbers are those of the JSON, beside those of the baseline."""
    better = baseline(lambda d: d["layers"][LAYER].update(sqnr_db=35.0))
    problems, summary, kinds = tables(run(source, "--baseline", better).stdout)
    now = {module: layer["sqnr_db"] for module, layer in document["layers"].items()}
    both = [list(now.values()), list((now | {LAYER: 35.0}).values())]
    assert [row[0] for row in problems] == ["where", f"`{LAYER}`"]
    rows = {row[0]: row[1:] for row in summary}
    assert rows["layers converted"] == ["14", "14"]
    assert rows["worst SQNR"] == [f"{min(values):.2f} dB" for values in both]
    assert rows["mean SQNR"] == [f"{sum(values) / 14:.2f} dB" for values in both]
    down = now[LAYER], now[OTHER]
    row = next(row for row in kinds if row[0] == "`down_proj`")
    assert row == ["`down_proj`", "2", "256×512", "kept", f"{sum(down) / 2:.2f}", f"{min(down):.2f}", f"{down[1]:.2f}"]


def test_names_cannot_break_the_tables(source: Path, baseline: Callable[..., Path]) -> None:
    """Names come from checkpoints and baselines, which anybody may have written."""
    evil = "a|b`\n| c </td>"
    text = run(source, "--baseline", baseline(lambda d: d["layers"].update({evil: d["layers"][LAYER]}))).stdout
    assert r"`a?b?\n? c </td>`" in text
    assert len(tables(text)) == 3


# The workflow.


def test_workflow_runs_commands_that_exist() -> None:
    """The example for GitHub Actions is YAML, and its `w4a8` commands parse."""
    workflow = yaml.safe_load((ROOT / "docs" / "workflows" / "w4a8-check.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands = [shlex.split(step.replace("$CHECKPOINT", "org/name")) for step in steps if "w4a8 " in step]
    assert commands
    for program, name, *arguments in commands:
        assert program == "w4a8"
        options = {option: p for p in main.commands[name].params for option in p.opts}
        assert options.keys() >= {argument for argument in arguments if argument.startswith("-")}
        assert "--baseline" in arguments
        with main.commands[name].make_context(name, arguments, resilient_parsing=True) as context:
            assert context.params["source"] == "org/name"


def test_a_cluster_that_fails_says_nothing_of_a_checkpoint(source: Path, temporary: Path) -> None:
    """It is an error, and no problem of the checkpoint; where a check writes is said, and which variable names it."""

    def fail(*_: object) -> None:
        raise ClusterError("node n1", "cannot write into the directory", "mount it")

    with pytest.raises(ClusterError) as caught:
        checks.check(open_checkpoint(source), Options(), device=torch.device("cpu"), write=fail)
    (note,) = (note for note in caught.value.__notes__ if "TMPDIR" in note)
    assert str(temporary) in note
    assert list(temporary.iterdir()) == []
