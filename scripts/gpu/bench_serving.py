"""Time to first token and per output token: W4A16 (the source) against W4A8, ours and others, `bench_serving.py`.

    bench_serving.py --dir DIR [--kinds w4a16 lut ...] [--cases 1x128 64x2048 ...] [--json FILE [--extend]]

Random checkpoints of a model's shapes are made below `--dir` (13 GB for Llama-8B; kept there, else removed). Each
engine runs in a process of its own, one after the other, compiled with CUDA graphs and scheduled as vLLM comes, without
prefix caching. All requests of a case arrive together.

TTFT and TPOT are means over the requests, by the engine's own clock: arrival to first token, and first to last token
divided by the tokens between. `prefill_ms` is the time from the first request that is scheduled to the last first
token, without what comes before the engine; `step_ms` the time per token of the request that starts last: steps without
any prefill. Medians over runs with fresh random prompts, as many as fit in `--seconds` (one at least) after a warm-up;
a single request's TTFT is of ten runs more, with its fastest tenth, since the host's part of it varies. Gains are the
first kind's time / the other's − 1. Which kernel vLLM chose is taken from its log.

Each kind is written when it is done. With --extend, kinds that the file has are not run again. With --together all
engines start side by side, and wait until they have; then one after the other is measured, with the others idle. With
--times, parts of decode steps are timed at an engine's end, as `step_times.py` says; with --trace, they are traced, as
`step_traces.py` does.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import few_humming
import step_times
import step_traces
import turns
import vllm_engine
from make_random_checkpoint import SHAPES, ensure
from results import VLLM_PACKAGES, add_options, read_results, write_results

CASES = ("1x128", "8x128", "32x128", "64x128", "128x128", "1x2048", "1x8192", "8x4096", "32x2048", "64x2048")
"""Requests at a time and prompt tokens of each."""
NEW_TOKENS = 128
STEP = 8192
"""Tokens of a step at most, vLLM's default here."""
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes of CUDA graphs."""
FIRST_TOKENS = 10
"""Runs for the time to the first token of a single request."""
UNCAPTURED = (144, 256, 384, 448, 512)
"""Tokens of a step beyond those of CUDA graphs, for which kernels may still compile: once, before anything is timed."""
REPEATS = 5
"""Runs of a case at most."""
TIMES = ("ttft_ms", "prefill_ms", "tpot_ms", "step_ms")


@dataclass(frozen=True)
class Kind:
    """A way to serve the model: the checkpoint's format, vLLM's options, environment variables, seconds at most."""

    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 420
    plugins: Mapping[str, str] = field(default_factory=dict)


def _humming(environment: Mapping[str, str]) -> Kind:
    plugins = {"few_humming": few_humming.MORE}
    return Kind("w4a16", {"quantization": "humming"}, environment, timeout=580, plugins=plugins)


KINDS = {
    "w4a16": Kind("w4a16"),
    "w4a16-marlin": Kind("w4a16", {"linear_backend": "marlin"}),
    "w4a16-humming": _humming({}),
    "w4a8-humming": _humming({"VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype": "float8e4m3"}'}),
    "stock": Kind("stock"),
    "lut:cutlass": Kind("lut", environment={"W4A8_LUT_DECODE": "cutlass"}),
    "lut": Kind("lut"),
}
"""Name → how. `w4a16` is vLLM's default for the source; `stock` the compressed-tensors W4A8, `lut` the plugin, and
`lut:cutlass` the plugin without its decode kernel."""


def worker(payload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time all cases on one engine in this process; yield what there is after each."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**payload["llm"])
    started = time.perf_counter() - start
    if payload["turn"]:
        turns.wait_for(Path(payload["turn"]))
    generator = random.Random(0)

    def timed(batch: int, length: int, tokens: int) -> dict[str, float]:
        """Return the times of one run in ms, and the wall time of the batch in s."""
        prompts = [
            {"prompt_token_ids": [generator.randrange(payload["vocabulary"]) for _ in range(length)]}
            for _ in range(batch)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return request_times([output.metrics for output in outputs], tokens) | {"batch_s": seconds}

    for length in UNCAPTURED:
        if length + 2 <= payload["llm"]["max_model_len"]:
            timed(1, length, 2)
    found: dict[str, Any] = {"cases": [], "times": [], "steps": [], "start_s": round(started, 1)}
    for batch, length in payload["cases"]:
        timed(min(batch, max(1, 16384 // length)), length, 4)
        runs: list[dict[str, float]] = []
        begin = time.perf_counter()
        while not runs or (len(runs) < REPEATS and time.perf_counter() - begin < payload["seconds"]):
            runs.append(timed(batch, length, NEW_TOKENS))
        firsts = [timed(batch, length, 2) for _ in range(FIRST_TOKENS)] if batch == 1 else []
        found["cases"].append({"batch": batch, "prompt": length, **summary(runs, firsts)})
        yield found
    for batch in payload["times"]:
        found["times"].append(step_times.timed(llm, batch))
        yield found
    for batch in payload["trace"]:
        found["steps"].append(step_traces.traced(llm, batch))
        yield found


def request_times(stats: Sequence[Any], tokens: int) -> dict[str, float]:
    """Return the times of one run, in ms, from vLLM's metrics of its requests."""
    each = [(found.last_token_ts - found.first_token_ts) / (tokens - 1) for found in stats]
    last = max(range(len(stats)), key=lambda i: stats[i].first_token_ts)
    seconds = (
        statistics.fmean(found.first_token_latency for found in stats),
        stats[last].first_token_ts - min(found.scheduled_ts for found in stats),
        statistics.fmean(each),
        each[last],
    )
    return dict(zip(TIMES, (1e3 * value for value in seconds), strict=True))


