"""What masking does where most of the calibration text is the same: one system prompt with descriptions of tools.

    masking_experiment.py MODEL WORK --text heldout_text.txt [--share 0.7] [--samples 64] [--methods uniform,full]

Writes into WORK the same pieces of clean text (the standard library's sources, see make_calibration.py) as two files of
calibration data: clean.jsonl, the pieces alone, and traces.jsonl, each as the question of a chat behind one system
prompt, of which --share of all tokens is. Then it quantizes MODEL by each method on

    clean       the pieces alone: what masking can reach, but for what the prompt does to the values of the text
    unmasked    the traces as they are
    template    the traces with `--mask template,system`
    repeated    the traces with `--mask repeated`, which knows no template and keeps the prompt in the first one

and prints how far the predictions are from MODEL's on held-out text, as compare_kl.py does: W4A8 with FP8 activations
emulated, KL in nats per token, standard errors over windows, differences to `clean` paired by window. The methods are
`uniform` (preset fast, one scale a group) and `full` (preset full, free tables). --data-only stops after the files.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
from compare_kl import Judge
from divergence import Row, mean_and_error, score
from emulation import build_model, read_contents, read_windows
from make_calibration import HubTokenizer, library, unlike, windows_of
from results import PACKAGES, add_options, commit, save
from transformers.utils import logging

from convert_w4a8.api import quantize
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.samples.masks import NO_MASK, parse_mask
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.sample import SampleSet, TokenKind
from convert_w4a8.samples.tokenizer import Tokenizer, open_tokenizer

QUESTION = "What does masking a repeated prompt do to a quantization that is calibrated on such traces?"
METHODS: Mapping[str, QuantizeOptions] = {
    "uniform": QuantizeOptions(preset="fast", tables="scale"),  # type: ignore[arg-type]  # strings are taken too
    "full": QuantizeOptions(preset="full", tables="free"),  # type: ignore[arg-type]
}
CLEAN, TRACES = "clean.jsonl", "traces.jsonl"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
        },
    }
    for name, description, properties in (
        (
            "look_up_order",
            "Returns an order of the shop with its items, its state, and where the parcel was seen last.",
            {
                "order": {"type": "string", "description": "The number on the invoice, such as B-20417"},
                "with_items": {"type": "boolean", "description": "Whether to list the items", "default": True},
            },
        ),
        (
            "search_catalogue",
            "Finds articles by words, colour and price, the best matches first. At most fifty are returned.",
            {
                "words": {"type": "string", "description": "What the customer is looking for, in their own words"},
                "colour": {"type": "string", "enum": ["black", "white", "red", "green", "blue", "other"]},
                "price_up_to": {"type": "number", "description": "In euros, taxes included"},
            },
        ),
        (
            "book_return",
            "Books the return of an article and returns a label as a link. Ask for the reason before.",
            {
                "order": {"type": "string", "description": "The number on the invoice"},
                "article": {"type": "integer", "description": "Its place on the invoice, from 1 on"},
                "reason": {"type": "string", "enum": ["damaged", "wrong size", "late", "changed mind"]},
            },
        ),
    )
]
PROMPT = (
    "You answer customers of a shop for outdoor clothing. Be friendly and short, and use the customer's language. Say"
    " only what a tool has told you; if no tool can know it, hand the conversation to a person. Never promise a date, a"
    " refund or a discount. Call one tool at a time and wait for what it returns. These are the tools, as JSON schemas;"
    " a call is one line of JSON with the keys name and arguments.\n" + json.dumps(TOOLS, indent=1)
)


@dataclass(frozen=True)
class Arm:
    """One way to use the data."""

    name: str
    file: str
    mask: str


ARMS = (
    Arm("clean", CLEAN, ""),
    Arm("unmasked", TRACES, ""),
    Arm("template", TRACES, "template,system"),
    Arm("repeated", TRACES, "repeated"),
)


def trace(text: str) -> list[dict[str, str]]:
    """Return a chat with the prompt and a piece of text as the question."""
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]


def prompt_tokens(tokenizer: Tokenizer) -> int:
    """Return how many tokens of a trace are the same in all."""
    rendered = tokenizer.apply_chat_template(trace("x"), tokenize=True, return_dict=True)
    return len(rendered["input_ids"]) - 1


def write_data(model: Path, work: Path, texts: list[Path], share: float, samples: int, seed: int) -> None:
    """Write clean.jsonl and traces.jsonl of the same pieces, none of which is of the evaluation texts."""
    tokenizer = open_tokenizer(model)
    length = round(prompt_tokens(tokenizer) * (1 - share) / share)
    kept = unlike(library(Path(json.__file__).parents[1]), [path.read_text(encoding="utf-8") for path in texts], 0.02)
    pieces = windows_of(kept, HubTokenizer(model), samples, length, per_file=2, seed=seed)
    work.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        (CLEAN, [{"text": text} for text in pieces]),
        (TRACES, [{"messages": trace(t)} for t in pieces]),
    ):
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_arm(arm: Arm, work: Path, tokenizer: Tokenizer) -> SampleSet:
    """Read the samples of an arm, and say what they hold."""
    samples = read_samples([work / arm.file], tokenizer, parse_mask(arm.mask) if arm.mask else NO_MASK)
    prompt = 1 - int(samples.counts[[TokenKind.TEXT, TokenKind.USER]].sum()) / samples.seen
    print(f"{arm.name:<9} {samples.seen:>7,} tokens, {samples.kept:>7,} count; the prompt has {prompt:.1%}")
    return samples


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model in 16 bits")
    parser.add_argument("work", type=Path, help="directory for the data and the checkpoints")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, documents separated by NUL")
    parser.add_argument("--share", type=float, default=0.7, help="of the prompt in all tokens (default 0.7)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--tokens", type=int, default=61_440, help="how much of the text to read (default 61440)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="stop when the data are written")
    add_options(parser)
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if not 0 < args.share < 1 or not set(args.methods) <= METHODS.keys():
        parser.error("--share is between 0 and 1, and --methods are " + ", ".join(METHODS))
    return args


def main() -> int:
    """Print a line for each method and arm."""
    args = parse()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    write_data(args.model, args.work, [args.text], args.share, args.samples, args.seed)
    tokenizer = open_tokenizer(args.model)
    data = {arm.name: read_arm(arm, args.work, tokenizer) for arm in ARMS}
    if args.data_only:
        return 0
    windows = read_windows(args.model, args.text, args.tokens, args.window)
    contents = read_contents(args.model)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="masking-") as directory:
        judge = Judge(windows, Path(directory), batch=args.batch, device=args.device)
        base = judge.measure(build_model(contents, contents.dtype, args.device), fp8=False)
        for method in args.methods:
            clean: torch.Tensor | None = None
            for arm in ARMS:
                start, out = time.monotonic(), args.work / f"{method}-{arm.name}"
                quantize(args.model, out, METHODS[method], samples=data[arm.name], device=args.device, overwrite=True)
                seconds = time.monotonic() - start
                made = read_contents(out)
                found = judge.measure(build_model(made, contents.dtype, args.device), fp8=True)
                clean = found.kl if clean is None else clean
                more, error = mean_and_error(found.kl - clean)
                row = score(f"{method}, {arm.name}", made.kind, "fp8", found, base.loss)
                row |= {"kl_less_clean": more, "kl_less_clean_standard_error": error, "seconds": round(seconds)}
                row |= {
                    "method": method,
                    "data": arm.name,
                    "tokens": data[arm.name].tokens,
                    "tokens_kept": data[arm.name].kept,
                }
                rows.append(row | {"commit": commit()})
                print(
                    f"{method:<8} {arm.name:<9} KL {row['kl']:.5f} ± {row['kl_standard_error']:.5f}, less clean"
                    f" {more:+.5f} ± {error:.5f}, agreement {row['agreement']:.4f}, {seconds:.0f} s",
                    flush=True,
                )
    settings = {"share": args.share, "samples": args.samples, "prompt_tokens": prompt_tokens(tokenizer)}
    settings |= {"text": args.text.name, "windows": len(windows), "window": args.window, "device": args.device}
    save(args, QUESTION, rows, packages=(*PACKAGES, "transformers"), settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
