"""Perplexity and next-token accuracy of W4A8 against W4A16, emulated on a CPU through transformers.

Every quantized linear layer is replaced by one that multiplies by exactly the weights that the tensor core will see, in
float32, with BF16 outputs as the kernel writes them, and for `fp8` activations after vLLM's per-token quantization of
its inputs. All schemes read the same tokens, so differences are paired: mean over tokens ± standard error.

The difference in nats holds a part of first order, which is luck: any small change of the weights raises or lowers it,
and it may be negative. The divergence of the predictions is free of that, and so tells close schemes apart.

    python scripts/bench/eval_perplexity.py CHECKPOINT TEXT [--original DIR] [--tokens 30000] [--json FILE]
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from results import PACKAGES, add_options, line, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode, quantize_tokens
from convert_w4a8.linear import DenseLinear, W4A8Linear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_naive
from convert_w4a8.quantization.codes import to_symmetric
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.quantization.layer import to_w4a8
from convert_w4a8.sources import find_source

WINDOW = 512
BATCH = 4


Scheme = Callable[[W4Linear | DenseLinear], torch.Tensor]


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


class TableLinear(nn.Module):
    """A linear layer with float32 weights, BF16 output and, if asked for, per-token FP8 inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, fp8: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.fp8 = weight, bias, fp8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., K] by the weights, as `tables.gemm` does."""
        if self.fp8:
            tokens, scale = quantize_tokens(x.flatten(0, -2))
            y = (tokens.float() @ self.weight.t() * scale).view(*x.shape[:-1], -1)
        else:
            y = x.float() @ self.weight.t()
        y = y.to(x.dtype)
        return y if self.bias is None else y + self.bias


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


def read_windows(directory: Path, text: Path, tokens: int) -> torch.Tensor:
    """Tokenize the beginning of a text (documents separated by NUL) into windows, int64 [W, WINDOW]."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = []
    for document in text.read_text().split("\0"):
        ids += tokenizer(document, add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def load_model(checkpoint: Checkpoint, convert: Scheme, *, fp8: bool) -> tuple[nn.Module, float | None]:
    """Build the checkpoint's model in BF16 with its quantized layers replaced; also their mean SQNR."""
    config = AutoConfig.from_pretrained(checkpoint.root)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.eval()
    source = find_source(checkpoint)
    specs = source.find_layers(checkpoint, [])
    used = {(part.whole or part).name for spec in specs for part in spec.parts.values()}
    rest = {name: read_tensor(info).bfloat16() for name, info in checkpoint.tensors.items() if name not in used}
    unexpected = model.load_state_dict(rest, strict=False).unexpected_keys
    if unexpected:
        raise SystemExit(f"{checkpoint.root}: tensors that transformers has no place for: {', '.join(unexpected)}")
    sqnr = []
    for spec in specs:
        parent, _, child = spec.name.rpartition(".")
        layer = source.read_layer(spec, read_tensor)
        exact, weight = dequantize(layer), convert(layer)
        sqnr.append(sqnr_db(float(exact.square().sum()), float((weight - exact).square().sum())))
        before = model.get_submodule(spec.name)
        assert isinstance(before, nn.Linear)
        setattr(model.get_submodule(parent), child, TableLinear(weight, before.bias, fp8=fp8))
    return model, None if math.inf in sqnr else sum(sqnr) / len(sqnr)


@torch.inference_mode()
def read(model: nn.Module, base: nn.Module, windows: torch.Tensor) -> Tokens:
    """Run a model and the W4A16 model over windows [W, WINDOW]; every token but the first of each counts."""
    parts = []
    for batch in torch.split(windows, BATCH):
        targets = batch[:, 1:].flatten()
        ours, theirs = (m(input_ids=batch).logits[:, :-1].float().log_softmax(-1).flatten(0, 1) for m in (model, base))
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
    checkpoint = open_checkpoint(args.checkpoint)
    windows = read_windows(args.checkpoint, args.text, args.tokens)
    base, _ = load_model(checkpoint, dequantize, fp8=False)
    base_tokens = read(base, base, windows)
    yield compare(("w4a16", "bf16", None), base_tokens, base_tokens)
    if args.original:
        original: nn.Module = AutoModelForCausalLM.from_pretrained(args.original, dtype=torch.bfloat16)
        yield compare(("original", "bf16", None), read(original.eval(), base, windows), base_tokens)
    for activations in args.activations.split(","):
        for scheme in args.schemes.split(","):
            model, sqnr = load_model(checkpoint, SCHEMES[scheme], fp8=activations == "fp8")
            yield compare((scheme, activations, sqnr), read(model, base, windows), base_tokens)


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
