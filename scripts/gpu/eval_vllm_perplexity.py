"""Perplexity and next-token accuracy of checkpoints as vLLM serves them, by its own kernels.

    eval_vllm_perplexity.py w4a16=DIR reference=DIR search=DIR ... --text-file F --baseline w4a16 [--tokens 60000]

Every checkpoint scores the same windows of tokens, through the log-probabilities that vLLM gives of prompt tokens, so
that differences are paired: mean over tokens ± standard error, in nats. One engine each, in processes of their own,
with BF16 activations wherever the checkpoint leaves them alone. `scripts/bench/eval_perplexity.py` emulates the same on
a CPU, on the same tokens.

`--path decode` feeds the windows token by token, as generation does: `--batch` of them at a time, one token of each in
a step, so that every GEMM has that many rows, attention reads the cache, and with `--compiled` CUDA graphs run. With
`--path prefill decode` a checkpoint is scored both ways, and the difference between the two is reported:
`nats_over_prefill`, paired too, is noise if it is less than twice its standard error.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Score all windows on one engine in this process: per token its log-probability, and the likeliest token."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in payload["windows"]]
    logprobs, likeliest = [], []
    for window, output in zip(payload["windows"], llm.generate(prompts, params, use_tqdm=False), strict=True):
        # The first token of a window has nothing before it.
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(entry[token].logprob)
            likeliest.append(next(candidate for candidate, found in entry.items() if found.rank == 1))
    return {"logprobs": logprobs, "likeliest": likeliest, "start_s": round(started, 1)}


def read_windows(args: argparse.Namespace, tokenizer_directory: Path) -> list[list[int]]:
    """Return windows of token ids: given ones, or of a text whose documents (separated by NUL) are put in a row."""
    if args.tokens_file:
        ids: list[int] = json.loads(args.tokens_file.read_text())
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        ids = []
        for document in args.text_file.read_text().split("\0"):
            ids += tokenizer(document, add_special_tokens=False).input_ids
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            if len(ids) >= args.tokens:
                break
    count = min(len(ids), args.tokens) // args.window
    return [ids[i * args.window : (i + 1) * args.window] for i in range(count)]


def difference(result: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float]:
    """Return how many nats per token a result costs over another of the same tokens, and the standard error."""
    worse = [b - a for a, b in zip(result["logprobs"], base["logprobs"], strict=True)]
    return statistics.fmean(worse), statistics.stdev(worse) / math.sqrt(len(worse))


def score(result: dict[str, Any], base: dict[str, Any], targets: list[int]) -> dict[str, float]:
    """Return one checkpoint's scores beside the baseline's."""
    nats, standard_error = difference(result, base)
    hits, base_hits = (
        sum(a == b for a, b in zip(found["likeliest"], targets, strict=True)) for found in (result, base)
    )
    same = sum(a == b for a, b in zip(result["likeliest"], base["likeliest"], strict=True))
    return {
        "perplexity": math.exp(-statistics.fmean(result["logprobs"])),
        "nats_per_token": nats,
        "nats_standard_error": standard_error,
        "accuracy": hits / len(targets),
        "relative_accuracy": hits / base_hits,
        "agreement": same / len(targets),
    }


def scheduling(path: str, window: int, batch: int) -> dict[str, int]:
    """Return vLLM's options for a path: several windows a step, or one token of each of `batch` windows."""
    if path == "prefill":
        return {"max_num_seqs": 16, "max_num_batched_tokens": 16 * window}
    return vllm_engine.token_by_token(batch)


