"""Compare what vLLM computes from a `w4a8_lut` checkpoint and from the stock checkpoint of the same conversion.

    check_equivalence.py LUT_DIR STOCK_DIR [--tp 2] [--text-file F | --tokens-file F] [--json OUT] [--quick]

Each engine runs in a process of its own. At tensor-parallel size 1, greedy tokens and the log-probabilities of all
prompt tokens must be identical, in eager mode and compiled with CUDA graphs. vLLM quantizes the scales of the stock
checkpoint at load with `QuantFP8`, which is a CUDA kernel in eager mode and other arithmetic (a multiplication by the
reciprocal) when compiled; `compiled` therefore keeps the CUDA kernel (`custom_ops: ["+quant_fp8"]`), and
`compiled-default` is vLLM as it comes: reported, not demanded.

At a larger size, stock vLLM computes channel scales from each rank's part of the input channels, we store those of
the whole row. The mean deviation of plugin and stock at that size must not exceed 1.5 times (two independent
deviations add up to √2) that of stock from stock at size 1.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import vllm_engine

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"compilation_config": {"custom_ops": ["+quant_fp8"]}},
    "compiled-default": {},
}


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over all prompts, in this process."""
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


def main() -> int:
    """Run the engines, print the table, return 1 if a demand is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lut", type=Path)
    parser.add_argument("stock", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--tokens-file", type=Path)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    parser.add_argument("--quick", action="store_true", help="eager mode only, 4 prompts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.modes, args.prompts = ["eager"], 4
    prompts = make_prompts(args)

    def run(directory: Path, mode: str, tp: int) -> Any:
        llm = {
            "model": str(directory),
            "tensor_parallel_size": tp,
            "skip_tokenizer_init": True,
            "max_model_len": max(map(len, prompts)) + args.new_tokens,
            "max_num_seqs": 16,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "enable_prefix_caching": False,
            "generation_config": "vllm",
            "disable_custom_all_reduce": args.disable_custom_all_reduce,
            "seed": 0,
            **MODES[mode],
        }
        result = vllm_engine.run_worker(__file__, {"llm": llm, "prompts": prompts, "new_tokens": args.new_tokens})
        print(f"{directory.name} {mode} TP {tp}: start {result['start_s']} s, all {result['wall_s']} s", flush=True)
        return result["outputs"]

    rows: list[dict[str, Any]] = []

    def note(mode: str, what: str, a: Any, b: Any) -> dict[str, Any]:
        row = {"mode": mode, "what": what, **compare(a, b)}
        rows.append(row)
        return row

    met = True
    for mode in args.modes:
        one = run(args.stock, mode, 1)
        if args.tp == 1:
            row = note(mode, "plugin, stock", run(args.lut, mode, 1), one)
            if not row["identical"]:
                note(mode, "stock, stock again", run(args.stock, mode, 1), one)
                met &= mode == "compiled-default"
            continue
        stock, lut = run(args.stock, mode, args.tp), run(args.lut, mode, args.tp)
        own = note(mode, f"stock TP {args.tp}, stock TP 1", stock, one)
        note(mode, f"plugin TP {args.tp}, stock TP 1", lut, one)
        both = note(mode, f"plugin TP {args.tp}, stock TP {args.tp}", lut, stock)
        met &= both["mean_gap"] <= 1.5 * own["mean_gap"]
    text = vllm_engine.table(
        ("mode", "compared", "prompt log-probs equal", "mean |gap|", "max |gap|", "greedy tokens equal"),
        [
            (
                row["mode"],
                row["what"],
                f"{row['prompt_logprobs_equal']} of {row['prompt_logprobs']}",
                f"{row['mean_gap']:.2e}",
                f"{row['max_gap']:.2e}",
                f"{row['tokens_equal']} of {row['tokens']}",
            )
            for row in rows
        ],
    )
    results = {"lut": str(args.lut), "stock": str(args.stock), "tp": args.tp, "met": met, "rows": rows}
    vllm_engine.finish(results, f"{text}\n{'demands met' if met else 'DEMANDS NOT MET'}", args.json)
    return 0 if met else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        Path(sys.argv[3]).write_text(json.dumps(worker(json.loads(Path(sys.argv[2]).read_text()))))
    else:
        sys.exit(main())
