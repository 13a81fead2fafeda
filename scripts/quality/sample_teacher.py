"""Write text to distill on that the teacher writes itself: beginnings of real text, continued by sampling.

    sample_teacher.py TEACHER OUT --data FILE ... [--tokens 1000000] [--window 512] [--kept 32] [--batch 256] [--seed 0]

Each window begins with --kept tokens from a random place of the samples, and goes on to --window tokens drawn from the
teacher's predictions, at temperature 1 and from the whole vocabulary (Liu et al. 2023, "LLM-QAT"). TEACHER is a
directory. FILE is as for `w4a8 distill --data`, or a .npy of windows of tokens, uint16 [W, T]. OUT is such a .npy, or
JSON lines with a key `input_ids`, .jsonl or .jsonl.gz, for `w4a8 distill --data`; it is there when all is. --seconds or
Ctrl-C stop before --tokens are there.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from windows import load_windows

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer

Tokens = npt.NDArray[np.integer[Any]]


def read(paths: Sequence[Path], teacher: Path, vocab_size: int) -> list[Tokens]:
    """Return the tokens of all samples, each [T].

    Raises:
        ConvertError, ValueError: a file is not as it should be.

    """
    found: list[Tokens] = []
    for path in paths:
        if path.suffix == ".npy":
            windows = load_windows(path)
            if windows.max() >= vocab_size:
                raise ValueError(f"{path}: has tokens that the model does not")
            found += list(windows)
        else:
            samples = read_samples([path], open_tokenizer(teacher), vocab_size=vocab_size).samples
            found += [sample.tokens for sample in samples]
    return found


def beginnings(
    samples: Sequence[Tokens], kept: int, count: int, generator: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Yield so many tokens from places of the samples, any as likely as another, without end: int64 [count, kept].

    No sample is shorter than that.
    """
    ends = np.cumsum([len(sample) - kept + 1 for sample in samples])
    while True:
        drawn = generator.integers(ends[-1], size=count)
        chosen = np.searchsorted(ends, drawn, side="right")
        places = ends[chosen] - 1 - drawn  # as many from the last place on
        rows = [samples[n][place : place + kept].astype(np.int64) for n, place in zip(chosen, places, strict=True)]
        yield torch.from_numpy(np.stack(rows))


def continued(model: Any, begun: torch.Tensor, length: int) -> torch.Tensor:
    """Return [B, K] tokens with what a model of transformers goes on with, int64 [B, length].

    What the model's generation_config.json asks for does not count, and an end of text ends nothing: the next document
    begins behind it.
    """
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    model.generation_config = GenerationConfig.from_dict({"max_new_tokens": length - begun.shape[1], **drawn})
    written: torch.Tensor = model.generate(begun, attention_mask=torch.ones_like(begun))
    return written


def sampled(
    model: Any, samples: Sequence[Tokens], kept: int, window: int, batch: int, seed: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield batches of windows without end, int64 [batch, window]; the same of the same seed."""
    torch.manual_seed(seed)
    for begun in beginnings(samples, kept, batch, np.random.default_rng(seed)):
        yield continued(model, begun.to(model.device), window).cpu().numpy()


def until(batches: Iterator[npt.NDArray[np.int64]], tokens: int, seconds: float) -> Iterator[npt.NDArray[np.int64]]:
    """Yield batches until there are so many tokens, or so much time is over, or somebody interrupts; say how far."""
    began, count = time.monotonic(), 0
    with suppress(KeyboardInterrupt):
        for windows in batches:
            yield windows
            count += windows.size
            took = time.monotonic() - began
            print(f"{count:,} tokens, {count / took:,.0f} a second", file=sys.stderr, flush=True)
            if count >= tokens or took >= seconds:
                break


def write(batches: Iterator[npt.NDArray[np.int64]], out: Path) -> None:
    """Write windows as .npy, uint16, or as lines of JSON; whole or not at all."""
    part = out.with_name(out.name + ".part")
    try:
        with gzip.open(part, "wb", compresslevel=1) if out.suffix == ".gz" else part.open("wb") as file:
            if out.suffix == ".npy":
                np.save(file, np.concatenate([windows.astype(np.uint16) for windows in batches]))
            else:
                for windows in batches:
                    lines = (
                        json.dumps({"input_ids": window}, separators=(",", ":")) + "\n" for window in windows.tolist()
                    )
                    file.writelines(line.encode() for line in lines)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


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
    if not args.out.name.endswith((".npy", ".jsonl", ".jsonl.gz")) or not args.out.parent.is_dir():
        parser.error(f"{args.out}: name a .npy, .jsonl or .jsonl.gz in a directory that is there")
    config = AutoConfig.from_pretrained(args.teacher).get_text_config()
    if args.out.suffix == ".npy" and config.vocab_size > 1 << 16:
        parser.error("the vocabulary has more than 65,536 tokens, and .npy holds 16 bits of each: write JSON lines")
    most = getattr(config, "max_position_embeddings", None) or args.window
    if not 1 <= args.kept < args.window <= most:
        parser.error(
            f"--kept is 1 or more and less than --window, which is at most the {most} tokens that TEACHER takes"
        )
    try:
        samples = [s for s in read(args.data, args.teacher, config.vocab_size) if len(s) >= args.kept]
    except (ConvertError, ValueError) as error:
        parser.error(str(error))
    if not samples:
        parser.error(f"no sample of --data has --kept {args.kept} tokens")
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(args.device).eval()
    batches = sampled(model, samples, args.kept, args.window, args.batch, args.seed)
    write(until(batches, args.tokens, args.seconds), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