def serve(
    args: argparse.Namespace,
    directories: Mapping[str, Path],
    windows: Sequence[Sequence[int]],
    path: str = "prefill",
    batch: int = 16,
    *,
    script: str = __file__,
    more: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score the windows with an engine for each checkpoint, and return what the worker found by name.

    path, batch: as `scheduling` takes them. script: whose worker; it is given `llm`, the arguments of vLLM's LLM,
    `windows`, and `more`.
    """

    def run(name: str) -> dict[str, Any]:
        llm = {
            "model": str(directories[name]),
            "dtype": "bfloat16",
            "enforce_eager": not args.compiled,
            "skip_tokenizer_init": True,
            "max_model_len": args.window + 1,
            **scheduling(path, args.window, batch),
            # Not profiled, so that engines can start side by side; the utilization is only checked to be free.
            "kv_cache_memory_bytes": int(args.kv_cache_gib * 2**30),
            "gpu_memory_utilization": 0.1,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "generation_config": "vllm",
            "seed": 0,
        }
        result = vllm_engine.run_worker(script, {"llm": llm, "windows": windows, **(more or {})})
        kernels = ", ".join(result["kernels"])
        print(f"{name}, {path}: start {result['start_s']} s, all {result['wall_s']} s; {kernels}", flush=True)
        return result

    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(directories, pool.map(run, directories), strict=True))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what `serve` and `read_windows` take."""
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--compiled", action="store_true", help="vLLM as it comes; default: enforce_eager")
    parser.add_argument("--kv-cache-gib", type=float, default=4.0)
    parser.add_argument("--jobs", type=int, default=4, help="engines at a time, on the same GPU")
    add_options(parser)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text-file", type=Path, help="documents, separated by NUL")
    text.add_argument("--tokens-file", type=Path, help="a JSON list of token ids")
    parser.add_argument("--baseline", help="the checkpoint that differences are to; default: the first")
    parser.add_argument(
        "--path", nargs="+", choices=("prefill", "decode"), default=["prefill"], help="what computes them"
    )
    parser.add_argument("--batch", type=int, default=16, help="windows at a time where --path is decode")
    add_engine_options(parser)
    args = parser.parse_args()
    pairs = [named.partition("=")[::2] for named in args.checkpoints]
    args.directories = {name: Path(directory) for name, directory in pairs}
    args.baseline = args.baseline or pairs[0][0]
    if args.baseline not in args.directories:
        parser.error(f"no checkpoint is named {args.baseline}")
    for directory in args.directories.values():
        if not (directory / "config.json").is_file():
            parser.error(f"{directory} is not a checkpoint")
    return args


def main() -> int:
    """Run the engines and print the table."""
    args = parse()
    windows = read_windows(args, args.directories[args.baseline])
    targets = [token for window in windows for token in window[1:]]
    print(f"{len(windows)} windows of {args.window}, {len(targets)} tokens scored", flush=True)

    results = {path: serve(args, args.directories, windows, path, args.batch) for path in dict.fromkeys(args.path)}
    base = results[args.path[0]][args.baseline]
    rows: list[dict[str, Any]] = []
    for path, found in results.items():
        for name, result in found.items():
            row: dict[str, Any] = {"checkpoint": name, "path": path, **score(result, base, targets)}
            if path == "decode" and "prefill" in results:
                nats, standard_error = difference(result, results["prefill"][name])
                row |= {"nats_over_prefill": nats, "nats_over_prefill_standard_error": standard_error}
            rows.append(row)
    text = vllm_engine.table(
        (
            "checkpoint",
            "path",
            "perplexity",
            f"nats/token over {args.baseline}",
            "over prefill",
            "accuracy",
            "relative",
            "agrees",
        ),
        [
            (
                row["checkpoint"],
                row["path"],
                f"{row['perplexity']:.4f}",
                f"{row['nats_per_token']:+.5f} ± {row['nats_standard_error']:.5f}",
                f"{row['nats_over_prefill']:+.5f} ± {row['nats_over_prefill_standard_error']:.5f}"
                if "nats_over_prefill" in row
                else "",
                f"{row['accuracy']:.2%}",
                f"{row['relative_accuracy']:.2%}",
                f"{row['agreement']:.2%}",
            )
            for row in rows
        ],
    )
    question = f"What do the modes cost {args.directories[args.baseline].name}, by vLLM's kernels?"
    settings = {
        "tokens": len(targets),
        "window": args.window,
        "baseline": args.baseline,
        "compiled": args.compiled,
        "kernels": {name: result["kernels"] for name, result in results[args.path[0]].items()},
    }
    if "decode" in results:
        settings["batch"] = args.batch
        question = f"What does {args.directories[args.baseline].name} score token by token, and what by whole windows?"
    vllm_engine.finish(args, question, rows, text, **settings)
    return 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
