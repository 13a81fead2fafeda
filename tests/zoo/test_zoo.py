"""Whole models, converted in every way, hold in vLLM's own classes what their sources say. See tests/support/zoo."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from zoo import environment
from zoo.rows import MODES, REFUSED, RIGHT

pytestmark = pytest.mark.zoo

DOZEN = (
    "llama",
    "qwen2",  # biases
    "qwen3",
    "gemma3",  # a vision tower
    "phi3",  # merged in the checkpoint
    "mixtral",  # renamed by the converter
    "qwen3_moe",
    "deepseek_v3",  # multi-head latent attention
    "llama4",  # rows permuted by vLLM's loader
    "granitemoehybrid",  # experts in one 3-D tensor, in 16 bits; Mamba
    "glm4v",  # a vision tower with merged names
    "gpt_neox",
    "falcon",
)


def judged(version: str, directory: Path) -> list[dict[str, Any]]:
    """Return the zoo's rows of the dozen, from a process of its own; skips where it cannot run."""
    if reason := environment.missing(version):
        pytest.skip(reason)
    out = directory / "rows.json"
    command = [sys.executable, "-m", "zoo", "run", *DOZEN, "--json", str(out)]
    process = subprocess.run(
        command, env=environment.variables(version), cwd=directory, capture_output=True, text=True, check=False
    )
    assert out.is_file(), process.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return rows


@pytest.mark.parametrize("version", environment.VERSIONS)
def test_vllm_holds_what_the_source_says(version: str, tmp_path: Path) -> None:
    """No output is loaded wrong or dies at load, and every architecture is judged."""
    rows = judged(version, tmp_path)
    assert {row["architecture"] for row in rows} == {*DOZEN}
    found = [row for row in rows if row["status"] not in (RIGHT, REFUSED)]
    assert not found, "\n".join(map(str, found))
    right = {(row["architecture"], row["format"], row["scales"]) for row in rows if row["status"] == RIGHT}
    assert {("llama", *mode) for mode in MODES} <= right
