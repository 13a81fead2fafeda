"""Whole models, converted in every way, hold in vLLM's own classes what their sources say. See tests/support/zoo."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from zoo import environment
from zoo.rows import BAD, MODES, REFUSED, RIGHT

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
EVERY_MODE = tuple(f"{output_format} {scales}" for output_format, scales in MODES)
LUT = ("lut search", "lut direct")
EXPECTED: dict[tuple[str, str], str] = {
    (architecture, mode): why
    for architecture, modes, why in (
        (
            "deepseek_v3",
            EVERY_MODE,
            "q_a and kv_a together are no multiple of 128 wide, and are converted all the same",
        ),
        ("granitemoehybrid", EVERY_MODE, "`ignore` does not name experts in a 3-D tensor"),
        ("glm4v", EVERY_MODE, "`ignore` does not name the vision tower's layers as vLLM merges them"),
        ("llama4", LUT, "vLLM permutes dimension 0 of q and k, which is not N in this format"),
    )
    for mode in modes
}
"""Faults that are known: (architecture, output format with scales) → why. One that is mended must leave this list."""


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
    """No output is loaded wrong or dies at load, but those that are known to; and every architecture is judged."""
    rows = judged(version, tmp_path)
    assert {row["architecture"] for row in rows} == {*DOZEN}
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        mode = f"{row['format']} {row['scales']}"
        told = f"TP {row['tp']}: {row['status']} {row['reason']}"
        assert row["status"] in {RIGHT, REFUSED, *BAD}, f"{row['architecture']} {mode} {told}"
        if row["status"] in BAD:
            found.setdefault((row["architecture"], mode), []).append(told)
    new = {key: told for key, told in found.items() if key not in EXPECTED}
    assert not new, "\n".join(f"{key}: {told}" for key, told in new.items())
    mended = [key for key in EXPECTED if key not in found]
    assert not mended, f"no fault any more, take them out of EXPECTED: {mended}"
    right = {(row["architecture"], row["format"], row["scales"]) for row in rows if row["status"] == RIGHT}
    assert {("llama", *mode) for mode in MODES} <= right
