"""Perplexity and next-token accuracy of W4A8 against W4A16, emulated on a CPU through transformers.

Every quantized linear layer multiplies by exactly the weights that the tensor core will see, as
`scripts/quality/emulation.py` says. All schemes read the same tokens, so differences are paired: mean over tokens ±
standard error.

The difference in nats holds a part of first order, which is luck: any small change of the weights raises or lowers it,
and it may be negative. The divergence of the predictions is free of that, and so tells close schemes apart.

    python scripts/bench/eval_perplexity.py CHECKPOINT TEXT [--original DIR] [--tokens 30000] [--json FILE]
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).parent))
from emulation import Emulation, Scheme, build_model, read_contents, read_windows
from results import PACKAGES, add_options, line, save
from transformers.utils import logging

from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import DenseLinear, W4A8Linear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_naive
from convert_w4a8.quantization.codes import to_symmetric
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.quantization.layer import to_w4a8

WINDOW = 512
BATCH = 4


def naive(w: W4Linear | DenseLinear) -> torch.Tensor:
    """Decode a layer whose scales were cast to FP8 as they are."""
    symmetric, _ = to_symmetric(w)
    group_scale, channel_scale = quantize_naive(symmetric.scales)
    return decode(W4A8Linear(symmetric.packed, symmetric.packing, group_scale, None, channel_scale))


SCHEMES: dict[str, Scheme] = {
    "w4a16": dequantize,
    "rounded": lambda w: dequantize(w).bfloat16().float(),
    "naive": naive,
    "reference": lambda w: decode(to_w4a8(w, ScalesMode.REFERENCE)[0]),
    "stock": lambda w: decode(to_w4a8(w, ScalesMode.SEARCH, stock=True)[0]),
    "search": lambda w: decode(to_w4a8(w, ScalesMode.SEARCH)[0]),
    "direct": lambda w: decode(to_w4a8(w, ScalesMode.DIRECT)[0]),
}
"""Scheme → the weights, float32 [N, K], that a layer multiplies by. `stock` is `search` for stock vLLM to load, and
`rounded` W4A16 with weights in BF16: what any change at all costs in a BF16 model, the floor of the others."""


@dataclass(frozen=True)
class Tokens:
    """What a model made of every token of the text, one dimension.

    loss: negative log-likelihood in nats. hit: whether the likeliest token was right. agrees: whether it was that of
    W4A16. divergence: Kullback-Leibler divergence of the prediction from that of W4A16, in nats.
    """

    loss: torch.Tensor
    hit: torch.Tensor
    agrees: torch.Tensor
    divergence: torch.Tensor


@dataclass(frozen=True)
class Score:
    """One scheme's result. Differences, ratios, agreement and divergence are to W4A16 with BF16 activations.

    sqnr_db: mean over the quantized layers, weights against those of W4A16; None where they are equal.
    """

    scheme: str
    activations: str
    sqnr_db: float | None
    perplexity: float
    nats_per_token: float
    nats_standard_error: float
    divergence: float
    divergence_standard_error: float
    accuracy: float
    relative_accuracy: float
    agreement: float

    def __str__(self) -> str:
        """Render as one line of the table."""
        return (
            f"{self.scheme:<10} {self.activations:<5} {'' if self.sqnr_db is None else f'{self.sqnr_db:.2f}':>7}"
            f" {self.perplexity:>10.4f} {self.nats_per_token:>+10.5f} ± {self.nats_standard_error:.5f}"
            f" {self.divergence:>9.5f} ± {self.divergence_standard_error:.5f}"
            f" {self.accuracy:>8.2%} {self.relative_accuracy:>8.2%} {self.agreement:>7.2%}"
        )


HEADER = (
    f"{'scheme':<10} {'acts':<5} {'SQNR dB':>7} {'perplexity':>10} {'Δ nats/token':>20} {'divergence':>19}"
    f" {'accuracy':>8} {'of W4A16':>8} {'agrees':>7}"
)


@dataclass(frozen=True)
class Model:
    """A model that is run with BF16 or FP8 activations. sqnr_db: mean of its layers, None where they are exact."""

    model: nn.Module
    fp8: bool = False
    sqnr_db: float | None = None

    def predict(self, ids: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities float32 [B·(T − 1), V] of what follows each token of int64 [B, T] but the last."""
        with torch.no_grad(), Emulation(self.model, fp8=self.fp8):
            logits: torch.Tensor = self.model(input_ids=ids).logits
        return logits[:, :-1].float().log_softmax(-1).flatten(0, 1)


