"""The demonstration: what a new user sees first. Its commands as scripts/demo.sh has them, but for the set-up."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from convert_w4a8 import convert, inspect, verify

pytestmark = pytest.mark.slow

MAKE = ROOT / "scripts" / "checkpoints" / "make_demo_checkpoint.py"


def commands() -> list[list[str]]:
    """Return the commands of the script that use what the set-up made."""
    lines = (ROOT / "scripts" / "demo.sh").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith('"$venv"/bin/')]


def test_the_demo_runs_and_has_a_good_number(tmp_path: Path) -> None:
    """Twice, as the README says that it can be; all codes are kept, no warning, 30 dB and more, and verified."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    entries = {"python": [sys.executable]}
    for name, module in (("w4a8", "main import main"), ("w4a8-convert", "convert import convert_command")):
        code = f"from convert_w4a8.cli.{module} as command; command(prog_name={name!r})"
        entries[name] = [sys.executable, "-c", code]
    for _ in range(2):
        printed = ""
        for program, *arguments in commands():
            command = [*entries[os.path.basename(program)], *arguments]  # noqa: PTH119
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            printed += done.stdout
    assert "warning" not in printed
    found = re.search(r"worst .*: SQNR ([\d.]+) dB", printed)
    assert found
    assert float(found[1]) > 30
    assert " new " not in printed
    assert printed.splitlines()[-1].startswith("OK: ")


@pytest.mark.parametrize(("flags", "zero_points"), [([], False), (["--zero-points"], True)], ids=["plain", "zeros"])
def test_the_checkpoint_is_what_it_says(flags: list[str], zero_points: bool, tmp_path: Path) -> None:
    """Symmetric, or with zero-points for the tutorial's second part, where `direct` helps."""
    subprocess.run([sys.executable, MAKE, tmp_path / "in", *flags], check=True, capture_output=True)
    assert {kind.zero_points for kind in inspect(tmp_path / "in").kinds} == {zero_points}
    result = convert(tmp_path / "in", tmp_path / "out")
    assert all(stats.codes_kept != zero_points for _, stats in result.converted)
    assert not verify(tmp_path / "out", tmp_path / "in").problems


def test_wrong_usage_is_told(tmp_path: Path) -> None:
    """No directory, two of them, an unknown option: how to use it, and nothing is written."""
    for words in ([], ["a", "b"], ["--wrong"], ["a", "--wrong"]):
        done = subprocess.run([sys.executable, MAKE, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "make_demo_checkpoint.py OUT_DIR" in done.stderr
    assert list(tmp_path.iterdir()) == []
