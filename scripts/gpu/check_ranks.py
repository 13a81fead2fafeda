"""Compare ways to run one `w4a8_lut` checkpoint on several GPUs: with the decode kernels, without, early and late.

    check_ranks.py LUT_DIR [--tp 2] [--ways NAME...] [--text-file F] [--prompts 64] [--json FILE] [--answers FILE]

Every way is an engine of its own, in a process of its own, that reads prompts token by token, 16 tokens a step, so that
all goes through decode; see `check_equivalence.py`, whose modes these are. Each is compared with each, and with itself:
the first prompts are read twice by the same engine, which must give the same log-probabilities and tokens.

    cutlass-1       CUTLASS on one GPU
    kernel-1        the decode kernels on one GPU
    cutlass-eager   CUTLASS, without torch.compile and CUDA graphs, on several GPUs as all that follow
    cutlass         CUTLASS
    kernel          the decode kernels
    kernel-late     the same, no kernel launched before the one ahead of it has ended
    kernel-dense    the same for linear layers, CUTLASS for experts
    kernel-experts  the other way round
    kernel-custom   the same as `kernel`, sums over ranks by vLLM's own all-reduce instead of NCCL's
    cutlass-custom  likewise for CUTLASS
    cutlass-2, -3, kernel-2     the same as without a number, in an engine that is started, and compiled, by itself

What vLLM differs from itself is the gap between `cutlass` and the other ways that have its kernels. A kernel that read
before another rank's part has arrived would differ from `kernel-late`, or from itself. With --agreement the ranks also
compare what they give to experts, and which ones they choose (`rank_agreement.py`).
"""

import argparse
import fcntl
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import kernel_parts
import rank_agreement
import vllm_engine
from check_equivalence import BATCH, answers, engine_options, make_prompts, start_engine
from gaps import compare
from results import VLLM_PACKAGES, add_options, save, visible_gpus

QUESTION = "Are the decode kernels on several GPUs as near to CUTLASS as CUTLASS is to itself, and the same every time?"


@dataclass(frozen=True)
class Way:
    """How to run the checkpoint. part: a plugin that takes away a part of the decode kernels."""

    kernel: bool
    one_gpu: bool = False
    eager: bool = False
    part: str | None = None
    custom: bool = False


WAYS = {
    "cutlass-1": Way(kernel=False, one_gpu=True),
    "kernel-1": Way(kernel=True, one_gpu=True),
    "cutlass-eager": Way(kernel=False, eager=True),
    "cutlass": Way(kernel=False),
    "kernel": Way(kernel=True),
    "kernel-late": Way(kernel=True, part=kernel_parts.LATE),
    "kernel-dense": Way(kernel=True, part=kernel_parts.DENSE_ONLY),
    "kernel-experts": Way(kernel=True, part=kernel_parts.EXPERTS_ONLY),
    "kernel-custom": Way(kernel=True, custom=True),
    "cutlass-custom": Way(kernel=False, custom=True),
    "cutlass-2": Way(kernel=False),
    "cutlass-3": Way(kernel=False),
    "kernel-2": Way(kernel=True),
}


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over all prompts, twice over the first of them, in this process."""
    llm, started = start_engine(payload["llm"])
    prompts, new = payload["prompts"], payload["new_tokens"]
    with Path(payload["turn"]).open("w") as turn:
        if payload["llm"]["tensor_parallel_size"] > 1:
            fcntl.flock(turn, fcntl.LOCK_EX)
        again = [answers(llm, prompts[:BATCH], new) for _ in range(2)]
        outputs = again[0] + (answers(llm, prompts[BATCH:], new) if prompts[BATCH:] else [])
    found = {"outputs": outputs, "again": again, "start_s": round(started, 1)}
    if folder := os.environ.get(rank_agreement.FOLDER):
        found["ranks"] = rank_agreement.ask(Path(folder), payload["llm"]["tensor_parallel_size"])
    return found


def serve(args: argparse.Namespace, prompts: Sequence[Sequence[int]], name: str, number: int) -> Any:
    """Run a way and return what its worker did; None, and the end of its log printed, where it failed."""
    way = WAYS[name]
    llm = engine_options(
        args.lut,
        1 if way.one_gpu else args.tp,
        "eager-default" if way.eager else "compiled-kernel",
        args.kv_cache_gib,
        by_decode=True,
    )
    llm["disable_custom_all_reduce"] = not way.custom
    environment = {} if way.kernel else {"W4A8_LUT_DECODE": "cutlass"}
    if way.one_gpu:
        gpus = visible_gpus()
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    plugins = {"w4a8_kernel_part": way.part} if way.part else {}
    if args.agreement and not way.one_gpu:
        folder = args.turn.parent / name
        folder.mkdir()
        environment[rank_agreement.FOLDER] = str(folder)
        plugins["w4a8_rank_agreement"] = rank_agreement.MORE
    payload = {"llm": llm, "prompts": prompts, "new_tokens": args.new_tokens, "turn": str(args.turn)}
    try:
        result = vllm_engine.run_worker(__file__, payload, args.timeout, environment, plugins)
    except RuntimeError as error:
        print(f"{name}: {str(error)[-6000:]}", flush=True)
        return None
    print(f"{name}: start {result['start_s']} s, all {result['wall_s']} s", flush=True)
    for counts in result.get("ranks", ()):
        print(f"{name}, a rank: {counts}", flush=True)
    return result


def rows_of(args: argparse.Namespace, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each way compared with itself, and for each two."""
    about = {"model": args.name or args.lut.name, "tp": args.tp}
    there = [name for name in WAYS if results.get(name)]
    return [
        *(
            about | {"a": name, "b": "again"} | compare(*results[name]["again"]) | agreement(results[name])
            for name in there
        ),
        *(
            about | {"a": a, "b": b} | compare(results[a]["outputs"], results[b]["outputs"])
            for a, b in combinations(there, 2)
        ),
    ]


