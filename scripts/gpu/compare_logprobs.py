"""How far the predictions of checkpoints are from those of the 16-bit model as vLLM serves both, by its own kernels.

    compare_logprobs.py MODEL [NAME=]DIR... --text-file F [--tokens 61440] [--window 512]

What scripts/quality/compare_kl.py emulates, measured: KL divergence over the whole vocabulary, perplexity and agreement
on the likeliest token. vLLM gives log-probabilities of some tokens of a prompt only; so the logits from which it takes
them are caught in the engine's process, and held against the log-probabilities that it gives. One window is one
request. Everything is served with --dtype bfloat16, W4A8 with FP8 activations.

With --base-logits FILE the 16-bit model's logits are kept there (2 bytes each, 1 GB for 60k tokens of 8192), and a
later run with --append finds them there instead of serving the model again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine
from divergence import (
    HEADER,
    Row,
    Windows,
    compare_logits,
    concatenate,
    kind_of,
    merge,
    render,
    rows_to_append_to,
    score,
)
from eval_vllm_perplexity import add_engine_options, read_windows, serve
from results import RESULTS, commit

QUESTION = "How far are the predictions from those of the model in 16 bits, by vLLM's kernels?"
COLUMNS = ("kl", "loss", "same")
_GAP = 1e-3
"""The most by which the log-probability of a token may differ between vLLM's answer and the logits that were caught."""


def catch(model: Any, caught: list[Any]) -> None:
    """Let a model's `compute_logits` note what it returns. For `LLM.apply_model`."""
    compute = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        caught.append(logits)
        return logits

    model.compute_logits = compute_logits


def prompt_logits(caught: list[Any], count: int) -> Any:
    """Return the logits [count, V] after each prompt token but the last.

    vLLM computes those of a prompt at once, of all its tokens or of all but the last, apart from those of the one token
    that it samples.

    Raises ValueError if there is no such matrix, or more than one.
    """
    found = [logits for logits in caught if len(logits) in {count, count + 1} and len(logits) > 1]
    if len(found) != 1:
        raise ValueError(f"{[tuple(logits.shape) for logits in caught]} is not one matrix for {count} tokens")
    return found[0][:count]


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run all windows on one engine in this process, and compare with the logits of payload["file"], or write it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    caught: list[Any] = []
    llm.apply_model(lambda model: catch(model, caught))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    windows, write, base = payload["windows"], payload["write"], None
    parts, gap = [], 0.0
    for i, window in enumerate(windows):
        caught.clear()
        (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
        logits = prompt_logits(caught, len(window) - 1)
        if base is None:
            shape = (len(windows), *logits.shape)
            file = torch.from_file(payload["file"], shared=True, size=logits.numel() * len(windows), dtype=logits.dtype)
            base = file.view(shape)
        if write:
            base[i] = logits.cpu()
        theirs = base[i].to(logits.device)
        targets = torch.tensor(window[1:], device=logits.device)
        parts.append(compare_logits(logits[None], theirs[None], targets[None]))
        given = [entry[token].logprob for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        ours = logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu()
        gap = max(gap, float((ours - torch.tensor(given)).abs().max()))
    if not gap <= _GAP:
        raise ValueError(f"the logits that were caught are not those of vLLM's log-probabilities: {gap} apart")
    found = concatenate(parts)
    columns = {name: getattr(found, name).tolist() for name in COLUMNS}
    return {**columns, "gap": gap, "start_s": round(started, 1)}


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the 16-bit model")
    parser.add_argument("checkpoints", nargs="*", metavar="[NAME=]DIR")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text-file", type=Path, help="documents, separated by NUL")
    text.add_argument("--tokens-file", type=Path, help="a JSON list of token ids")
    parser.add_argument("--base-logits", type=Path, metavar="FILE", help="where the 16-bit model's logits are kept")
    parser.add_argument("--append", action="store_true", help="add rows to the file that --keep or --json names")
    add_engine_options(parser)
    parser.set_defaults(tokens=61_440)
    args = parser.parse_args()
    pairs = [text.rpartition("=") for text in args.checkpoints]
    args.directories = {name or Path(directory).absolute().name: Path(directory) for name, _, directory in pairs}
    if len(args.directories) < len(pairs):
        parser.error("two checkpoints have the same name; give NAME=DIR")
    for directory in (args.model, *args.directories.values()):
        if not (directory / "config.json").is_file():
            parser.error(f"{directory} is not a checkpoint")
    if args.append and not (args.keep or args.json):
        parser.error("--append needs --keep or --json")
    return args


def make_row(name: str, directory: Path, found: dict[str, Any], base_loss: list[float]) -> Row:
    """Return the row of what a worker found of a checkpoint."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = kind_of(config.get("quantization_config") or config.get("compression_config"))
    kl, loss, same, base = (torch.tensor(x, dtype=torch.float64) for x in (*(found[c] for c in COLUMNS), base_loss))
    activations = "fp8" if kind.startswith("W4A8") else "bf16"
    row = score(name, kind, activations, Windows(kl, loss, same), base)
    return row | {"commit": commit(), "kernels": found["kernels"]}


def main() -> int:
    """Run the engines and print the table; return 1 if one of them failed."""
    args = parse()
    windows = read_windows(args, args.model)
    settings = {
        "model": args.model.absolute().name,
        "read": (args.text_file or args.tokens_file).name,
        "windows": len(windows),
        "window": args.window,
        "compiled": args.compiled,
    }
    try:
        path = RESULTS / f"{args.keep}.json" if args.keep else args.json
        before = rows_to_append_to(path, settings) if args.append else []
    except ValueError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory(prefix="w4a8-logits-") as temporary:
        file = args.base_logits or Path(temporary) / "logits"
        name, noted = args.model.absolute().name, file.with_suffix(".json")
        if args.append and noted.is_file():
            found = json.loads(noted.read_text())
        else:
            more = {"file": str(file), "write": True}
            found = serve(args, {name: args.model}, windows, script=__file__, more=more)[name]
            noted.write_text(json.dumps(found))
        base = found["loss"]
        rows = [] if args.append else [make_row(name, args.model, found, base)]

        def run(label: str) -> Row | None:
            more = {"file": str(file), "write": False}
            try:
                answer = serve(args, {label: args.directories[label]}, windows, script=__file__, more=more)[label]
            except RuntimeError as error:
                print(f"{label}: {error}", file=sys.stderr, flush=True)
                return None
            return make_row(label, args.directories[label], answer, base)

        with ThreadPoolExecutor(args.jobs) as pool:
            answers = list(pool.map(run, args.directories))
    rows += filter(None, answers)
    merged = merge(before, rows)
    text = "\n".join([HEADER, *map(render, merged)])
    vllm_engine.finish(args, QUESTION, merged, text, merged=args.append, **settings)
    return 1 if None in answers else 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
