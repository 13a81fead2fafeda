"""Predictions of `w4a8 quantize` against what was measured, whose files the documents' tables are made of."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization, with_samples
from convert_w4a8.calibration.prediction import CORE, H100, predict_cost, seconds_by_step
from convert_w4a8.calibration.run import STATES_BYTES
from convert_w4a8.checkpoint.directory import open_checkpoint

pytest.importorskip("transformers", reason="the extra `quantize` is not installed")
sys.path.append(str(ROOT / "scripts" / "bench"))
sys.path.append(str(ROOT / "scripts" / "gpu"))
from bench_quantize_block import MODELS, random_samples
from predict_quantize import write_holes


def read(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of figures."""
    path = ROOT / "docs" / "benchmarks" / "results" / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def measured(name: str) -> list[Any]:
    """Return the rows of a file of figures as parameters of a test."""
    return [pytest.param(row, id=f"{row['model']}-{row['preset']}-{row['device']}") for row in read(name)]


@pytest.mark.parametrize("kind", ["no data", "fast", "full"])
def test_codebooks_take_what_is_predicted_on_a_cpu(kind: str) -> None:
    """All matrices of a block together."""
    rows = [row for row in read("codebooks") if row["kind"] == kind]
    predicted = 0.0
    for row in rows:
        if row["shape"]:
            n, k = map(int, row["shape"].split(" × "))
            predicted += n * k * (CORE.full + CORE.full_per_input * k if kind == "full" else CORE.nearest)
    (block,) = [row for row in rows if not row["shape"]]
    assert predicted == pytest.approx(block["cpu_s"], rel=0.15)


@pytest.mark.parametrize("row", measured("quantize-block"))
def test_a_block_takes_what_is_predicted(row: dict[str, Any], tmp_path: Path) -> None:
    """Each step that takes a tenth of the time within a half, all of them within a quarter; and memory too."""
    write_holes(tmp_path, MODELS[row["model"]] | {"layers": 1})
    samples = random_samples(row["tokens"] // 512, 512)
    options = with_samples(QuantizeOptions(preset=Preset(row["preset"])), samples)
    checkpoint = open_checkpoint(tmp_path)
    plan = plan_quantization(checkpoint, options)
    on_gpu = row["device"] == "cuda"
    steps = seconds_by_step(checkpoint, plan, options, samples, STATES_BYTES, H100 if on_gpu else CORE)
    row["rest_s"] += row["read_s"] + row["rounding_s"] + row["write_s"]
    for name, seconds in steps.items():
        if row[f"{name}_s"] > 0.1 * row["seconds"]:
            assert seconds == pytest.approx(row[f"{name}_s"], rel=0.5), name
    assert sum(steps.values()) == pytest.approx(row["seconds"], rel=0.25)
    assert sum(row[f"{name}_s"] for name in steps if f"{name}_s" in row) == pytest.approx(row["seconds"], rel=0.05)
    cost = predict_cost(checkpoint, plan, options, samples, torch.device(row["device"]), STATES_BYTES)
    if on_gpu:
        assert cost.gpu_memory == pytest.approx(row["gpu_gib"] * 2**30, rel=0.35)
    if row["host_gib"] is not None:
        assert cost.memory == pytest.approx(row["host_gib"] * 2**30, rel=0.5)
    assert cost.disk == pytest.approx(row["disk_gib"] * 2**30, rel=0.1, abs=1e6)
