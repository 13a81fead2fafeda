"""Inputs that mean harm, and damage that content alone shows: links, devices, endless patterns, NaN, odd names."""

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_json, edit_tensors, snapshot, write_case
from click.testing import CliRunner

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cli.convert import convert_command as convert
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.sources import patterns
from convert_w4a8.sources.patterns import matches

OUTSIDE: dict[str, Callable[[Path], str]] = {
    "side-file": lambda root: link(root / "notes.txt", root.parent / "secret.txt"),
    "in-a-directory": lambda root: link(root / "assets" / "notes.txt", root.parent / "secret.txt"),
    "relative": lambda root: link(root / "notes.txt", Path("../secret.txt")),
    "card": lambda root: link(root / "README.md", root.parent / "secret.txt"),
    "chain": lambda root: (link(root / "one.txt", root.parent / "secret.txt"), link(root / "a.txt", Path("one.txt")))[
        1
    ],
    "weights": lambda root: moved(root / "model.safetensors"),
    "configuration": lambda root: moved(root / "config.json"),
}


def link(path: Path, target: Path) -> str:
    """Make a link and the directory for it."""
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    return path.name


def moved(path: Path) -> str:
    """Move a file out of its checkpoint and leave a link."""
    path.rename(path.parent.parent / path.name)
    return link(path, path.parent.parent / path.name)


@pytest.mark.parametrize("make", OUTSIDE.values(), ids=OUTSIDE)
def test_a_link_out_of_the_checkpoint_is_refused(make: Callable[[Path], str], tmp_path: Path) -> None:
    """A checkpoint from a stranger must not carry files of this machine into the output, and from there to the Hub."""
    root = write_case("gptq-v1", tmp_path / "in").path
    (tmp_path / "secret.txt").write_text("secret")
    name = make(root)
    with pytest.raises(ConvertError, match="is a link out of the checkpoint, to ") as caught:
        open_checkpoint(root)
    assert name in {Path(caught.value.problem.subject).name, "a.txt"}
    assert caught.value.problem.remedy == "copy the file, or give the directory that it lies in"


def test_links_within_the_checkpoint_and_to_it_are_followed(tmp_path: Path) -> None:
    """A link to another file of the checkpoint is a file; IN itself may be a link."""
    root = write_case("gptq-v1", tmp_path / "in").path
    (root / "copy.txt").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to("in")
    assert Path("copy.txt") in open_checkpoint(tmp_path / "link").side_files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_read(name: str, kind: str, tmp_path: Path) -> None:
    """A pipe would be waited for, and a device never end."""
    root = write_case("gptq-v1", tmp_path / "in").path
    (root / name).unlink()
    if kind == "pipe":
        os.mkfifo(root / name)
    else:
        (root / name).symlink_to("/dev/zero")
    reason = "is not a JSON file" if name == "config.json" else "no safetensors file"
    with pytest.raises(
        ConvertError, match=reason if kind == "pipe" else "is a link out of the checkpoint, to /dev/zero"
    ):
        open_checkpoint(root)


def test_a_configuration_may_hold_infinity_but_not_nan(tmp_path: Path) -> None:
    """Models with a time_step_limit write Infinity, as Python's json does; NaN is nobody's setting."""
    root = write_case("gptq-v1", tmp_path / "in").path
    edit_json(root / "config.json", time_step_limit=[0.0, math.inf])
    assert open_checkpoint(root).config["time_step_limit"] == [0.0, math.inf]
    edit_json(root / "config.json", time_step_limit=[0.0, math.nan])
    with pytest.raises(ConvertError, match=r"config.json: is not valid JSON \(it holds NaN\)"):
        open_checkpoint(root)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_in_a_copied_tensor_is_refused(dtype: torch.dtype, place: int, tmp_path: Path) -> None:
    """A NaN anywhere in what is copied is found on the way, and leaves no output."""
    root = write_case("gptq-v1", tmp_path / "in").path

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        norm = tensors["model.norm.weight"].to(dtype)
        norm[place] = math.nan
        tensors["model.norm.weight"] = norm

    edit_tensors(root, damage)
    before = snapshot(tmp_path)
    result = CliRunner().invoke(convert, [str(root), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1
    assert result.stderr == ("Error: model.norm.weight: holds NaN; the checkpoint is damaged: download it again\n")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "\u202egnp", "x" * 10**6, "\ud800"])
def test_an_error_is_one_printable_line(name: str) -> None:
    """Whatever a file calls its tensors, a message does not break the line, the terminal or the patience."""
    line = str(Problem(name, f"is {name}", "mend it"))
    assert line.isprintable()
    assert line.endswith("; mend it")
    assert len(line) < 1500


def test_patterns_match_as_re_does() -> None:
    """At the beginning of the text, with a result of either kind."""
    assert matches(r".*\.q_proj", "model.layers.0.q_proj", "targets")
    assert not matches("q_proj", "model.q_proj", "targets")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a", "a{99999999999}", "(" * 5000])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    """The pattern is quoted, whatever exception the parser chose."""
    with pytest.raises(ConvertError, match="is not a regular expression"):
        matches(pattern, "aaaa", "targets")


def test_a_pattern_without_end_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching is given up after the time limit, for this module and all others."""
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(PlanError, match=re.escape("takes too long to match")):
        matches("(a+)+b", "a" * 60, "dynamic")
    assert time.monotonic() - started < 5