def agreement(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many tokens passed the experts of all layers, and for how many ranks did not agree."""
    if not result.get("ranks"):
        return {}
    layers = result["ranks"][0].values()
    return dict(zip(("seen", "other_inputs", "other_experts"), map(sum, zip(*layers, strict=True)), strict=True))


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lut", type=Path)
    parser.add_argument("--name", help="of the model in the rows; default: of its directory")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--tokens-file", type=Path)
    parser.add_argument("--agreement", action="store_true", help="count what ranks do not agree on")
    parser.add_argument("--kv-cache-gib", type=float, default=0.25)
    parser.add_argument("--timeout", type=float, default=420, help="seconds of an engine at most")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="write all log-probabilities there, JSON by gzip")
    add_options(parser)
    args = parser.parse_args()
    args.stock = args.lut
    return args


def main() -> int:
    """Run the engines side by side, print the table, return 1 where one failed or differs from itself."""
    args = parse()
    prompts = make_prompts(args)
    results: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="w4a8-ranks-") as root, ThreadPoolExecutor(len(args.ways)) as pool:
        args.turn = Path(root) / "turn"
        runs = {pool.submit(serve, args, prompts, name, number): name for number, name in enumerate(args.ways)}
        for run in as_completed(runs):
            results[runs[run]] = run.result()
            rows = rows_of(args, results)
            if rows:
                save(args, QUESTION, rows, packages=VLLM_PACKAGES)
            if args.answers:
                args.answers.write_bytes(gzip.compress(json.dumps(results).encode()))
    cells = [
        (
            row["a"],
            row["b"],
            f"{row['prompt_logprobs_equal']} of {row['prompt_logprobs']}",
            f"{row['mean_gap']:.2e} ± {row['mean_gap_error']:.1e}",
            f"{row['max_gap']:.2e}",
            f"{row['shift']:+.1e} ± {row['shift_error']:.1e}",
            row["choices_other"],
            f"{row['tokens_equal']} of {row['tokens']}",
        )
        for row in rows
    ]
    header = ("way", "other", "log-probs equal", "mean gap", "largest", "shift", "other choices", "greedy tokens")
    text = vllm_engine.table(header, cells)
    vllm_engine.finish(args, QUESTION, rows, text)
    whole = all(map(results.get, args.ways))
    return 0 if whole and all(row["identical"] for row in rows if row["b"] == "again") else 1


if __name__ == "__main__":
    vllm_engine.start(worker, main)
