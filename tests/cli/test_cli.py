"""The command line: exit codes, one line for the user's errors, tracebacks for ours, clean output for programs."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from checkpoint_edits import edit_quantization, edit_tensors, snapshot, write_case
from click.testing import CliRunner, Result
from paths import ROOT
from safetensors.torch import save_file

from convert_w4a8 import __version__
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.cli.main import main
from convert_w4a8.cli.options import SIZE
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported
from convert_w4a8.targets import target_names, targets


def invoke(command: click.Command, *arguments: object) -> Result:
    """Run a command; exceptions that are not the user's errors come through."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command by the words that call it."""
    yield "w4a8-convert", convert
    yield "w4a8", main
    for name, command in main.commands.items():
        yield f"w4a8 {name}", command


COMMANDS = [pytest.param(command, id=name) for name, command in commands()]
OPTIONS = {option.name: option for option in convert.params if isinstance(option, click.Option)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small checkpoint that keeps its codes."""
    return write_case("gptq-v1", tmp_path_factory.mktemp("cli") / "in").path


@pytest.fixture(scope="module")
def out(source: Path) -> Path:
    """Return what becomes of it."""
    path = source.parent / "out"
    assert invoke(convert, source, path, "--quiet").exit_code == 0
    return path


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_help(command: click.Command) -> None:
    """--help exits 0, says what the command does, and what every option does."""
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert command.help
    assert command.help.split()[:3] == result.stdout.split("\n\n")[1].split()[:3]
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.opts[-1] in result.stdout


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["check", "--help"], ["--version"], ["convert"]])
def test_help_does_not_import_what_is_heavy(words: list[str]) -> None:
    """Help, the version and usage errors appear at once: without torch, numpy, transformers or the Hub's client."""
    code = (
        "import sys\n"
        "from convert_w4a8.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'safetensors', 'tqdm', 'triton', 'matplotlib'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()), code)"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"HEAVY [] {2 if words == ['convert'] else 0}"


@pytest.mark.parametrize("command", [convert, main])
def test_version(command: click.Command) -> None:
    """--version names the version."""
    result = invoke(command, "--version")
    assert result.exit_code == 0
    assert __version__ in result.stdout


def test_convert_is_the_main_command_and_one_of_the_group() -> None:
    """`w4a8 convert` and `w4a8-convert` are the same object."""
    assert main.commands["convert"] is convert
    assert {"convert", "inspect", "verify"} <= main.commands.keys()


# Options are those of the library.


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("output_format", ["compressed-tensors", "lut"]),
        ("scales", ["reference", "search", "direct"]),
        ("asymmetric", ["requantize", "error"]),
        ("act_order", ["requantize", "error"]),
        ("group_size", ["requantize", "error"]),
        ("unsupported", ["error", "dequantize"]),
    ],
)
def test_choices_are_those_of_the_documents(option: str, choices: list[str]) -> None:
    """What scripts and documents name can be chosen, and nothing else."""
    kind = OPTIONS[option].type
    assert isinstance(kind, click.Choice)
    assert list(kind.choices) == choices


def test_formats_are_those_that_can_be_written() -> None:
    """`--format` knows the names of the files in `targets/`; each module says the same of itself."""
    assert list(target_names()) == [target.NAME for target in targets()]


@pytest.mark.parametrize("option", ["output_format", "asymmetric", "act_order", "group_size", "unsupported"])
def test_defaults_are_those_of_the_library(option: str) -> None:
    """Who calls the library without options gets what the command line gives."""
    field = "format" if option == "output_format" else option
    assert OPTIONS[option].default == getattr(Options(), field)


def test_default_shard_size_is_that_of_the_library() -> None:
    """5GB is 5,000,000,000 bytes."""
    assert SIZE.convert(OPTIONS["max_shard_size"].default, None, None) == Options().max_shard_size