def summary(runs: Sequence[Mapping[str, float]], firsts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return medians over runs. firsts: runs of which only the time to the first token counts."""
    found: dict[str, float] = {"runs": len(runs)}
    for name in (*TIMES, "batch_s"):
        more = firsts if name in {"ttft_ms", "prefill_ms"} else ()
        values = sorted(run[name] for run in (*runs, *more))
        found[name] = statistics.median(values)
        if name == "ttft_ms":
            found["ttft_p10_ms"] = values[len(values) // 10]
    return found


def rows_of(kind: str, cases: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a kind's rows, with what it gains over the base's rows of the same cases, where there are any."""
    bases = {(row["batch"], row["prompt"]): row for row in base}
    rows = []
    for case in cases:
        row = {"kind": kind, **case, "tokens_per_s": case["batch"] * NEW_TOKENS / case["batch_s"]}
        other = bases.get((case["batch"], case["prompt"]))
        if other is not None and other["kind"] != kind:
            row |= {f"{name[:-3]}_gain": other[name] / case[name] - 1 for name in TIMES if name in other}
            row["throughput_gain"] = row["tokens_per_s"] / other["tokens_per_s"] - 1
        rows.append(row)
    return rows


def text_of(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """Return a table of rows."""
    header = ("kind", "batch", "prompt", "TTFT ms", "p10", "prefill", "TPOT ms", "step", "tokens/s")
    times = ("ttft_ms", "ttft_p10_ms", "prefill_ms", "tpot_ms", "step_ms")
    gains = ("ttft_gain", "tpot_gain", "step_gain", "throughput_gain")
    cells = [
        (
            *(row[name] for name in ("kind", "batch", "prompt")),
            *(f"{row[name]:.2f}" for name in times),
            f"{row['tokens_per_s']:.0f}",
            *(f"{100 * row[name]:+.0f} %" if name in row else "" for name in gains),
        )
        for row in rows
    ]
    faster = (f"TTFT over {base}", "TPOT", "step", "tokens/s")
    return vllm_engine.table((*header, *faster), cells)


def engine(args: argparse.Namespace, kind: Kind, directory: Path) -> dict[str, Any]:
    """Return vLLM's options for an engine that serves all cases."""
    shape = SHAPES[args.model]
    # Keys and values in BF16 of all requests of the largest case, and a little.
    cached = max(batch * (length + NEW_TOKENS + 16) for batch, length in args.cases)
    token_bytes = 2 * 2 * shape.kv_heads * shape.head_dim * (args.layers or shape.layers)
    return {
        "model": str(directory),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": max(length for _, length in args.cases) + 2 * NEW_TOKENS,
        "max_num_seqs": max(128, *(batch for batch, _ in args.cases)),
        "max_num_batched_tokens": STEP,
        "kv_cache_memory_bytes": int(1.2 * cached * token_bytes) + 2**28,
        "gpu_memory_utilization": 0.3,  # is only checked to be free
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": list(args.graphs)},
        "disable_log_stats": False,  # or requests have no metrics
        "generation_config": "vllm",
        **kind.options,
    }


def environment(args: argparse.Namespace, kind: Kind) -> dict[str, str]:
    """Return the environment variables of an engine."""
    # Sizes of CUDA graphs, and of the steps in which prompts are read, each in a step of at most 8192 tokens.
    sizes = {*args.graphs, *(min(STEP, batch * length) for batch, length in args.cases)}
    return {
        few_humming.SETTING: ",".join(map(str, sorted(sizes))),
        few_humming.CHOICES: str(SHAPES[args.model].experts_per_token),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for traces
        **kind.environment,
    }


def serve(args: argparse.Namespace, kind: Kind, directory: Path, turn: Path | None = None) -> dict[str, Any]:
    """Run all cases on one engine, and return what `worker` found. turn: the file that it is to wait for."""
    vocabulary = SHAPES[args.model].vocabulary
    payload = {"llm": engine(args, kind, directory), "cases": args.cases, "seconds": args.seconds}
    payload |= {"vocabulary": vocabulary, "turn": turn and str(turn), "times": args.times, "trace": args.trace}
    variables = environment(args, kind)
    return vllm_engine.run_worker(__file__, payload, args.timeout or kind.timeout, variables, kind.plugins)


def case_of(text: str) -> tuple[int, int]:
    """Return batch size and prompt tokens of a word such as 8x2048."""
    batch, length = map(int, text.split("x"))
    return batch, length


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-8b", help="whose shapes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="so many of its layers (default: all)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[kind for kind in KINDS if kind != "w4a16-marlin"],
        help="the baseline, and what is compared with it (default: %(default)s)",
    )
    parser.add_argument(
        "--cases", nargs="+", type=case_of, default=[case_of(case) for case in CASES], help=f"(default: {CASES})"
    )
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made, or were made before")
    parser.add_argument("--seconds", type=float, default=2.5, help="for the runs of a case (default: %(default)s)")
    parser.add_argument("--together", action="store_true", help="start all engines at the same time, then take turns")
    parser.add_argument(
        "--patience", type=float, default=3600, help="seconds that ready engines wait for others (default: %(default)s)"
    )
    parser.add_argument("--graphs", type=int, nargs="+", default=GRAPHS, help="batch sizes of CUDA graphs")
    parser.add_argument("--trace", type=int, nargs="+", default=[], metavar="BATCH", help="trace steps of such batches")
    parser.add_argument("--trace-json", type=Path, metavar="FILE", help="write what was traced there")
    parser.add_argument("--times", type=int, nargs="+", default=[], metavar="BATCH", help="time parts of such steps")
    parser.add_argument("--times-json", type=Path, metavar="FILE", help="write those times there")
    parser.add_argument("--timeout", type=float, help="seconds of an engine at most (default: the kind's)")
    parser.add_argument("--base", choices=KINDS, help="the baseline, if it is not the first kind: one of the file's")
    parser.add_argument("--quick", action="store_true", help="four layers, batch 1 and 8 with short prompts, one run")
    add_options(parser)
    parser.add_argument("--extend", action="store_true", help="add to what --json and --keep name, do not replace it")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.cases, args.seconds = 4, [case_of(case) for case in CASES[:2]], 0
    return args


def keep_traces(args: argparse.Namespace, traces: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Print what was traced of each kind and batch, and write it where asked."""
    kernels = {f"{kind}, batch {batch}": step_traces.kernels_of(steps) for (kind, batch), steps in traces.items()}
    rows = [step_traces.row_of(kind, steps) for (kind, _), steps in traces.items()]
    if rows and args.trace_json:
        settings = {"model": args.model, "layers": args.layers or SHAPES[args.model].layers, "kernels": kernels}
        write_results(args.trace_json, step_traces.QUESTION, rows, packages=VLLM_PACKAGES, settings=settings)
    if rows:
        print(step_traces.text_of(rows), flush=True)


def keep_times(args: argparse.Namespace, times: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Print the times of steps, and write them where asked."""
    rows = [step_times.row_of(kind, steps) for (kind, _), steps in times.items()]
    if rows and args.times_json:
        places = {f"{kind}, batch {batch}": step_times.places_of(steps) for (kind, batch), steps in times.items()}
        settings = {"model": args.model, "layers": args.layers or SHAPES[args.model].layers, "places": places}
        write_results(args.times_json, step_times.QUESTION, rows, packages=VLLM_PACKAGES, settings=settings)
    if rows:
        print(step_times.text_of(rows), flush=True)


def main() -> int:
    """Make the checkpoints, run the engines, print the table."""
    args = parse()
    before = read_results(args, VLLM_PACKAGES) if args.extend else []
    base = args.base or (before[0]["kind"] if before else args.kinds[0])
    rows = list(before)
    done = {row["kind"] for row in before}
    root = args.dir or Path(tempfile.mkdtemp(prefix="w4a8-bench-"))
    traces: dict[tuple[str, int], dict[str, Any]] = {}
    times: dict[tuple[str, int], dict[str, Any]] = {}
    failed = 0
    try:
        directories = ensure(args.model, root, args.layers)
        for name in sorted(done.intersection(args.kinds)):
            print(f"{name}: in the file already", flush=True)
        names = [name for name in args.kinds if name not in done]

        def run(name: str, turn: Path | None = None) -> dict[str, Any]:
            return serve(args, KINDS[name], directories[KINDS[name].format], turn)

        in_turn = ((name, partial(run, name)) for name in names)
        for name, result in turns.by_turns(names, run, args.patience) if args.together else in_turn:
            try:
                found = result()
            except RuntimeError as error:  # the others are worth having
                print(f"{name}: {error}", flush=True)
                failed += 1
                continue
            print(
                f"{name}: start {found['start_s']} s, all {found['wall_s']} s; {', '.join(found['kernels'])}",
                flush=True,
            )
            new = rows_of(name, found["cases"], [row for row in rows if row["kind"] == base])
            settings = {
                "model": args.model,
                "layers": args.layers or SHAPES[args.model].layers,
                "new_tokens": NEW_TOKENS,
                "together": args.together,
                "kernels": {name: found["kernels"]},
            }
            rows += new
            text = text_of(new, base)
            question = f"How fast is serving {args.model}, beside {base}?"
            vllm_engine.finish(args, question, new, text, extend=args.extend, **settings)
            args.extend = True
            traces |= {(name, steps["batch"]): steps for steps in found["steps"]}
            keep_traces(args, traces)
            times |= {(name, steps["batch"]): steps for steps in found["times"]}
            keep_times(args, times)
    finally:
        if args.dir is None:
            shutil.rmtree(root)
    return 1 if failed else 0


if __name__ == "__main__":
    vllm_engine.start(worker, main)
