"""Checkpoints of mixed precision hold in vLLM's own classes what their sources say: the FP8 layers beside INT4 ones."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories.models import qwen3_moe
from mixtures import ATTENTION, write_mixture
from zoo import environment
from zoo.rows import MODES, REFUSED, RIGHT

pytestmark = pytest.mark.zoo

EXPERTS = r"model\.layers\.1\.mlp\.experts.*"
MIXTURES = {
    "tensor": ("FP8", ATTENTION),
    "channel": ("FP8_DYNAMIC", ATTENTION),
    "experts-tensor": ("FP8", EXPERTS),
    "experts-channel": ("FP8_DYNAMIC", EXPERTS),
    "lm_head": ("FP8_DYNAMIC", f"lm_head|{ATTENTION}"),
}


@pytest.mark.parametrize("version", environment.VERSIONS)
def test_vllm_holds_the_layers_in_fp8(version: str, tmp_path: Path) -> None:
    """By tensor with static activations, by channel with dynamic ones; experts and an lm_head as well."""
    if reason := environment.missing(version):
        pytest.skip(reason)
    for name, (preset, fp8) in MIXTURES.items():
        write_mixture(tmp_path / name, qwen3_moe(), preset, fp8=fp8, plain="embed" if name == "lm_head" else "lm_head")
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "zoo", "check", *(str(tmp_path / name) for name in MIXTURES), "--json", str(out)]
    process = subprocess.run(
        command, env=environment.variables(version), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert out.is_file(), process.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    assert len(rows) == 2 * len(MODES) * len(MIXTURES)
    for row in rows:
        told = f"{row['architecture']} {row['format']} {row['scales']} TP {row['tp']}: {row['status']} {row['reason']}"
        assert row["status"] in ((RIGHT,) if row["tp"] == 1 else (RIGHT, REFUSED)), told