def test_options_reach_the_plan(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option arrives under its own name: none is dropped or mixed up with another."""
    from convert_w4a8.conversion import plan

    seen: list[Options] = []

    def recording(_checkpoint: Any, options: Options) -> None:
        seen.append(options)
        raise ConvertError("seen", "enough", "stop")

    monkeypatch.setattr(plan, "make_plan", recording)
    arguments = "--format compressed-tensors --scales search --asymmetric error --act-order requantize"
    arguments += " --group-size requantize --unsupported dequantize --max-shard-size 12MB"
    assert invoke(convert, source, tmp_path / "out", *arguments.split()).exit_code == 1
    expected = Options(
        format="compressed-tensors",
        scales=ScalesMode.SEARCH,
        asymmetric=Policy.ERROR,
        act_order=Policy.REQUANTIZE,
        group_size=Policy.REQUANTIZE,
        unsupported=Unsupported.DEQUANTIZE,
        max_shard_size=12_000_000,
    )
    assert seen == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("10KB", 10_000),
        ("1KiB", 1024),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    """Powers of 1000, with an i of 1024."""
    assert SIZE.convert(text, None, None) == expected


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "0GB", "5XB", "5GBB", "1e9", "five", "nan", "5,5GB", "5GB;"])
def test_what_is_no_size_is_a_usage_error(text: str, source: Path, tmp_path: Path) -> None:
    """A size that cannot be is refused with exit code 2 and an example."""
    result = invoke(convert, source, tmp_path / "out", "--max-shard-size", text)
    assert result.exit_code == 2
    assert "is not a size such as 5GB" in result.stderr


# Exit codes.


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["in"],
        ["in", "out", "more"],
        ["in", "out", "--scales", "best"],
        ["in", "out", "--format", "gguf"],
        ["in", "out", "--wrong"],
        ["in", "out", "--asymmetric"],
        ["in", "out", "--act-order", "maybe"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage is told from wrong input by the exit code, and shows how to use the command."""
    monkeypatch.chdir(tmp_path)
    result = invoke(convert, *words)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert "--help" in result.stderr or "--asymmetric" in words
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["inspect"], ["verify", "out"], ["verify", "--source", "in"], ["unknown"]], ids=" ".join
)
def test_usage_errors_of_the_group_exit_2(words: list[str]) -> None:
    """The same for the other commands."""
    assert invoke(main, *words).exit_code == 2


def one_error_line(result: Result) -> str:
    """Return the only line of standard error, after checking that it is the user's error and that nothing else is."""
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    return lines[0]


