"""A short run of fuzz_inputs.py: damaged checkpoints, wrong paths, damaged outputs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_inputs.py"


@pytest.mark.slow
def test_no_damage_goes_wrong() -> None:
    """Every case is refused by name in one line, or converts to what verifies: the script checks and exits with 0."""
    command = [sys.executable, str(SCRIPT), "--cases=36", "--seed=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "36 cases" in result.stdout
