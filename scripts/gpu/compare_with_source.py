"""Serve a source and its conversions with vLLM, and compare the log-probabilities that they give of prompt tokens.

    compare_with_source.py SOURCE OUT... [--text-file F | --tokens-file F] [--json FILE] [--limit 0.02]

For sources that vLLM serves itself: W4A16 of every format, mixed precision (INT4 beside FP8 or BF16), AutoRound. All
score the same windows of tokens, so that differences are paired: nats per token over the source ± standard error, mean
and largest difference of a token, and how often both find the same token the likeliest.

Demanded of every output: that it costs no more than --limit nats per token (FP8 costs a model of 31M parameters 0.003
to 0.01), and that it agrees on the likeliest token as often as --agreement says. Weights that are not the source's, in
any layer, cost far more of a trained model. Without a text the tokens are random: then an untrained model can be
compared too, of which nats say little and the agreement much.

    python scripts/checkpoints/make_mixed_checkpoint.py ../shared/models/llama-31m-bf16 /tmp/mixed --attention fp8-block
    w4a8-convert /tmp/mixed /tmp/mixed-lut
    w4a8-convert /tmp/mixed /tmp/mixed-stock --format compressed-tensors
    python scripts/gpu/compare_with_source.py /tmp/mixed /tmp/mixed-lut /tmp/mixed-stock \
        --text-file ../shared/models/heldout_text.txt
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from eval_vllm_perplexity import add_engine_options, read_windows, score, serve


def random_windows(directory: Path, args: argparse.Namespace) -> list[list[int]]:
    """Return windows of random tokens of a checkpoint's vocabulary."""
    config = json.loads((directory / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    generator = random.Random(0)
    return [[generator.randrange(vocabulary) for _ in range(args.window)] for _ in range(args.tokens // args.window)]


def compare(result: dict[str, Any], source: dict[str, Any], targets: list[int]) -> dict[str, Any]:
    """Return how far an output's log-probabilities are from the source's."""
    gaps = [abs(a - b) for a, b in zip(result["logprobs"], source["logprobs"], strict=True)]
    return {**score(result, source, targets), "mean_gap": sum(gaps) / len(gaps), "max_gap": max(gaps)}


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text-file", type=Path, help="documents, separated by NUL")
    text.add_argument("--tokens-file", type=Path, help="a JSON list of token ids")
    parser.add_argument("--limit", type=float, default=0.02, help="nats per token that an output may cost")
    parser.add_argument("--agreement", type=float, default=0.9, help="how often the likeliest token is to be the same")
    add_engine_options(parser)
    args = parser.parse_args()
    for directory in (args.source, *args.outputs):
        if not (directory / "config.json").is_file():
            parser.error(f"{directory} is not a checkpoint")
    return args


def main() -> int:
    """Run the engines, print the table, return 1 if a demand is not met."""
    args = parse()
    has_text = args.text_file or args.tokens_file
    windows = read_windows(args, args.source) if has_text else random_windows(args.source, args)
    targets = [token for window in windows for token in window[1:]]
    print(f"{len(windows)} windows of {args.window}, {len(targets)} tokens scored", flush=True)
    directories = {str(directory): directory for directory in (args.source, *args.outputs)}
    results = serve(args, directories, windows)
    source = results[str(args.source)]
    rows = []
    for directory in args.outputs:
        found = compare(results[str(directory)], source, targets)
        met = found["nats_per_token"] <= args.limit and found["agreement"] >= args.agreement
        rows.append({"source": args.source.name, "output": directory.name, **found, "met": met})
    text = vllm_engine.table(
        ("output", "nats/token over the source", "mean |gap|", "max |gap|", "agrees", "demands"),
        [
            (
                row["output"],
                f"{row['nats_per_token']:+.5f} ± {row['nats_standard_error']:.5f}",
                f"{row['mean_gap']:.4f}",
                f"{row['max_gap']:.2f}",
                f"{row['agreement']:.2%}",
                "met" if row["met"] else "NOT MET",
            )
            for row in rows
        ],
    )
    settings = {
        "tokens": len(targets),
        "window": args.window,
        "random_tokens": not has_text,
        "limit": args.limit,
        "agreement": args.agreement,
        "compiled": args.compiled,
        "kernels": {name: result["kernels"] for name, result in results.items()},
    }
    question = f"Are the log-probabilities of {args.source.name}'s conversions those of the source?"
    vllm_engine.finish(args, question, rows, text, **settings)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
