"""What would distilling large models take, on one GPU or spread over several? On paper: nothing is run.

    predict_distill.py [--json FILE | --keep distill-paper]

One H100's times and bytes are those that `w4a8 distill --dry-run` predicts. Over several, each GPU holds its part of
both models and has a batch of its own, as torch's FSDP2 does it: blocks are brought together for each pass, and their
gradients summed, without computing meanwhile, as if NVLink connected all.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from convert_w4a8.distillation.linear import Preset
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.prediction import Sizes, predict_cost

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from results import PACKAGES, add_options, save

TOKENS = 50_000_000
"""Of a training."""
MODELS: dict[str, dict[str, Any]] = {
    "Llama 8B": {"hidden": 4096, "inner": 14336, "kv": 1024, "blocks": 32, "vocabulary": 128_256, "tied": False},
    "Command A 111B": {"hidden": 12288, "inner": 36864, "kv": 1024, "blocks": 64, "vocabulary": 256_000, "tied": True},
}
RUNS = (
    *(("Llama 8B", gpus, 8192) for gpus in (1, 2, 8)),
    *(("Command A 111B", gpus, 4096) for gpus in (8, 16, 32)),
)
"""Models, GPUs, and tokens of a step on each."""


def sizes(hidden: int, inner: int, kv: int, blocks: int, vocabulary: int, *, tied: bool) -> Sizes:
    """Return the sizes of a dense model in which every block has seven quantized layers."""
    layers = (*((n, hidden) for n in (hidden, kv, kv, hidden, inner, inner)), (hidden, inner))
    block = sum(n * k for n, k in layers)
    return Sizes(
        weights=blocks * block,
        active=blocks * block,
        channels=blocks * sum(n for n, _ in layers),
        width=blocks * sum(n + k for n, k in layers),
        block=block,
        layer=hidden * inner,
        others=(2 * blocks + 1) * hidden,
        fixed=vocabulary * hidden * (1 if tied else 2),
        hidden=hidden,
        blocks=blocks,
        vocabulary=vocabulary,
    )


def main() -> int:
    """Print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    args = parser.parse_args()
    rows = []
    for model, gpus, tokens in RUNS:
        size = sizes(**MODELS[model])
        for preset in Preset:
            for is_stored in (False, True):
                options = DistillOptions(preset, batch_tokens=tokens, recompute=True, steps=TOKENS // (tokens * gpus))
                teacher = 0 if is_stored else 2 * (size.weights + size.fixed + size.others)
                stored = 64 if is_stored else None
                cost = predict_cost(size, options, teacher_bytes=teacher, stored_rows=stored, top_k=64, gpus=gpus)
                rows.append(
                    {
                        "model": model,
                        "preset": str(preset),
                        "gpus": gpus,
                        "teacher": "on the disk" if is_stored else "beside",
                        "tokens_a_gpu": tokens,
                        "gib": cost.gpu_memory / 2**30,
                        "seconds_per_step": cost.seconds_per_step,
                        "hours": cost.seconds / 3600,
                    }
                )
                print(rows[-1])
    save(args, "What would distilling large models take?", rows, packages=PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
