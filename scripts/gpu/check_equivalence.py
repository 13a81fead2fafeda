"""Compare what vLLM computes from a `w4a8_lut` checkpoint and from the stock checkpoint of the same conversion.

    check_equivalence.py LUT_DIR STOCK_DIR [--decode] [--tp 2] [--text-file F | --tokens-file F] [--json FILE] [--quick]

Both must have been converted with `--scales reference`. At tensor-parallel size 1, greedy tokens and the
log-probabilities of all prompt tokens must be identical wherever vLLM quantizes the stock checkpoint's scales with the
arithmetic that the `w4a8_lut` checkpoint has. There are two, because `QuantFP8` has two forms:

    compiled        vLLM as it comes: c = amax · fl(1/448)
    eager           enforce_eager, without the CUDA kernel: the same
    compiled-kernel compiled, with the CUDA kernel (`custom_ops: ["+quant_fp8"]`): c = amax / 448
    eager-default   enforce_eager as it comes: the same

Which arithmetic the checkpoint has is found by doing both, and its two modes are what runs unless `--modes` says
otherwise; a mode of the other arithmetic is reported, not demanded. Where outputs differ that must not, the stock
checkpoint runs once more, to show what an engine differs from itself.

That is asked of the plugin without its decode kernel: the same bytes by the same op. With `--decode` prompts are read
token by token, so that all log-probabilities come through decode, 16 tokens a step, and the plugin's decode kernel is
compared with CUTLASS. Where log-probabilities differ at all, they must not differ by more, in the mean, than 1.5 times
what those of stock do that differ from stock's own: run twice, or once so and once with prompts read at once. (All of
them differ between two kernels that round differently; between two batch sizes of one kernel, some do not.)
`--env NAME=VALUE` sets the plugin's options.

Each engine runs in a process of its own, which schedules by itself (no engine-core process whose batches depend on
when requests arrive: other batch sizes are other kernels and other roundings).

At a larger size, stock vLLM computes channel scales from each rank's part of the input channels, we store those of
the whole row. The mean deviation of plugin and stock at that size must not exceed 1.5 times (two independent
deviations add up to √2) that of stock from stock at size 1.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from results import add_options
from stock_scales import find_arithmetics

BATCH = 16
SLACK = 1.5
"""Two independent deviations add up to √2."""
MAX_LENGTH = 1024
GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8, BATCH]}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "compiled": ("reciprocal", {"compilation_config": GRAPHS}),
    "eager": ("reciprocal", {"enforce_eager": True, "compilation_config": {"custom_ops": ["-quant_fp8"]}}),
    "compiled-kernel": ("division", {"compilation_config": {"custom_ops": ["+quant_fp8"], **GRAPHS}}),
    "eager-default": ("division", {"enforce_eager": True}),
}
"""Mode → how vLLM quantizes scales in it, and its options."""


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over all prompts, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all requests are there before the first step
    # Inductor picks among its kernels by timing them: "stock again" must be compiled again to show what that does.
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    greedy = SamplingParams(
        temperature=0.0, max_tokens=payload["new_tokens"], ignore_eos=True, prompt_logprobs=1, logprobs=1
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in payload["prompts"]]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    found = []
    for prompt, output in zip(payload["prompts"], outputs, strict=True):
        completion = output.outputs[0]
        # The first prompt token has no log-probability.
        scored = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found.append(
            {
                "tokens": list(completion.token_ids),
                "prompt": [entry[token].logprob for token, entry in scored],
                "new": [
                    entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
                ],
            }
        )
    return {"outputs": found, "start_s": round(started, 1)}


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far two engines' outputs for the same prompts are apart."""
    pairs = list(zip(a, b, strict=True))
    gaps = [abs(x - y) for left, right in pairs for x, y in zip(left["prompt"], right["prompt"], strict=True)]
    new = [(x, y) for left, right in pairs for x, y in zip(left["tokens"], right["tokens"], strict=True)]
    return {
        "identical": a == b,
        "prompt_logprobs": len(gaps),
        "prompt_logprobs_equal": sum(gap == 0 for gap in gaps),
        "mean_gap": statistics.fmean(gaps),
        "unequal_gap": statistics.fmean([gap for gap in gaps if gap] or [0.0]),
        "max_gap": max(gaps),
        "tokens": len(new),
        "tokens_equal": sum(x == y for x, y in new),
    }


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Return token ids: given ones, those of NUL-separated documents, or random ones."""
    if args.tokens_file:
        prompts: list[list[int]] = json.loads(args.tokens_file.read_text())
        return prompts[: args.prompts]
    if args.text_file:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.stock)
        documents = [text for text in args.text_file.read_text().split("\0") if len(text) > 4 * args.prompt_tokens]
        return [tokenizer(text)["input_ids"][: args.prompt_tokens] for text in documents[: args.prompts]]
    config = json.loads((args.stock / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    generator = random.Random(0)
    lengths = [generator.randrange(2, args.prompt_tokens + 1) for _ in range(args.prompts)]
    return [[generator.randrange(vocabulary) for _ in range(length)] for length in lengths]


def setting(text: str) -> tuple[str, str]:
    """Return name and value of an environment variable."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, value


