"""A short run of fault_injection.py: kills, power cuts, failing disks and races, each resumed and compared."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fault_injection.py"


@pytest.mark.slow
def test_no_promise_is_broken() -> None:
    """Nothing half-written, nothing altered, and the same bytes at last: the script checks and exits with 0."""
    command = [sys.executable, str(SCRIPT), "--kills=14", "--faults=5", "--races=1", "--scenarios=1", "--seed=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "20 disturbed conversions" in result.stdout
