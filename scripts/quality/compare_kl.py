"""How far the predictions of checkpoints are from those of the 16-bit model, emulated on a CPU or any GPU.

    compare_kl.py MODEL [NAME=]DIR[@ACTIVATIONS]... --text FILE [--tokens 61440] [--window 512] [--json FILE]

MODEL is the 16-bit model. Each DIR is a checkpoint of it: W4A16 (AWQ, GPTQ, compressed-tensors, AutoRound), W4A8 as
this project writes it (`lut`, `compressed-tensors`), or in 16 bits. KL is the Kullback-Leibler divergence of the
checkpoint's predictions from MODEL's over the whole vocabulary, in nats per token; the first token of a window is not
scored. Standard errors are over windows, and differences to the closest W4A16 checkpoint with 16-bit activations are
paired by window. `scripts/quality/emulation.py` says what is emulated.

ACTIVATIONS of the quantized layers: bf16 or fp16, fp8 (per token, as vLLM quantizes them), or several with commas. By
default W4A8 has fp8 and all others the dtype of their config.json. The weights of W4A16 are exact, not rounded to 16
bits, which is in favour of it. `MODEL@fp8` says what FP8 activations alone cost.

--append adds rows to a file that --keep or --json names, of the same text and model, instead of replacing it.
"""

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
from divergence import (
    HEADER,
    SIXTEEN_BITS,
    Row,
    Windows,
    compare_logits,
    concatenate,
    merge,
    render,
    rows_to_append_to,
    score,
)
from emulation import Contents, Emulation, build_model, read_contents, read_windows
from results import PACKAGES, RESULTS, add_options, commit, line, save
from transformers.utils import logging

from convert_w4a8.errors import ConvertError

QUESTION = "How far are the predictions from those of the model in 16 bits?"
ACTIVATIONS = (*SIXTEEN_BITS, "fp8")
_SPEC = re.compile(rf"(?:(?P<name>[^=/]+)=)?(?P<directory>.+?)(?:@(?P<activations>(?:{'|'.join(ACTIVATIONS)}|,)+))?")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be measured. activations: empty for the default of its kind."""

    name: str
    directory: Path
    activations: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Read [NAME=]DIR[@ACTIVATIONS]."""
        match = _SPEC.fullmatch(text)
        if match is None or not Path(match["directory"]).is_dir():
            raise argparse.ArgumentTypeError(f"{text}: no such directory ([NAME=]DIR[@{'|'.join(ACTIVATIONS)}])")
        directory = Path(match["directory"])
        chosen = tuple(filter(None, (match["activations"] or "").split(",")))
        return cls(match["name"] or directory.absolute().name, directory, chosen)


class Judge:
    """Runs models over windows of tokens, beside the logits of the 16-bit model, which lie in a file.

    prefix: tokens int64 [P] that come before every window, and are not scored.
    """

    def __init__(
        self, windows: torch.Tensor, directory: Path, *, batch: int, device: str, prefix: torch.Tensor | None = None
    ) -> None:
        self.windows, self._batch, self._device = windows, batch, device
        self._prefix = torch.zeros(0, dtype=torch.int64) if prefix is None else prefix
        self._file = directory / "logits"
        self._base: torch.Tensor | None = None

    def measure(self, model: nn.Module, *, fp8: bool) -> Windows:
        """Run a model; the first one is the 16-bit model that the others are compared with."""
        parts = []
        base, first = self._base, self._base is None
        with torch.no_grad(), Emulation(model, fp8=fp8):
            for start in range(0, len(self.windows), self._batch):
                ids = self.windows[start : start + self._batch]
                whole = torch.cat([self._prefix.expand(len(ids), -1), ids], 1).to(self._device)
                ids = ids.to(self._device)
                logits = model(input_ids=whole, use_cache=False, logits_to_keep=ids.shape[1]).logits[:, :-1]
                if base is None:
                    shape = (len(self.windows), *logits.shape[1:])
                    size = math.prod(shape)
                    base = torch.from_file(str(self._file), shared=True, size=size, dtype=logits.dtype).view(shape)
                if first:
                    base[start : start + self._batch] = logits
                theirs = base[start : start + self._batch].to(self._device)
                parts.append(compare_logits(logits, theirs, ids[:, 1:]))
        self._base = base
        return concatenate(parts)