def parse() -> argparse.Namespace:
    """Return the arguments; ends with an error where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lut", type=Path)
    parser.add_argument("stock", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: the checkpoint's; one of them at --tp > 1")
    parser.add_argument("--prompts", type=int, default=BATCH)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--tokens-file", type=Path)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=4, help="engines of size 1 at a time, on the same GPU")
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    parser.add_argument("--decode", action="store_true", help="read prompts token by token; compare the decode kernel")
    parser.add_argument(
        "--env", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="for the decode kernel"
    )
    parser.add_argument("--quick", action="store_true", help="one mode, without compilation, 4 prompts")
    add_options(parser)
    parser.add_argument("--extend", action="store_true", help="add to what --json and --keep name, do not replace it")
    args = parser.parse_args()
    for directory in (args.lut, args.stock):
        if not (directory / "config.json").is_file():
            parser.error(f"{directory} is not a checkpoint")
    args.arithmetics = find_arithmetics(args.lut, args.stock)
    if not args.arithmetics:
        parser.error(
            "vLLM does not make the one checkpoint's scales of the other's: convert the source to the stock one with"
            " --scales reference, and that one to LUT_DIR"
        )
    print(f"scales of {args.lut.name}: by {' and by '.join(sorted(args.arithmetics))}", flush=True)
    if args.modes is None:
        args.modes = [mode for mode, (arithmetic, _) in MODES.items() if arithmetic in args.arithmetics][:2]
        if args.quick or args.tp > 1:
            args.modes = args.modes[-1:] if args.quick else args.modes[:1]
    if args.quick:
        args.prompts = min(args.prompts, 4)
    return args


@dataclass(frozen=True, order=True)
class Engine:
    """One engine to run.

    decode_kernel: ours, which the plugin has unless told otherwise. by_decode: prompts are read token by token. run:
    the second of two that are the same otherwise.
    """

    directory: Path
    tp: int
    decode_kernel: bool = False
    by_decode: bool = False
    run: int = 1


def serve(args: argparse.Namespace, prompts: list[list[int]], engine: Engine, mode: str) -> Any:
    """Run an engine in one of MODES and return its outputs."""
    llm = {
        "model": str(engine.directory),
        "tensor_parallel_size": engine.tp,
        "skip_tokenizer_init": True,
        # Not less than max_num_batched_tokens / max_num_seqs: vLLM warms up with requests of that many tokens, and
        # attention reads beyond the block tables of a shorter max_model_len (vllm-project/vllm#49751).
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": 8 * MAX_LENGTH,
        # Not profiled, so that engines can start side by side; the utilization is only checked to be free.
        "kv_cache_memory_bytes": int(args.kv_cache_gib * 2**30),
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "disable_custom_all_reduce": args.disable_custom_all_reduce,
        "seed": 0,
        **(vllm_engine.token_by_token(BATCH) if engine.by_decode else {}),
        **MODES[mode][1],
    }
    payload = {"llm": llm, "prompts": prompts, "new_tokens": args.new_tokens}
    environment = dict(args.env) if engine.decode_kernel else {"W4A8_LUT_DECODE": "cutlass"}
    result = vllm_engine.run_worker(__file__, payload, environment=environment)
    what = ("decode kernel, " if engine.decode_kernel else "") + ("by decode" if engine.by_decode else "by prefill")
    times = f"start {result['start_s']} s, all {result['wall_s']} s"
    print(f"{engine.directory.name} {mode} TP {engine.tp}, {what}: {times}", flush=True)
    return result["outputs"]


def pairs(args: argparse.Namespace) -> dict[str, tuple[Engine, Engine]]:
    """Return what is compared with what, by a name."""
    one, stock, lut = Engine(args.stock, 1), Engine(args.stock, args.tp), Engine(args.lut, args.tp)
    if args.decode:
        stock, lut = replace(stock, by_decode=True), replace(lut, by_decode=True)
        return {
            "stock again, stock": (replace(stock, run=2), stock),
            "stock by decode, by prefill": (stock, replace(stock, by_decode=False)),
            "plugin without decode kernel, stock": (lut, stock),
            "plugin, without decode kernel": (replace(lut, decode_kernel=True), lut),
        }
    if args.tp > 1:
        return {
            f"stock TP {args.tp}, stock TP 1": (stock, one),
            f"plugin TP {args.tp}, stock TP 1": (lut, one),
            f"plugin TP {args.tp}, stock TP {args.tp}": (lut, stock),
        }
    return {"plugin, stock": (lut, stock)}


def is_met(args: argparse.Namespace, mode: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the rows of one mode, as `pairs` orders them, are what they must be."""
    gaps = [float(row["mean_gap"]) for row in rows]
    demanded = MODES[mode][0] in args.arithmetics and args.tp == 1
    if args.decode:
        again, by_prefill, without, plugin = (float(row["unequal_gap"]) for row in rows)
        return (not demanded or without <= SLACK * again) and plugin <= SLACK * max(again, by_prefill)
    return gaps[-1] <= SLACK * gaps[0] if args.tp > 1 else not demanded or bool(rows[0]["identical"])


