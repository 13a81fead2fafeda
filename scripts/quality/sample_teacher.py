"""Write text to distill on that the teacher writes itself: beginnings of real text, continued by sampling.

    sample_teacher.py TEACHER OUT --data FILE ... [--tokens 1000000] [--window 512] [--kept 32] [--batch 256] [--seed 0]

Each window begins with --kept tokens from a random place of one of the samples, and goes on to --window tokens drawn
from the teacher's predictions, at temperature 1 and from the whole vocabulary (Liu et al. 2023, "LLM-QAT"). FILE is as
for `w4a8 distill --data`, or a .npy of windows of tokens, uint16 [W, T]. OUT is such a .npy, or JSON lines with a key
`input_ids`, .gz or not, for `w4a8 distill --data`. --seconds stops before --tokens are there.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer

Tokens = npt.NDArray[np.integer[Any]]


def read(paths: Sequence[Path], teacher: Path) -> list[Tokens]:
    """Return the tokens of all samples, each [T]."""
    found: list[Tokens] = []
    for path in paths:
        if path.suffix == ".npy":
            found += list(np.load(path, mmap_mode="r"))
        else:
            found += [sample.tokens for sample in read_samples([path], open_tokenizer(teacher)).samples]
    return found


def beginnings(samples: Sequence[Tokens], kept: int, count: int, generator: np.random.Generator) -> torch.Tensor:
    """Return so many tokens from random places of random samples, none shorter than that: int64 [count, kept]."""
    chosen = [samples[number] for number in generator.integers(len(samples), size=count)]
    places = [generator.integers(len(sample) - kept + 1) for sample in chosen]
    rows = [sample[place : place + kept].astype(np.int64) for sample, place in zip(chosen, places, strict=True)]
    return torch.from_numpy(np.stack(rows))


def continued(model: Any, begun: torch.Tensor, length: int) -> torch.Tensor:
    """Return [B, K] tokens with what a model of transformers goes on with, int64 [B, length].

    What the model's generation_config.json asks for does not count, and an end of text ends nothing: the next document
    begins behind it, as in training.
    """
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    model.generation_config = GenerationConfig.from_dict({"max_new_tokens": length - begun.shape[1], **drawn})
    written: torch.Tensor = model.generate(begun, attention_mask=torch.ones_like(begun))
    return written


def sampled(
    model: Any, samples: Sequence[Tokens], kept: int, window: int, batch: int, seed: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield batches of windows without end, int64 [batch, window]; the same of the same seed."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    while True:
        begun = beginnings(samples, kept, batch, generator).to(model.device)
        yield continued(model, begun, window).cpu().numpy()


def write(windows: npt.NDArray[np.int64], out: Path) -> None:
    """Write windows as .npy, or as lines of JSON."""
    if out.suffix == ".npy":
        np.save(out, windows.astype(np.uint16))
        return
    with gzip.open(out, "wt") if out.suffix == ".gz" else out.open("w") as file:
        file.writelines(json.dumps({"input_ids": window}, separators=(",", ":")) + "\n" for window in windows.tolist())


def main() -> int:
    """Sample until there are enough tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--kept", type=int, default=32, help="tokens of a window that are real, 1 or more")
    parser.add_argument("--batch", type=int, default=256, help="windows at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no batch begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not 1 <= args.kept < args.window:
        parser.error("--kept is 1 or more, and less than --window")
    began = time.monotonic()
    samples = [sample for sample in read(args.data, args.teacher) if len(sample) >= args.kept]
    if not samples:
        parser.error(f"no sample of --data has --kept {args.kept} tokens")
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(args.device).eval()
    if args.out.suffix == ".npy" and model.config.vocab_size > 1 << 16:
        parser.error("the vocabulary has more than 65,536 tokens, and .npy holds 16 bits of each: write JSON lines")
    found, tokens = [], 0
    for windows in sampled(model, samples, args.kept, args.window, args.batch, args.seed):
        found.append(windows)
        tokens += windows.size
        took = time.monotonic() - began
        print(f"{tokens:,} tokens, {tokens / took:,.0f} a second", file=sys.stderr, flush=True)
        if tokens >= args.tokens or took >= args.seconds:
            break
    write(np.concatenate(found), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
