"""`w4a8 distill` on models that train in a second."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY

from convert_w4a8.cli.main import main

FEW = ("--steps", "8", "--every", "2", "--batch-tokens", "256", "--device", "cpu")


def run(*arguments: object) -> Result:
    """Run `w4a8`."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def distill(start: Path, model: Path, data: list[Path], out: Path, *more: object) -> Result:
    """Run `w4a8 distill` for a few steps."""
    named = [part for path in data for part in ("--data", path)]
    return run("distill", start, "--teacher", model, *named, "--out", out, *FEW, *more)


def quantized(model: Path, out: Path) -> Path:
    """Quantize a model without data, and make its norms a tenth smaller, so that there is something to learn."""
    result = run("quantize", model, out, "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.output
    for path in out.glob("*.safetensors"):
        found = load_file(path)
        save_file({k: v * 0.9 if "norm" in k else v for k, v in found.items()}, path, metadata={"format": "pt"})
    return out


def write_data(path: Path, seed: int, count: int = 120) -> Path:
    """Write samples of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lines = [
        {"input_ids": torch.randint(VOCABULARY, (40 + i % 3,), generator=generator).tolist()} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found
