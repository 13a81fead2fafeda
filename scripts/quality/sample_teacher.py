"""Write text to distill on that the teacher writes itself: beginnings of real windows, continued by sampling.

    sample_teacher.py TEACHER OUT --beginnings FILE.npy [--tokens 1000000] [--kept 32] [--batch 256] [--seed 0]

Each window begins with --kept tokens from a random place of one of FILE's, uint16 [W, T], and goes on to T tokens drawn
from the teacher's predictions, at temperature 1 and from the whole vocabulary (Liu et al. 2023, "LLM-QAT"). OUT is
.npy of windows, uint16 [W, T], or JSON lines with a key `input_ids`, as `w4a8 distill --data` reads them. --seconds
stops before --tokens are there.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def beginnings(
    windows: npt.NDArray[np.uint16], kept: int, count: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return so many tokens from random places of random windows, int64 [count, kept]."""
    rows = generator.integers(len(windows), size=count)
    places = generator.integers(windows.shape[1] - kept + 1, size=count)
    return windows[rows[:, None], places[:, None] + np.arange(kept)].astype(np.int64)


def continued(model: PreTrainedModel, begun: torch.Tensor, length: int) -> torch.Tensor:
    """Return [B, K] tokens with what the model goes on with, int64 [B, length].

    An end of text ends nothing: the next document begins behind it, as in training.
    """
    written = model.generate(
        begun,
        attention_mask=torch.ones_like(begun),
        min_new_tokens=length - begun.shape[1],
        max_new_tokens=length - begun.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert isinstance(written, torch.Tensor)
    return written


def write(windows: npt.NDArray[np.uint16], out: Path) -> None:
    """Write windows as .npy, or as lines of JSON."""
    if out.suffix == ".npy":
        np.save(out, windows)
    else:
        lines = (json.dumps({"input_ids": window}, separators=(",", ":")) + "\n" for window in windows.tolist())
        out.write_text("".join(lines), encoding="utf-8")


def main() -> int:
    """Sample until there are enough tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--beginnings", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--kept", type=int, default=32, help="tokens of a window that are real")
    parser.add_argument("--batch", type=int, default=256, help="windows at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no batch begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    began = time.monotonic()
    real = np.load(args.beginnings, mmap_mode="r")
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(args.device).eval()
    if model.config.vocab_size > 1 << 16:
        parser.error("the vocabulary has more than 65,536 tokens: windows hold 16 bits of each")
    generator = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    length, found, tokens = real.shape[1], [], 0
    while tokens < args.tokens and time.monotonic() - began < args.seconds:
        begun = torch.from_numpy(beginnings(real, args.kept, args.batch, generator)).to(args.device)
        found.append(continued(model, begun, length).cpu().numpy().astype(np.uint16))
        tokens += found[-1].size
        took = time.monotonic() - began
        print(f"{tokens:,} tokens, {tokens / took:,.0f} a second", file=sys.stderr, flush=True)
    write(np.concatenate(found), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
