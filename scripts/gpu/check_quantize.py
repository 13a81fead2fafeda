"""Quantize a small model on a GPU and on a CPU: time, whether the bytes are the same, and how good the results are.

    python scripts/gpu/check_quantize.py MODEL DATA TEXT [--devices cuda cpu] [--windows 64] [--json FILE]

DATA is JSONL with a key `text`, of which the first --windows lines are taken; TEXT is held-out text. Everything is done
twice, the second time with an interruption in the second block, after which it goes on. A row: preset, device, seconds
of the whole first run (with compilers) and of the second, SHA-256 of all tensors, whether the second time gave the
same, and KL from MODEL with FP8 activations emulated (`compare_kl.py`).
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from compare_kl import Candidate, Judge, measure
from emulation import build_model, read_contents, read_windows
from results import PACKAGES, add_options, line, save
from transformers.utils import logging

from convert_w4a8.api import quantize
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.walk import Walk
from convert_w4a8.samples.read import read_samples
from convert_w4a8.samples.tokenizer import open_tokenizer

QUESTION = "Does a GPU quantize as well as a CPU?"
_SCORES = ("kl", "kl_standard_error", "kl_by_window", "perplexity", "agreement")


def digest(directory: Path) -> str:
    """Return the SHA-256 of all tensors of a checkpoint."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


@contextmanager
def interrupted() -> Iterator[None]:
    """Let Ctrl-C come in the second block."""
    original = Walk.quantize

    def stop(self: Walk, number: int, *args: Any, **more: Any) -> Iterator[Any]:
        for done in original(self, number, *args, **more):
            if number == 1:
                raise KeyboardInterrupt
            yield done

    with patch.object(Walk, "quantize", stop):
        yield


def main() -> None:
    """Print and keep a row for each preset and device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--presets", nargs="+", default=["fast", "full"], choices=[str(preset) for preset in Preset])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=61_440, help="of TEXT")
    add_options(parser)
    args = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    judge_on = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="check-quantize-") as name:
        scratch = Path(name)
        data = scratch / "data.jsonl"
        data.write_text("".join(args.data.read_text().splitlines(keepends=True)[: args.windows]))
        samples = read_samples([data], open_tokenizer(args.model))
        judge = Judge(read_windows(args.model, args.text, args.tokens, 512), scratch, batch=8, device=judge_on)
        contents = read_contents(args.model)
        base = judge.measure(build_model(contents, contents.dtype, judge_on), fp8=False)
        for device in args.devices:
            for preset in args.presets:
                seconds, digests = [], []
                options = QuantizeOptions(preset=Preset(preset))
                for again in (False, True):
                    out = scratch / f"{device}-{preset}-{again}"
                    start = time.perf_counter()
                    with suppress(KeyboardInterrupt), interrupted() if again else nullcontext():
                        quantize(args.model, out, options, samples=samples, device=device)
                    if again:
                        quantize(args.model, out, options, samples=samples, device=device, resume=True)
                    seconds.append(time.perf_counter() - start)
                    digests.append(digest(out))
                row: dict[str, Any] = {"preset": preset, "device": device, "tokens": samples.tokens}
                row |= {"seconds_first": seconds[0], "seconds_resumed": seconds[1], "sha256": digests[0]}
                row["same_twice"] = digests[0] == digests[1]
                (found,) = measure(Candidate(preset, out, ()), judge, base.loss, judge_on)
                rows.append(row | {key: found[key] for key in _SCORES})
                print({key: value for key, value in rows[-1].items() if key != "kl_by_window"}, flush=True)
                save(args, QUESTION, rows, packages=(*PACKAGES, "transformers"))  # as they come
    print(line(save(args, QUESTION, rows, packages=(*PACKAGES, "transformers"))))


if __name__ == "__main__":
    main()
