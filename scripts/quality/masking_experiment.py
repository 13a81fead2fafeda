"""What masking does where most of the calibration text is the same: one system prompt with descriptions of tools.

    masking_experiment.py MODEL WORK --text heldout_text.txt [--prompt tools] [--share 0.7] [--samples 64] [--seeds 3]

Writes into WORK, for each seed, the same pieces of clean text (the standard library's sources, see masking_data.py) as
two files of calibration data: clean.jsonl, the pieces alone, and traces.jsonl, each as the question of a chat behind
one system prompt, of which --share of all tokens is. Then it quantizes MODEL by each method on

    clean       the pieces alone: what masking can reach, but for what the prompt does to the values of the text
    unmasked    the traces as they are
    template    the traces with `--mask template,system`
    repeated    the traces with `--mask repeated`, which knows no template and keeps the prompt in the first one

and prints how far the predictions are from MODEL's on held-out text, as compare_kl.py does: W4A8 with FP8 activations
emulated, KL in nats per token. The text is read twice: by itself, and behind the prompt, which is not scored. Each
window's KL is the mean over the seeds, that is over choices of calibration text; standard errors are over windows, and
differences to `unmasked` are paired by window. The methods are `fast` and `full` with free tables, and with one scale
a group and the fast preset `uniform` and, with its scaling of input channels, `awq`. --data-only stops after the
files; --data-ready takes them as they lie there.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
from compare_kl import Judge
from divergence import Row, Windows, mean_and_error, score
from emulation import build_model, read_contents, read_windows
from masking_data import ARMS, PROMPTS, prompt_tokens, read_arm, trace, write_data
from results import PACKAGES, add_options, commit, save
from transformers.utils import logging

from convert_w4a8.api import quantize
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.samples.tokenizer import Tokenizer, open_tokenizer

QUESTION = "What does masking a repeated prompt do to a quantization that is calibrated on such traces?"
METHODS: Mapping[str, QuantizeOptions] = {
    "uniform": QuantizeOptions(preset="fast", tables="scale", awq_scaling=False),  # type: ignore[arg-type]
    "awq": QuantizeOptions(preset="fast", tables="scale", awq_scaling=True),  # type: ignore[arg-type]
    "fast": QuantizeOptions(preset="fast", tables="free"),  # type: ignore[arg-type]  # strings are taken too
    "full": QuantizeOptions(preset="full", tables="free"),  # type: ignore[arg-type]
}
REFERENCE = "unmasked"


class Place:
    """Held-out windows by themselves (`prefix` is None), or behind a prompt, and how far models are from the first."""

    def __init__(self, windows: torch.Tensor, prefix: torch.Tensor | None, args: argparse.Namespace) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="masking-")
        path = Path(self._directory.name)
        self._judge = Judge(windows, path, batch=args.batch, device=args.device, prefix=prefix)
        self.loss = torch.zeros(0)

    def measure(self, model: torch.nn.Module, *, base: bool = False) -> Windows:
        """Run a model; base: the one in 16 bits, which comes first."""
        found = self._judge.measure(model, fp8=not base)
        self.loss = found.loss if base else self.loss
        return found


def mean_of(windows: Sequence[Windows]) -> Windows:
    """Return the means over several models, window by window."""
    return Windows(*(torch.stack([getattr(w, name) for w in windows]).mean(0) for name in ("kl", "loss", "same")))


def rows_of(found: Mapping[tuple[str, str, str], list[Windows]], losses: Mapping[str, torch.Tensor]) -> list[Row]:
    """Return a row for each method, arm and place of the text; differences are to REFERENCE."""
    rows = []
    for (method, arm, place), windows in found.items():
        mean = mean_of(windows)
        row: Row = {"method": method, "data": arm, "place": place}
        row |= score(f"{method}, {arm}", "W4A8 lut", "fp8", mean, losses[place])
        row["kl_by_seed"] = [float(w.kl.mean()) for w in windows]
        others = found.get((method, REFERENCE, place), [])
        if arm != REFERENCE and len(others) == len(windows):
            less, error = mean_and_error(mean.kl - mean_of(others).kl)
            row |= {"kl_less_unmasked": less, "kl_less_unmasked_standard_error": error}
        rows.append(row)
    return rows


def render(row: Mapping[str, Any]) -> str:
    """Return a row as a line."""
    less = ""
    if "kl_less_unmasked" in row:
        less = f", less unmasked {row['kl_less_unmasked']:+.5f} ± {row['kl_less_unmasked_standard_error']:.5f}"
    seeds = " ".join(f"{x:.5f}" for x in row["kl_by_seed"])
    where = f"{row['method']:<8} {row['data']:<9} {row['place']:<14}"
    return f"{where} KL {row['kl']:.5f} ± {row['kl_standard_error']:.5f}{less}; seeds {seeds}"


def prefix_of(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """Return the tokens int64 [P] that come before the text of a trace."""
    text = tokenizer.apply_chat_template(trace(prompt, "\ue000"), tokenize=False).split("\ue000")[0]
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model in 16 bits")
    parser.add_argument("work", type=Path, help="directory for the data and the checkpoints")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, documents separated by NUL")
    parser.add_argument("--prompt", choices=PROMPTS, default="tools", help="what the repeated prompt is (tools)")
    parser.add_argument("--share", type=float, default=0.7, help="of the prompt in all tokens (default 0.7)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="choices of calibration text (default 3)")
    parser.add_argument("--methods", default=",".join(METHODS), help="of " + ", ".join(METHODS))
    parser.add_argument("--tokens", type=int, default=61_440, help="how much of the text to read (default 61440)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quantize-on", metavar="DEVICE", help="another device to quantize on")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data-only", action="store_true", help="stop when the data are written")
    data.add_argument("--data-ready", action="store_true", help="the data are in WORK already")
    add_options(parser)
    args = parser.parse_args()
    args.methods, args.quantize_on = args.methods.split(","), args.quantize_on or args.device
    if not 0 < args.share < 1 or not set(args.methods) <= METHODS.keys():
        parser.error("--share is between 0 and 1, and --methods are " + ", ".join(METHODS))
    return args


def main() -> int:
    """Print a line for each method, arm and place, after each seed; those of the last seed are of all."""
    args = parse()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer, prompt = open_tokenizer(args.model), PROMPTS[args.prompt]()
    works = [args.work / f"seed-{seed}" for seed in range(args.seeds)]
    for seed, work in enumerate(works if not args.data_ready else ()):
        write_data(args.model, work, [args.text], prompt, args.share, args.samples, seed)
    data = {(work, arm.name): read_arm(arm, work, tokenizer) for work in works for arm in ARMS}
    if args.data_only:
        return 0
    windows = read_windows(args.model, args.text, args.tokens, args.window)
    contents = read_contents(args.model)
    places = {
        "alone": Place(windows, None, args),
        "behind the prompt": Place(windows, prefix_of(tokenizer, prompt), args),
    }
    model = build_model(contents, contents.dtype, args.device)
    for place in places.values():
        place.measure(model, base=True)
    found: dict[tuple[str, str, str], list[Windows]] = {}
    settings = {
        key: getattr(args, key) for key in ("prompt", "share", "samples", "seeds", "window", "device", "quantize_on")
    }
    settings |= {"prompt_tokens": prompt_tokens(tokenizer, prompt), "text": args.text.name, "windows": len(windows)}
    settings["tokens_kept"] = {arm.name: data[works[0], arm.name].kept for arm in ARMS}
    for work in works:
        for method in args.methods:
            for arm in ARMS:
                start, out = time.monotonic(), work / f"{method}-{arm.name}"
                samples = data[work, arm.name]
                quantize(args.model, out, METHODS[method], samples=samples, device=args.quantize_on, overwrite=True)
                seconds = time.monotonic() - start
                model = build_model(read_contents(out), contents.dtype, args.device)
                for name, place in places.items():
                    found.setdefault((method, arm.name, name), []).append(place.measure(model))
                print(f"{work.name} {method} {arm.name}: {seconds:.0f} s", flush=True)
        rows = [row | {"commit": commit()} for row in rows_of(found, {name: p.loss for name, p in places.items()})]
        print(*map(render, rows), sep="\n", flush=True)
        save(args, QUESTION, rows, packages=(*PACKAGES, "transformers"), settings=settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
