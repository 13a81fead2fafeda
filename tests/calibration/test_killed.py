"""SIGKILL at a random place of a quantization, and again of the one that goes on: the end is the same bytes."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_edits import snapshot
from paths import ROOT
from tiny_models import samples_of, write_llama

from convert_w4a8 import api
from convert_w4a8.checkpoint.journal import JOURNAL, work_path

BLOCKS = 6
PROGRAM = "from convert_w4a8.cli.main import main; main()"


def finished(out: Path) -> int:
    """Return how many files an interrupted quantization has finished, by its journal."""
    journal = work_path(out) / JOURNAL
    return journal.read_bytes().count(b'"file"') if journal.is_file() else 0


def killed_after(command: list[str], out: Path, files: int) -> None:
    """Run a command, and kill it when so many files are finished."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while finished(out) < files:
            assert process.poll() is None, f"it ended by itself, before {files} files were finished"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "full"])
def test_killed_twice(preset: str, tmp_path: Path) -> None:
    """Nothing is lost that was finished, and nothing half-written is taken for finished."""
    seed = random.SystemRandom().randrange(1 << 32)
    draw = random.Random(seed)
    model, data = write_llama(tmp_path / "in", layers=BLOCKS), tmp_path / "data.jsonl"
    lines = [json.dumps({"input_ids": sample.tokens.tolist()}) for sample in samples_of([100, 60]).samples]
    data.write_text("\n".join(lines))
    command = [sys.executable, "-c", PROGRAM, "quantize", str(model)]
    options = ["--data", str(data), "--preset", preset, "--device", "cpu", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "whole"), *options], env=environment, check=True)
    out = tmp_path / "out"
    first = draw.randrange(1, BLOCKS - 1)
    killed_after([*command, str(out), *options], out, first)
    assert not out.exists()
    killed_after([*command, str(out), *options, "--resume"], out, draw.randrange(first, BLOCKS) + 1)
    assert not out.exists()
    subprocess.run([*command, str(out), *options, "--resume"], env=environment, check=True)
    assert snapshot(out) == snapshot(tmp_path / "whole"), f"seed {seed}"
    assert api.verify(out, model).problems == ()
