"""Values and paths of options that nobody means, and that end in one line all the same."""

import os
from pathlib import Path

import click
import pytest
from checkpoint_edits import write_case
from click.testing import CliRunner, Result

from convert_w4a8.cli.convert import convert_command
from convert_w4a8.cli.files import check_writable
from convert_w4a8.cli.main import main
from convert_w4a8.cli.output import echo_json
from convert_w4a8.errors import ConvertError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a checkpoint."""
    return write_case("gptq-v1", tmp_path / "in").path


def run(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(convert_command, list(map(str, arguments)))


@pytest.mark.parametrize("size", ["9" * 4000, "9" * 400 + "T", "0", "0.1", "1e9", "9" * 20, "-1", "5 apples"])
def test_a_size_that_no_file_has(size: str, source: Path, tmp_path: Path) -> None:
    """It is a usage error, also where it is no float any more."""
    result = run(source, tmp_path / "out", f"--max-shard-size={size}")
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
    assert "--max-shard-size" in result.output


def test_numbers_are_finite() -> None:
    """Any comparison lets NaN pass, in any range, in every command: a usage error, like infinity."""
    checked = set()
    for name, command in main.commands.items():
        for option in command.params:
            if isinstance(option.type, click.types.FloatParamType):
                checked.add(name)
                for value in ("nan", "inf", "-inf", "1e400"):
                    with pytest.raises(click.BadParameter, match="not a finite number"):
                        option.type_cast_value(click.Context(command), value)
    assert checked == {"check", "distill", "evaluate", "verify"}


def test_an_output_that_is_links_in_a_circle(source: Path, tmp_path: Path) -> None:
    """With --resume, too, which looks first whether it is finished."""
    (tmp_path / "out").symlink_to("out")
    for options in ((), ("--resume",), ("--overwrite",), ("--dry-run",)):
        result = run(source, tmp_path / "out", *options)
        assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
        assert "leads nowhere" in result.output


@pytest.mark.parametrize("kind", ["name", "circle", "directory", "below a file"])
def test_a_file_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    """It is said before the work."""
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    path = {
        "name": tmp_path / ("n" * 300),
        "circle": tmp_path / "circle" / "report.html",
        "directory": tmp_path,
        "below a file": tmp_path / "file" / "report.html",
    }[kind]
    with pytest.raises(ConvertError, match="cannot be written"):
        check_writable(path)


def test_files_that_can_be_written(tmp_path: Path) -> None:
    """Devices are files, too; nothing is made by looking."""
    check_writable(tmp_path / "a" / "b.html", Path(os.devnull))
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    """RFC 8259 has no such number, and strict readers refuse it."""
    with click.Context(convert_command):
        echo_json({"a": float("inf"), "b": [float("-inf"), float("nan"), 1.5], "c": "Infinity"})
    assert " ".join(capsys.readouterr().out.split()) == '{ "a": null, "b": [ null, null, 1.5 ], "c": "Infinity" }'
