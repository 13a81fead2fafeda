"""`w4a8 distill` on models that train in a second."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY

from convert_w4a8.cli.main import main
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear

N, GROUPS = 16, 3
"""Of `random_layer`."""

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


def random_layer(seed: int = 0) -> W4A8Linear:
    """Return a layer with free tables, whose entries are in no order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, GROUPS * GROUP_SIZE), generator=generator).to(torch.uint8)
    entries = torch.randn(GROUPS, N, 8, generator=generator).mul_(30).to(torch.float8_e4m3fn)
    scale = torch.rand(N, generator=generator) * 1e-3 + 1e-4
    return W4A8Linear(pack_codes(codes), Packing.PACK_QUANTIZED, None, entries, scale)
