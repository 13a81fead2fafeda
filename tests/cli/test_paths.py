"""Paths on the command line and in Python: `~`, homes that there are not; completion in the shell; JSON of refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import edit_quantization, write_case
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

import convert_w4a8
from convert_w4a8.cli.main import main
from convert_w4a8.cli.options import with_ray_address
from convert_w4a8.errors import ConvertError, DiskError

NOBODY = "~no-such-user/x"


def invoke(*arguments: object) -> Result:
    """Run `w4a8` with some arguments."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home directory with a small checkpoint in it."""
    write_case("gptq-v1", tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    return tmp_path


def test_home_on_the_command_line(home: Path) -> None:
    """Wherever a path can be given, though the shell left it alone."""
    assert invoke("convert", "~/in", "~/out", "--quiet").exit_code == 0
    assert invoke("verify", "~/out", "--source=~/in").exit_code == 0
    assert invoke("report", "~/out", "--source=~/in").exit_code == 0
    assert invoke("check", "~/in", "--out=~/out", "--write-baseline=~/b.json").exit_code == 0
    assert invoke("check", "~/in", "--baseline=~/b.json").exit_code == 0
    assert sorted(path.name for path in home.iterdir()) == ["b.json", "in", "out"]


@pytest.mark.parametrize("kind", [str, Path])
def test_home_in_python(kind: Callable[[str], Any], home: Path) -> None:
    """The one line of the reference, with strings and with Paths."""
    convert_w4a8.convert(kind("~/in"), kind("~/out"))
    assert (home / "out" / "config.json").is_file()
    assert not convert_w4a8.verify(kind("~/out"), kind("~/in")).problems
    assert not convert_w4a8.check(kind("~/in"), out=kind("~/out")).problems


def test_choices_in_python_are_strings(home: Path) -> None:
    """As on the command line."""
    choices: dict[str, Any] = {"scales": "direct", "unsupported": "dequantize", "asymmetric": "error"}
    result = convert_w4a8.convert(home / "in", home / "out", convert_w4a8.Options(**choices))
    assert result.plan.options.scales is convert_w4a8.ScalesMode.DIRECT
    with pytest.raises(ValueError, match="best"):
        convert_w4a8.Options(scales="best")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        ["convert", NOBODY, "out"],
        ["convert", "in", NOBODY],
        ["inspect", NOBODY],
        ["verify", NOBODY, "--source", "in"],
        ["report", "in", "--source", NOBODY],
        ["report", "in", "--source", "in", "--html", NOBODY],
        ["push", NOBODY, "a/b", "--source", "in"],
        ["check", "in", "--out", NOBODY],
        ["check", "in", "--write-baseline", NOBODY],
    ],
    ids=" ".join,
)
def test_a_user_that_there_is_not_is_one_line(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to a directory of that name."""
    monkeypatch.chdir(home)
    result = invoke(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {NOBODY}: begins with the home directory of a user that there is not")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["in"]


def test_a_user_that_there_is_not_in_python(home: Path) -> None:
    """The same error, as an exception."""
    for call in (
        lambda: convert_w4a8.convert(NOBODY, home / "out"),
        lambda: convert_w4a8.convert(home / "in", NOBODY),
        lambda: convert_w4a8.check(home / "in", baseline=NOBODY),
    ):
        with pytest.raises(ConvertError, match="user that there is not"):
            call()


# Completion.


def completions(arguments: list[str], incomplete: str) -> list[tuple[str, str]]:
    """Return type and value of what is offered for a word after `w4a8 …`."""
    found = BashComplete(main, {}, "w4a8", "_W4A8_COMPLETE").get_completions(arguments, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "in"],
        ["inspect"],
        ["verify"],
        ["verify", "out", "--source"],
        ["report", "out", "--png-dir"],
        ["check", "in", "--out"],
        ["push"],
    ],
    ids=" ".join,
)
def test_directories_are_completed(arguments: list[str]) -> None:
    """IN, OUT and DIR, though IN may be a Hub id."""
    assert completions(arguments, "mod") == [("dir", "mod")]


def test_files_choices_and_commands_are_completed() -> None:
    """By Click itself."""
    assert completions(["report", "out", "--html"], "r") == [("file", "r")]
    assert ("plain", "direct") in completions(["convert", "in", "out", "--scales"], "d")
    assert completions([], "en") == [("plain", "env")]


@pytest.mark.parametrize(
    ("program", "variable"), [("w4a8", "_W4A8_COMPLETE"), ("w4a8-convert", "_W4A8_CONVERT_COMPLETE")]
)
def test_the_documented_variable_works(program: str, variable: str) -> None:
    """It prints the script that a shell is to run, and completes at once: without torch."""
    name = "main.main" if program == "w4a8" else "convert.convert_command"
    code = (
        f"import sys\nfrom convert_w4a8.cli.{name.partition('.')[0]} import {name.partition('.')[2]} as command\n"
        f"try:\n    command(prog_name={program!r})\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    environ = {**os.environ, variable: "zsh_source"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert f"#compdef {program}" in done.stdout
    assert done.stderr == "False\n"


# Refusals as JSON.


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "absent", "out", "--json"],
        ["convert", "absent", "out", "--json", "--dry-run"],
        ["inspect", "absent", "--json"],
        ["verify", "absent", "--source", "in", "--json"],
        ["report", "absent", "--source", "in", "--json"],
        ["check", "absent", "--json"],
        ["convert", "in", "out", "--json", "--device", "tpu"],
    ],
    ids=" ".join,
)
def test_a_refusal_is_a_document_too(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stdout, with the three parts of the problem; the line for people is still on stderr."""
    monkeypatch.chdir(home)
    result = invoke(*words)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document.keys() == {"ok", "problems", "notes"}
    assert (document["ok"], document["notes"]) == (False, [])
    (problem,) = document["problems"]
    assert problem.keys() == {"subject", "reason", "remedy"}
    assert result.stderr == f"Error: {problem['subject']}: {problem['reason']}; {problem['remedy']}\n"


def test_all_problems_of_a_plan_are_in_the_document(home: Path) -> None:
    """As many as there are lines on stderr."""
    checkpoint = write_case("gptq-g32", home / "small-groups")
    result = invoke("convert", checkpoint.path, home / "out", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert {problem["subject"] for problem in problems} == checkpoint.layers.keys()
    assert len(result.stderr.splitlines()) == 1 + len(problems)
    edit_quantization(checkpoint.path, bits=3)
    assert json.loads(invoke("check", checkpoint.path, "--json").stdout)["figures"] is None  # check's own document


@pytest.mark.usefixtures("home")
def test_notes_are_in_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that --resume continues."""

    def full(*_: object, **__: object) -> None:
        error = DiskError("out", "no space", "free some")
        error.add_note("3 of 4 files are finished")
        raise error

    monkeypatch.setattr("convert_w4a8.conversion.run.carry_out", full)
    result = invoke("convert", "~/in", "~/out", "--json")
    assert json.loads(result.stdout)["notes"] == ["3 of 4 files are finished"]
    assert result.stderr == "Error: out: no space; free some; 3 of 4 files are finished\n"


def test_there_is_one_document_though_the_upload_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal's: the result comes when all is done."""

    def refuse(*_: object, **__: object) -> None:
        raise ConvertError("org/name", "the Hub refused", "mend that")

    monkeypatch.setattr("convert_w4a8.hub.repository.prepare_repository", lambda *_, **__: None)
    monkeypatch.setattr("convert_w4a8.cli.convert.verify_and_push", refuse)
    result = invoke("convert", "~/in", "~/out", "--json", "--push-to", "org/name")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["subject"] == "org/name"
    assert (home / "out").is_dir()


def test_usage_errors_have_no_document() -> None:
    """Exit code 2, and nothing on stdout."""
    result = invoke("convert", "in", "--json")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("address", ["s3://bucket/model", "gs://bucket/model", "S3://b", "file:///x"])
def test_object_stores_are_no_paths(address: str, home: Path) -> None:
    """Neither is read from, and none becomes a directory called `s3:`."""
    for arguments in ((address, "~/out"), ("~/in", address)):
        result = invoke("convert", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "is not a path; mount the bucket" in result.stderr
    assert not list(home.glob("*:"))


@pytest.mark.parametrize("address", ["hf://org/name@main", "hf://models/org/name@main"])
def test_a_hub_id_as_fsspec_writes_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is one."""
    seen = []

    def resolve(name: str) -> Path:
        seen.append(name)
        raise ConvertError(name, "is not there", "look")

    monkeypatch.setattr("convert_w4a8.hub.repository.resolve_input", resolve)
    assert invoke("inspect", address).exit_code == 1
    assert seen == ["org/name@main"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ray", "in", "out"], ["--ray=local", "in", "out"]),
        (["in", "out", "--ray"], ["in", "out", "--ray=local"]),
        (["--ray", "--json", "in"], ["--ray=local", "--json", "in"]),
        (["--ray", "auto", "in"], ["--ray", "auto", "in"]),
        (["--ray", "10.0.0.1:6379", "in"], ["--ray", "10.0.0.1:6379", "in"]),
        (["--ray", "[fe80::1]:6379"], ["--ray", "[fe80::1]:6379"]),
        (["--ray=head:6379", "in"], ["--ray=head:6379", "in"]),
        (["--ray", "local", "in"], ["--ray", "local", "in"]),
        (["--", "--ray"], ["--", "--ray"]),
        (["in", "--ray", "--", "out"], ["in", "--ray=local", "--", "out"]),
        ([], []),
    ],
)
def test_an_address_of_ray_may_be_left_out(arguments: list[str], expected: list[str]) -> None:
    """What follows is taken for one only if it looks like one."""
    assert with_ray_address(arguments) == expected


def test_a_wrong_address_of_ray(home: Path) -> None:
    """Is a usage error; and where Ray is not installed, one line says how to install it."""
    result = invoke("convert", "~/in", "~/out", "--ray=http://x")
    assert result.exit_code == 2
    assert "is not local, auto or HOST:PORT" in result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        for arguments in (("convert", "~/in", "~/out"), ("quantize", "~/in", "~/out"), ("check", "~/in")):
            result = invoke(*arguments, "--ray")
            assert result.exit_code == 1, result.stderr
            assert result.stderr == (
                "Error: --ray: needs ray, which is not installed; pip install './w4a8-convert[ray]'\n"
            )
    assert not (home / "out").exists()
