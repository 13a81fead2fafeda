"""How far predictions are from those of another model: divergence, perplexity, agreement, and what they may be off by.

Standard errors are over windows of text, which are more nearly independent than tokens; differences between checkpoints
are paired by window, so that what all find hard in a window cancels. Emulation and vLLM share this.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Activations that are not quantized."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Windows:
    """What a model made of each window, the mean over its tokens, float64 [W].

    kl: divergence from the 16-bit model in nats. loss: negative log-likelihood in nats. same: how often the likeliest
    token is that of the 16-bit model.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    same: torch.Tensor


def compare_logits(logits: torch.Tensor, base: torch.Tensor, targets: torch.Tensor) -> Windows:
    """Compare logits [B, T, V] of B windows with those of the 16-bit model.

    targets: the tokens that came, int64 [B, T]. KL(p ‖ q) = Σ p·(log p − log q) over the vocabulary, with p of the
    16-bit model.

    Raises ValueError if the vocabularies are of different size.
    """
    if logits.shape != base.shape:
        raise ValueError(f"predicts {list(logits.shape)}, the 16-bit model {list(base.shape)}: not the same vocabulary")
    ours, theirs = logits.float().log_softmax(-1), base.float().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    loss = -ours.gather(-1, targets[..., None])[..., 0]
    same = ours.argmax(-1) == theirs.argmax(-1)
    return Windows(*(column.double().mean(-1).cpu() for column in (kl, loss, same)))


def concatenate(parts: Sequence[Windows]) -> Windows:
    """Put windows in a row."""
    return Windows(*(torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "loss", "same")))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean over windows of values [W] and its standard error, 0 for a single window."""
    count = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else 0.0


def kind_of(quantization_config: Mapping[str, Any] | None) -> str:
    """Return what a checkpoint with this quantization_config is: BF16, W4A16, W4A8 lut or W4A8 compressed-tensors."""
    block = quantization_config or {}
    method = block.get("quant_method")
    if not block:
        return "BF16"
    groups = block.get("config_groups") or {}
    if method == "compressed-tensors" and any(group.get("input_activations") for group in groups.values()):
        return "W4A8 compressed-tensors"
    return "W4A8 lut" if method == "w4a8_lut" else "W4A16"


def score(name: str, kind: str, activations: str, windows: Windows, base_loss: torch.Tensor) -> Row:
    """Return one row, without its difference to the reference."""
    kl, kl_error = mean_and_error(windows.kl)
    nats, nats_error = mean_and_error(windows.loss - base_loss)
    return {
        "weights": name,
        "kind": kind,
        "activations": activations,
        "kl": kl,
        "kl_standard_error": kl_error,
        "perplexity": math.exp(float(windows.loss.mean())),
        "nats_per_token": nats,
        "nats_standard_error": nats_error,
        "agreement": float(windows.same.mean()),
        "kl_by_window": [float(f"{x:.5g}") for x in windows.kl.tolist()],
    }


def find_reference(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the W4A16 row with 16-bit activations that is the closest, or None."""
    rivals = [row for row in rows if row["kind"] == "W4A16" and row["activations"] in SIXTEEN_BITS]
    return min(rivals, key=lambda row: float(row["kl"]), default=None)


def add_differences(rows: Sequence[Row]) -> list[Row]:
    """Return rows with `kl_difference`, KL less that of the reference, and its standard error."""
    reference = find_reference(rows)
    result = []
    for row in rows:
        new = {key: value for key, value in row.items() if not key.startswith("kl_difference")}
        if reference is not None and row is not reference and row["kind"] != "BF16":
            ours, theirs = (torch.tensor(each["kl_by_window"], dtype=torch.float64) for each in (row, reference))
            new["kl_difference"], new["kl_difference_standard_error"] = mean_and_error(ours - theirs)
        result.append(new)
    return result


def merge(before: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the rows of a file with new ones behind them, or in the place of those that they measure again."""
    keys = [(row["weights"], row["activations"]) for row in new]
    return add_differences([*(row for row in before if (row["weights"], row["activations"]) not in keys), *new])


def rows_to_append_to(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a file.

    Raises ValueError unless it is there, and its settings are these.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; leave --append out to write it")
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        found = document.get("settings", {}).get(key)
        if found != value:
            raise ValueError(f"{path} has {key} {found}, not {value}: rows of both do not compare")
    return list(document["rows"])


HEADER = (
    f"{'weights':<26} {'kind':<23} {'acts':<4} {'KL, nats/token':>17} {'less closest W4A16':>19} {'perplexity':>10}"
    f" {'Δ nats/token':>18} {'agrees':>8}"
)


def render(row: Mapping[str, Any]) -> str:
    """Return a row as one line of the printed table."""

    def with_error(key: str, sign: str = "") -> str:
        error = row[f"{key.removesuffix('_per_token')}_standard_error"] if key in row else 0
        return f"{row[key]:{sign}.5f} ± {error:.5f}" if key in row else ""

    return (
        f"{row['weights']:<26} {row['kind']:<23} {row['activations']:<4} {with_error('kl'):>17}"
        f" {with_error('kl_difference', '+'):>19} {row['perplexity']:>10.4f} {with_error('nats_per_token', '+'):>18}"
        f" {row['agreement']:>8.2%}"
    )
