"""The dry run, the run and the second run say the same."""

import json
from pathlib import Path

import pytest
from checkpoint_edits import edit_tensors, set_zero_point, snapshot, write_case
from click.testing import CliRunner, Result

from convert_w4a8.cli.convert import convert_command
from convert_w4a8.conversion import memory


def convert(*words: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(convert_command, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint."""
    return write_case("gptq-v1", tmp_path / "in").path


def answers(*words: object) -> tuple[Result, Result]:
    """Return what the dry run says, and then the run."""
    return convert(*words, "--dry-run"), convert(*words)


def test_what_the_tensors_decide_is_decided_in_a_dry_run_too(source: Path, tmp_path: Path) -> None:
    """Zero-points that the options refuse, which only the tensors have."""
    edit_tensors(source, lambda t: set_zero_point(t, "model.layers.0.mlp.up_proj", 3))
    dry, real = answers(source, tmp_path / "out", "--asymmetric", "error")
    assert dry.exit_code == real.exit_code == 1
    assert dry.stderr == real.stderr
    assert "zero-points other than 8 and 7" in dry.stderr
    assert not (tmp_path / "out").exists()


def test_where_the_output_cannot_be(source: Path, tmp_path: Path) -> None:
    """A directory that is not empty."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    dry, real = answers(source, tmp_path / "out")
    assert dry.exit_code == real.exit_code == 1
    assert dry.stderr == real.stderr
    assert "is not empty" in dry.stderr


def test_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little of it."""
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    dry, real = answers(source, tmp_path / "out")
    assert dry.exit_code == real.exit_code == 1
    assert dry.stderr == real.stderr
    assert "bytes of memory" in dry.stderr


@pytest.mark.parametrize("output", ["lut", "compressed-tensors"])
def test_resuming_what_is_finished_changes_nothing(output: str, source: Path, tmp_path: Path) -> None:
    """A script that always says `--resume` may run twice."""
    words = (source, tmp_path / "out", "--format", output, "--resume")
    assert convert(*words).exit_code == 0
    before = snapshot(tmp_path / "out")
    again = convert(*words)
    assert again.exit_code == 0
    assert "is this conversion already; see w4a8 verify" in again.stdout
    document = json.loads(convert(*words, "--json").stdout)
    assert document == {"output": str(tmp_path / "out"), "finished_before": True}
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("change", ["scales", "file", "source"])
def test_another_conversion_is_not_taken_for_this_one(change: str, source: Path, tmp_path: Path) -> None:
    """Other scales, a file that was cut, another source."""
    assert convert(source, tmp_path / "out").exit_code == 0
    words: list[object] = [source, tmp_path / "out", "--resume"]
    match change:
        case "scales":
            words += ["--scales", "reference"]
        case "file":
            (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
        case "source":
            words[0] = write_case("gptq-v2-asymmetric", tmp_path / "other").path
            (tmp_path / "other" / "added.txt").write_text("x")
    result = convert(*words)
    assert result.exit_code == 1
    assert "is not empty" in result.stderr


@pytest.mark.parametrize("words", [[""], ["", "--overwrite"], ["", "--dry-run"]])
def test_an_empty_output_is_a_usage_error(words: list[str], source: Path) -> None:
    """`w4a8-convert IN "$OUT"`, where OUT is not set."""
    result = convert(source, *words)
    assert result.exit_code == 2
    assert "the path is empty" in result.stderr