def test_user_errors_are_one_line(source: Path, tmp_path: Path) -> None:
    """Input, output and device: subject, reason and remedy on standard error, exit code 1."""
    absent = tmp_path / "absent"
    assert one_error_line(invoke(convert, absent, tmp_path / "out")).startswith(
        f"Error: {absent}: is not a directory; "
    )
    assert "is not quantized" in one_error_line(invoke(convert, tmp_path_with_config(tmp_path), tmp_path / "out"))
    assert "overlaps the input" in one_error_line(invoke(convert, source, source / "out", "--quiet"))
    assert "--device tpu" in one_error_line(invoke(convert, source, tmp_path / "out", "--device", "tpu"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"")
    assert "pass --overwrite" in one_error_line(invoke(convert, source, tmp_path / "full", "--quiet"))
    assert "is not a directory" in one_error_line(invoke(main, "inspect", absent))
    assert "is not a directory" in one_error_line(invoke(main, "verify", absent, "--source", source))
    assert "not an output format" in one_error_line(invoke(main, "verify", source, "--source", source))
    assert not (tmp_path / "out").exists()


def tmp_path_with_config(tmp_path: Path) -> Path:
    """Make a directory with a configuration that quantizes nothing."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    save_file({"model.norm.weight": torch.ones(1)}, tmp_path / "plain" / "model.safetensors")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "flags", [[], ["--json"], ["--quiet"], ["--dry-run"]], ids=["plain", "json", "quiet", "dry-run"]
)
def test_refusals_are_all_listed(flags: list[str], tmp_path: Path) -> None:
    """Every problem on a line of its own on standard error, after their number; on standard output only with --json."""
    checkpoint = write_case("gptq-g32", tmp_path / "in")
    result = invoke(convert, checkpoint.path, tmp_path / "out", *flags)
    assert result.exit_code == 1
    assert bool(result.stdout) == ("--json" in flags)
    head, *lines = result.stderr.splitlines()
    assert head == f"Error: {len(checkpoint.layers)} problems; nothing was written."
    assert {line.strip().partition(":")[0] for line in lines} == checkpoint.layers.keys()
    assert all("; pass --group-size requantize" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_one_refusal_is_in_the_singular(tmp_path: Path) -> None:
    """One problem is not "1 problems"."""
    checkpoint = write_case("gptq-v1", tmp_path / "in")
    edit_quantization(checkpoint.path, checkpoint_format="marlin")
    result = invoke(convert, checkpoint.path, tmp_path / "out")
    assert result.stderr.splitlines()[0] == "Error: 1 problem; nothing was written."


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["convert", "in", "new"], "convert_w4a8.conversion.plan.make_plan"),
        (["convert", "in", "new"], "convert_w4a8.conversion.run.carry_out"),
        (["inspect", "in"], "convert_w4a8.report.inspection.inspect"),
        (["verify", "out", "--source", "in"], "convert_w4a8.verification.proof.verify"),
    ],
    ids=["plan", "convert", "inspect", "verify"],
)
@pytest.mark.parametrize("bug", [ValueError, KeyError, AssertionError, TypeError])
def test_bugs_of_ours_keep_their_traceback(
    words: list[str], where: str, bug: type[Exception], source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not the user's error is not dressed up as one: the exception comes through as it is."""

    def broken(*_: Any, **__: Any) -> None:
        raise bug("a bug of ours")

    assert out.is_dir()
    monkeypatch.setattr(where, broken)
    monkeypatch.chdir(source.parent)
    with pytest.raises(bug, match="a bug of ours"):
        invoke(main, *words)


def test_interruption_says_that_nothing_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is no error of anybody's: exit code 130 as in a shell, no traceback, nothing left."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert_w4a8.conversion.shard.convert_layer", interrupted)
    result = invoke(convert, source, tmp_path / "out", "--quiet")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file/out", "file"])
def test_output_that_cannot_be_made_is_one_line(where: str, source: Path, tmp_path: Path) -> None:
    """A parent that is a file cannot hold OUT."""
    (tmp_path / "file").write_bytes(b"")
    one_error_line(invoke(convert, source, tmp_path / where, "--quiet"))


@pytest.mark.parametrize("where", [".", "../here", "./", "sub/.."])
def test_the_current_directory_is_no_output(
    where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any name: it would be replaced under the process."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the working directory" in one_error_line(invoke(convert, source, where, "--quiet"))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


# What is printed.


def test_convert_prints_plan_and_result(source: Path, tmp_path: Path) -> None:
    """The plan before, the result after, and how to verify and to serve."""
    result = invoke(convert, source, tmp_path / "out")
    assert result.exit_code == 0
    for words in (
        "input      gptq",
        "14 layers, 0 of them of experts",
        "codes      14 layers: decided when read (kept, if",
        "converted  14 layers",
    ):
        assert words in result.stdout
    assert f"w4a8 verify {tmp_path / 'out'} --source" in result.stdout
    assert f"vllm serve {tmp_path / 'out'}" in result.stdout
    assert result.stderr == ""


def test_json_of_convert(source: Path, tmp_path: Path) -> None:
    """One document on standard output and nothing else, that strict parsers accept."""
    result = invoke(convert, source, tmp_path / "out", "--json")
    document = strict_json(result.stdout)
    assert result.stderr == ""
    assert document["output"] == str(tmp_path / "out")
    assert document["plan"]["source"] == "gptq"
    assert document["plan"]["layers"]["codes_decided_when_read"] == len(document["layers"]) == 14
    assert document["plan"]["bytes_out"] > 0
    assert all(layer["codes_kept"] and layer["estimated_sqnr_db"] > 25 for layer in document["layers"])


def test_json_of_dry_run(source: Path, tmp_path: Path) -> None:
    """The plan as one document; nothing is written."""
    document = strict_json(invoke(convert, source, tmp_path / "out", "--dry-run", "--json").stdout)
    assert document["target"] == "lut"
    assert document["files"] == ["model.safetensors"]
    assert document["ignore"] == ["lm_head"]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_agrees_with_the_run(source: Path, tmp_path: Path) -> None:
    """What a dry run announces is what the run then does."""
    announced = strict_json(invoke(convert, source, tmp_path / "out", "--dry-run", "--json").stdout)
    done = strict_json(invoke(convert, source, tmp_path / "out", "--json").stdout)
    assert done["plan"] == announced
    assert sorted(file for file in snapshot(tmp_path / "out") if file.endswith("safetensors")) == announced["files"]


def test_json_of_inspect_and_verify(source: Path, out: Path) -> None:
    """The same for the other commands; a right conversion is "ok"."""
    inspected = strict_json(invoke(main, "inspect", source, "--json").stdout)
    assert inspected["format"] == "gptq"
    assert sum(layer["count"] for layer in inspected["layers"]) == 14
    assert strict_json(invoke(main, "inspect", out, "--json").stdout)["format"] == "w4a8_lut"
    verified = strict_json(invoke(main, "verify", out, "--source", source, "--json").stdout)
    assert verified["ok"] is True
    assert verified["problems"] == []
    assert len(verified["layers"]) == 14


def strict_json(text: str) -> Any:
    """Parse JSON without the constants that only Python reads."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_quiet_prints_nothing(source: Path, tmp_path: Path) -> None:
    """--quiet leaves nothing but errors, with --dry-run too."""
    for flags in (["--dry-run"], []):
        result = invoke(convert, source, tmp_path / "out", "--quiet", *flags)
        assert (result.exit_code, result.output) == (0, "")


def test_verify_exits_1_when_it_fails(source: Path, out: Path, tmp_path: Path) -> None:
    """A table for people with the reason at its end, or JSON; exit code 1 both times."""
    shutil.copytree(out, tmp_path / "bad")
    name = "model.layers.1.mlp.up_proj"
    edit_tensors(tmp_path / "bad", lambda t: t[f"{name}.weight_packed"].zero_())
    people = invoke(main, "verify", tmp_path / "bad", "--source", source)
    assert people.exit_code == 1
    assert people.stdout.splitlines()[-1] == "FAILED"
    assert f"problem    {name}: SQNR is" in people.stdout
    programs = invoke(main, "verify", tmp_path / "bad", "--source", source, "--json")
    assert programs.exit_code == 1
    document = strict_json(programs.stdout)
    assert document["ok"] is False
    assert {problem["subject"] for problem in document["problems"]} == {name}
    assert any("INT4 codes are not the source's" in problem["reason"] for problem in document["problems"])


def test_verify_exits_1_under_the_threshold(source: Path, out: Path) -> None:
    """--min-sqnr-db is what decides."""
    assert invoke(main, "verify", out, "--source", source).exit_code == 0
    assert invoke(main, "verify", out, "--source", source, "--min-sqnr-db", "20").exit_code == 0
    assert invoke(main, "verify", out, "--source", source, "--min-sqnr-db", "90").exit_code == 1


def test_overwrite(source: Path, tmp_path: Path) -> None:
    """A second run needs --overwrite, and then leaves the same as the first."""
    arguments = (source, tmp_path / "out", "--quiet")
    assert invoke(convert, *arguments).exit_code == 0
    first = snapshot(tmp_path)
    assert invoke(convert, *arguments).exit_code == 1
    assert snapshot(tmp_path) == first
    assert invoke(convert, *arguments, "--overwrite").exit_code == 0
    assert snapshot(tmp_path) == first
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "would be deleted" in one_error_line(invoke(convert, *arguments, "--overwrite"))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


# Progress.


def test_progress_is_hidden_when_not_at_a_terminal(source: Path, out: Path, tmp_path: Path) -> None:
    """Logs get no progress bar."""
    assert invoke(convert, source, tmp_path / "out").stderr == ""
    assert invoke(main, "verify", out, "--source", source).stderr == ""


def test_progress_at_a_terminal(source: Path, tmp_path: Path) -> None:
    """A terminal on standard error gets a bar in bytes that ends at 100 %, and nothing with --quiet."""
    program = (
        "import sys\n"
        "from convert_w4a8.cli.convert import convert_command as convert\n"
        "source, out = sys.argv[1:]\n"
        "convert([source, out, '--quiet'], standalone_mode=False)\n"
        "print('NOW', file=sys.stderr)\n"
        "convert([source, out, '--overwrite'], standalone_mode=False)\n"
    )
    controller, terminal = pty.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
        subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True)
        shown = os.read(controller, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(controller)
    quiet, bar = shown.split("NOW")
    assert quiet == ""
    assert "convert: 100%" in bar
    assert "B/s" in bar


# The library does not speak.


def test_only_the_command_line_prints_or_exits() -> None:
    """No module but those of the command line prints, exits or imports Click."""
    package = ROOT / "convert_w4a8"
    for file in package.rglob("*.py"):
        if file.is_relative_to(package / "cli"):
            continue
        text = file.read_text(encoding="utf-8")
        found = re.search(r"\bprint\(|sys\.exit|^\s*(import|from) click", text, re.MULTILINE)
        assert not found, f"{file.name}: {found[0] if found else ''}"