def measure(candidate: Candidate, judge: Judge, base_loss: torch.Tensor, device: str) -> Iterator[Row]:
    """Yield a row for each kind of activations of a checkpoint.

    Raises:
        ConvertError, ValueError: it cannot be read, or is not of the same model.

    """
    contents = read_contents(candidate.directory)
    default = "fp8" if contents.kind.startswith("W4A8") else own_activations(contents)
    built: tuple[torch.dtype, nn.Module] | None = None
    for activations in candidate.activations or (default,):
        dtype = SIXTEEN_BITS.get(activations, torch.bfloat16)
        if built is None or built[0] != dtype:
            built = dtype, build_model(contents, dtype, device)
        found = judge.measure(built[1], fp8=activations == "fp8")
        yield score(candidate.name, contents.kind, activations, found, base_loss) | {"commit": commit()}


def own_activations(contents: Contents) -> str:
    """Return what the activations are where they are not quantized."""
    return next(name for name, dtype in SIXTEEN_BITS.items() if dtype == contents.dtype)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Candidate.parse, help="the 16-bit model")
    parser.add_argument("checkpoints", type=Candidate.parse, nargs="*", metavar="[NAME=]DIR[@ACTIVATIONS]")
    what = "held-out text, documents separated by NUL, or a .npy of windows of tokens, uint16 [W, T]"
    parser.add_argument("--text", type=Path, required=True, help=what)
    parser.add_argument("--tokens", type=int, default=61_440, help="how much of the text to read (default 61440)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--append", action="store_true", help="add rows to the file that --keep or --json names")
    add_options(parser)
    args = parser.parse_args()
    if args.append and not (args.keep or args.json):
        parser.error("--append needs --keep or --json")
    return args


def main() -> int:
    """Print a line a row, and write JSON if asked for; return 1 if a checkpoint could not be measured."""
    args = parse()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        windows = read_windows(args.model.directory, args.text, args.tokens, args.window)
    except ValueError as error:
        sys.exit(str(error))
    settings = {
        "model": args.model.directory.absolute().name,
        "text": args.text.name,
        "windows": len(windows),
        "window": args.window,
        "device": args.device,
    }
    try:
        path = RESULTS / f"{args.keep}.json" if args.keep else args.json
        before = rows_to_append_to(path, settings) if args.append else []
        contents = read_contents(args.model.directory)
        model = build_model(contents, contents.dtype, args.device)
    except (ConvertError, ValueError) as error:
        sys.exit(str(error))
    print(HEADER)
    rows: list[Row] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="compare-kl-") as directory:
        judge = Judge(windows, Path(directory), batch=args.batch, device=args.device)
        base = judge.measure(model, fp8=False)
        if not args.append:
            row = score(args.model.name, contents.kind, own_activations(contents), base, base.loss)
            rows.append(row | {"commit": commit()})
            print(render(rows[0]), flush=True)
        for candidate in args.checkpoints:
            start = time.monotonic()
            try:
                for row in measure(candidate, judge, base.loss, args.device):
                    rows.append(row)
                    print(render(row), f" {time.monotonic() - start:.0f} s", flush=True)
            except (ConvertError, ValueError) as error:
                print(f"{candidate.name}: {error}", file=sys.stderr)
                failed = True
    merged = merge(before, rows)
    packages = (*PACKAGES, "transformers")
    document = save(args, QUESTION, merged, packages=packages, settings=settings, merged=args.append)
    print(HEADER, *map(render, merged), line(document), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
