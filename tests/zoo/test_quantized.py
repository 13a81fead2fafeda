"""Models that were quantized from 16 bits, in vLLM's own classes: they hold what the model in 16 bits holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import distill, quantized, tensors, write_data
from tiny_models import samples_of, write_llama, write_mixtral, write_qwen3_moe
from zoo import environment
from zoo.rows import REFUSED, RIGHT

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions

pytestmark = pytest.mark.zoo


@pytest.fixture(scope="module", params=environment.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    """Return a version of vLLM; skips, before any model is made, where it is not there."""
    found: str = request.param
    if reason := environment.missing(found):
        pytest.skip(reason)
    return found


def test_vllm_holds_the_model(version: str, tmp_path: Path) -> None:
    """Dense, experts under Qwen's names and Mixtral's, in both formats and as W4A16."""
    pairs = []
    for write in (write_llama, write_qwen3_moe, write_mixtral):
        model = write(tmp_path / write.__name__)
        for name, options in (
            ("lut", QuantizeOptions(preset="fast")),  # type: ignore[arg-type]
            ("ct", QuantizeOptions(format="compressed-tensors", tables="scale")),  # type: ignore[arg-type]
            ("w4a16", QuantizeOptions(format="w4a16")),
        ):
            out = tmp_path / f"{write.__name__}-{name}"
            samples = samples_of([100, 60]) if name == "lut" else None
            api.quantize(model, out, options, samples=samples, device="cpu")
            pairs += [str(out), str(model)]
    compared(version, pairs, tmp_path)


def test_vllm_holds_distilled_experts(version: str, tmp_path: Path) -> None:
    """What `w4a8 distill` wrote, beside a model that has its trained norms."""
    pairs = []
    for write in (write_qwen3_moe, write_mixtral):
        pairs += distilled(write(tmp_path / write.__name__), "--rate", "6")
    compared(version, pairs, tmp_path)


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return outputs with trained embeddings, each before a model of their numbers; trained until one can tell."""
    pairs = []
    for tied in (True, False):
        for preset, steps in (("tables", 60), ("weights", 8)):
            path = tmp_path_factory.mktemp("embeddings") / "model"
            model = write_llama(path, layers=2, initializer_range=0.06, tie_word_embeddings=tied)
            pairs += distilled(model, "--preset", preset, "--embeddings", "--rate", "4", "--steps", steps)
    return pairs


def test_vllm_holds_trained_embeddings(version: str, with_embeddings: list[str], tmp_path: Path) -> None:
    """Of models whose lm_head is their embeddings, and of some that have both: each is what was trained."""
    compared(version, with_embeddings, tmp_path)


def distilled(model: Path, *options: object) -> list[str]:
    """Quantize a model, train that, and put what was trained in 16 bits into the model; return OUT and the model."""
    start, out = quantized(model, model.with_name(f"{model.name}-start")), model.with_name(f"{model.name}-out")
    data = [write_data(model.with_name(f"{model.name}-{seed}.jsonl"), seed) for seed in range(2)]
    result = distill(start, model, data, out, *options)
    assert result.exit_code == 0, result.output
    before, trained = tensors(start), tensors(out)
    of_16_bits = tensors(model).keys() & trained.keys()
    assert any(not torch.equal(before[name], trained[name]) for name in of_16_bits)
    if "--embeddings" in options:
        assert all(not torch.equal(before[name], trained[name]) for name in of_16_bits if trained[name].dim() == 2)
    for path in model.glob("*.safetensors"):
        found = load_file(path)
        found |= {name: trained[name] for name in found.keys() & of_16_bits}
        save_file(found, path, metadata={"format": "pt"})
    return [str(out), str(model)]


def compared(version: str, pairs: list[str], directory: Path) -> None:
    """Check that vLLM's classes hold of each output what the model beside it holds."""
    rows_file = directory / "rows.json"
    command = [sys.executable, "-m", "zoo", "compare", *pairs, "--json", str(rows_file)]
    process = subprocess.run(
        command, env=environment.variables(version), cwd=directory, capture_output=True, text=True, check=False
    )
    assert rows_file.is_file(), process.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(rows_file.read_text(encoding="utf-8"))
    assert len(rows) == len(pairs)
    for row in rows:
        told = f"{row['architecture']} TP {row['tp']}: {row['status']} {row['reason']}"
        assert row["status"] in ((RIGHT,) if row["tp"] == 1 else (RIGHT, REFUSED)), told
        assert row["int4"] or row["status"] == REFUSED
