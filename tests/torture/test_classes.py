"""A short run of fuzz_classes.py: numbers, text, paths, streams and environments, on every command."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_classes.py"


@pytest.mark.slow
def test_no_class_of_attack_goes_wrong() -> None:
    """No traceback, no line too many, nothing written or read elsewhere, in bounds: the script checks."""
    command = [sys.executable, str(SCRIPT), "--cases=46", "--seed=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "46 cases" in result.stdout