def main() -> int:
    """Run the engines, print the table, return 1 if a demand is not met."""
    args = parse()
    prompts = make_prompts(args)
    model = json.loads((args.stock / "config.json").read_text())["architectures"][0]
    compared = pairs(args)
    engines = sorted({engine for pair in compared.values() for engine in pair})
    # Engines on several GPUs run one at a time (their ranks wait for each other on the GPU), beside those on one.
    with ThreadPoolExecutor(args.jobs) as single, ThreadPoolExecutor(1) as several:
        runs = {
            (engine, mode): (single if engine.tp == 1 else several).submit(serve, args, prompts, engine, mode)
            for mode in args.modes
            for engine in engines
        }
    outputs = {key: future.result() for key, future in runs.items()}

    def row_of(mode: str, what: str, a: Any, b: Any) -> dict[str, Any]:
        return {"model": model, "tp": args.tp, "mode": mode, "what": what, **compare(a, b)}

    rows: list[dict[str, Any]] = []
    met = True
    for mode in args.modes:
        new = [row_of(mode, what, outputs[a, mode], outputs[b, mode]) for what, (a, b) in compared.items()]
        if not is_met(args, mode, new):
            met = False
            if args.tp == 1 and not args.decode:
                stock = Engine(args.stock, 1)
                again = serve(args, prompts, replace(stock, run=2), mode)
                new.append(row_of(mode, "stock, stock again", again, outputs[stock, mode]))
        rows += new
    text = vllm_engine.table(
        ("mode", "compared", "prompt log-probs equal", "mean |gap|", "of unequal", "max |gap|", "greedy tokens equal"),
        [
            (
                row["mode"],
                row["what"],
                f"{row['prompt_logprobs_equal']} of {row['prompt_logprobs']}",
                f"{row['mean_gap']:.2e}",
                f"{row['unequal_gap']:.2e}",
                f"{row['max_gap']:.2e}",
                f"{row['tokens_equal']} of {row['tokens']}",
            )
            for row in rows
        ],
    )
    text += f"\n{'demands met' if met else 'DEMANDS NOT MET'}"
    question = "Does the plugin compute what vLLM computes from the stock checkpoint?"
    if args.decode:
        question = "Is the decode kernel as near to CUTLASS as stock W4A8 is to itself?"
    settings: dict[str, Any] = {"scales": sorted(args.arithmetics), "met": met, "environment": dict(args.env)}
    vllm_engine.finish(args, question, rows, text, extend=args.extend, **settings)
    return 0 if met else 1


if __name__ == "__main__":
    vllm_engine.start(worker, main)