def load_model(directory: Path, scheme: Scheme = dequantize, *, fp8: bool = False) -> Model:
    """Build a checkpoint's model in BF16, its quantized layers as the scheme says."""
    exact, contents = read_contents(directory), read_contents(directory, scheme)
    noises = [
        sqnr_db(float(weight.square().sum()), float((contents.layers[name] - weight).square().sum()))
        for name, weight in exact.layers.items()
    ]
    sqnr = None if math.inf in noises or not noises else sum(noises) / len(noises)
    return Model(build_model(contents, torch.bfloat16), fp8, sqnr)


def read(model: Model, base: Model, windows: torch.Tensor) -> Tokens:
    """Run a model and the W4A16 model over windows [W, WINDOW]; every token but the first of each counts."""
    parts = []
    for batch in torch.split(windows, BATCH):
        targets = batch[:, 1:].flatten()
        ours, theirs = model.predict(batch), base.predict(batch)
        likeliest = ours.argmax(-1)
        divergence = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        loss = -ours.gather(1, targets[:, None])[:, 0]
        parts.append((loss, likeliest == targets, likeliest == theirs.argmax(-1), divergence))
    return Tokens(*(torch.cat(column).double() for column in zip(*parts, strict=True)))


def compare(names: tuple[str, str, float | None], result: Tokens, base: Tokens) -> Score:
    """Score a scheme (its name, activations and SQNR) against W4A16 on the same tokens."""
    difference = result.loss - base.loss
    root = math.sqrt(len(difference))
    return Score(
        *names,
        perplexity=math.exp(result.loss.mean()),
        nats_per_token=float(difference.mean()),
        nats_standard_error=float(difference.std()) / root,
        divergence=float(result.divergence.mean()),
        divergence_standard_error=float(result.divergence.std()) / root,
        accuracy=float(result.hit.mean()),
        relative_accuracy=float(result.hit.mean() / base.hit.mean()),
        agreement=float(result.agrees.mean()),
    )


def evaluate(args: argparse.Namespace) -> Iterator[Score]:
    """Score W4A16, the original if given, and every scheme with every kind of activations."""
    windows = read_windows(args.checkpoint, args.text, args.tokens, WINDOW)
    base = load_model(args.checkpoint)
    base_tokens = read(base, base, windows)
    yield compare(("w4a16", "bf16", None), base_tokens, base_tokens)
    if args.original:
        yield compare(("original", "bf16", None), read(load_model(args.original), base, windows), base_tokens)
    for activations in args.activations.split(","):
        for scheme in args.schemes.split(","):
            model = load_model(args.checkpoint, SCHEMES[scheme], fp8=activations == "fp8")
            yield compare((scheme, activations, model.sqnr_db), read(model, base, windows), base_tokens)


def main() -> None:
    """Print a line a scheme, and write JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="W4A16 checkpoint directory")
    parser.add_argument("text", type=Path, help="held-out text, documents separated by NUL")
    parser.add_argument("--original", type=Path, help="the checkpoint in 16 bits that it was quantized from")
    parser.add_argument("--tokens", type=int, default=30_000, help="how much of the text to read (default 30000)")
    parser.add_argument(
        "--schemes", default="rounded,naive,reference,stock,search,direct", help=f"of {', '.join(SCHEMES)}"
    )
    parser.add_argument("--activations", default="bf16,fp8", help="of bf16, fp8")
    add_options(parser)
    args = parser.parse_args()
    unknown = (set(args.schemes.split(",")) - set(SCHEMES)) | (set(args.activations.split(",")) - {"bf16", "fp8"})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print(HEADER)
    scores, start = [], time.monotonic()
    for score in evaluate(args):
        print(score, f" {time.monotonic() - start:.0f} s", flush=True)
        scores.append(score)
        start = time.monotonic()
    question = f"What do the modes cost {args.checkpoint.name}, emulated on a CPU?"
    rows, settings = [asdict(score) for score in scores], {"tokens": args.tokens, "window": WINDOW}
    print(line(save(args, question, rows, packages=(*PACKAGES, "transformers"), settings=settings)))


if __name__ == "__main__":
    main()
