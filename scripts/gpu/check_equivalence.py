"""Compare what vLLM computes from a `w4a8_lut` checkpoint and from the stock checkpoint of the same conversion.

    check_equivalence.py LUT_DIR STOCK_DIR [--decode] [--tp 2 4] [--text-file F | --tokens-file F] [--json FILE]

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

That is asked of the plugin without its decode kernel: the same bytes by the same op.

With `--decode` prompts are read token by token, so that all log-probabilities come through decode, 16 tokens a step,
and the plugin's decode kernel is compared with CUTLASS. Kernels that add up in another order round differently, and
that is what vLLM's own ways of running one checkpoint do: compiled and eager, by decode and by prefill. These show what
it differs from itself, and `gaps.is_within` what is asked: mean gap and likeliest tokens within 1.5 times that and
chance, and no shift of all log-probabilities. That this is able to fail, a damaged copy must show: one in which, of
every down projection, 64 output channels lack the last quarter of K, as if a kernel lost a part of it. Without the
decode kernel, eager outputs must be those of stock, and compiled ones within the same. `--env NAME=VALUE` sets the
plugin's options.

Each engine runs in a process of its own, which schedules by itself (no engine-core process whose batches depend on
when requests arrive: other batch sizes are other kernels and other roundings).

At a larger size, stock vLLM computes channel scales from each rank's part of the input channels, we store those of
the whole row. The mean deviation of plugin and stock at that size must not exceed 1.5 times (two independent
deviations add up to √2) that of stock from stock at size 1. With `--decode`, what vLLM differs from itself is measured
at size 1, compiled and eager, and the plugin with and without its kernel, no more than that, at the larger ones. All
engines start at the same time; those on several GPUs generate one after the other, since ranks that share a GPU with
another engine's wait for each other. Without `--extend`, rows are written as soon as there are any.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import vllm_engine
from gaps import SLACK, compare, is_within
from results import VLLM_PACKAGES, add_options, save
from stock_scales import find_arithmetics

BATCH = 16
MAX_LENGTH = 1024
GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8, BATCH]}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "compiled": ("reciprocal", {"compilation_config": GRAPHS}),
    "eager": ("reciprocal", {"enforce_eager": True, "compilation_config": {"custom_ops": ["-quant_fp8"]}}),
    "compiled-kernel": ("division", {"compilation_config": {"custom_ops": ["+quant_fp8"], **GRAPHS}}),
    "eager-default": ("division", {"enforce_eager": True}),
}
"""Mode → how vLLM quantizes scales in it, and its options."""
WITHOUT, OURS, DAMAGED = (
    "plugin without decode kernel, stock",
    "plugin, without decode kernel",
    "damaged, without decode kernel",
)


def start_engine(options: Mapping[str, Any]) -> tuple[Any, float]:
    """Return an engine in this process, and the seconds that it took to start."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all requests are there before the first step
    # Inductor picks among its kernels by timing them: "stock again" must be compiled again to show what that does.
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(**options)
    return llm, time.perf_counter() - start


def worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over all prompts, in this process."""
    llm, started = start_engine(payload["llm"])
    with ExitStack() as stack:
        if payload["turn"]:
            fcntl.flock(stack.enter_context(Path(payload["turn"]).open("w")), fcntl.LOCK_EX)
        found = answers(llm, payload["prompts"], payload["new_tokens"])
    return {"outputs": found, "start_s": round(started, 1)}


def answers(llm: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Return an engine's answers to prompts, as `gaps` takes them, with the log-probabilities of new tokens ("new")."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        # The first prompt token has no log-probability.
        scored = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        found.append(
            {
                "tokens": list(completion.token_ids),
                "prompt": [entry[token].logprob for token, entry in scored],
                "best": [_likeliest(entry) for entry in output.prompt_logprobs[1:]],
                "new": [
                    entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
                ],
            }
        )
    return found


def _likeliest(entry: Mapping[int, Any]) -> int:
    return min(entry, key=lambda token: int(entry[token].rank))


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
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="tensor-parallel sizes")
    parser.add_argument("--first-gpu", type=int, help="of a machine with as many as the largest size; default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: the checkpoint's; one of them at --tp > 1")
    parser.add_argument("--prompts", type=int, default=BATCH)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--tokens-file", type=Path)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=4, help="engines of each kind at a time: of size 1, and larger")
    parser.add_argument("--timeout", type=float, default=420, help="seconds of an engine at most")
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    parser.add_argument("--decode", action="store_true", help="read prompts token by token; compare the decode kernel")
    parser.add_argument("--no-damage", action="store_true", help="without the damaged copy")
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
        if args.quick or (max(args.tp) > 1 and not args.decode):
            args.modes = args.modes[-1:] if args.quick else args.modes[:1]
    if args.quick:
        args.prompts = min(args.prompts, 4)
    return args


@dataclass(frozen=True, order=True)
class Engine:
    """One engine to run, in one of MODES.

    decode_kernel: ours, which the plugin has unless told otherwise. by_decode: prompts are read token by token. run:
    the second of two that are the same otherwise.
    """

    directory: Path
    tp: int
    mode: str
    decode_kernel: bool = False
    by_decode: bool = False
    run: int = 1


def engine_options(directory: Path, tp: int, mode: str, kv_cache_gib: float, *, by_decode: bool) -> dict[str, Any]:
    """Return vLLM's options for an engine of a mode of MODES that starts and runs beside others."""
    return {
        "model": str(directory),
        "tensor_parallel_size": tp,
        "skip_tokenizer_init": True,
        # Not less than max_num_batched_tokens / max_num_seqs: vLLM warms up with requests of that many tokens, and
        # attention reads beyond the block tables of a shorter max_model_len (vllm-project/vllm#49751).
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": BATCH,
        "max_num_batched_tokens": 8 * MAX_LENGTH,
        # Not profiled, so that engines can start side by side; the utilization is only checked to be free.
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "seed": 0,
        **(vllm_engine.token_by_token(BATCH) if by_decode else {}),
        **MODES[mode][1],
    }


def serve(args: argparse.Namespace, prompts: list[list[int]], engine: Engine) -> Any:
    """Run an engine and return its outputs; None, and the end of its log printed, where it failed."""
    llm = engine_options(engine.directory, engine.tp, engine.mode, args.kv_cache_gib, by_decode=engine.by_decode)
    llm["disable_custom_all_reduce"] = args.disable_custom_all_reduce
    payload = {"llm": llm, "prompts": prompts, "new_tokens": args.new_tokens}
    payload["turn"] = str(args.turn) if engine.tp > 1 else None
    environment = dict(args.env) if engine.decode_kernel else {"W4A8_LUT_DECODE": "cutlass"}
    if args.first_gpu is not None:
        gpus = ((args.first_gpu + i) % max(args.tp) for i in range(engine.tp))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    try:
        result = vllm_engine.run_worker(__file__, payload, args.timeout, environment)
    except RuntimeError as error:
        print(f"{engine}: {error}", flush=True)
        return None
    what = ("decode kernel, " if engine.decode_kernel else "") + ("by decode" if engine.by_decode else "by prefill")
    times = f"start {result['start_s']} s, all {result['wall_s']} s"
    print(f"{engine.directory.name} {engine.mode} TP {engine.tp}, {what}: {times}", flush=True)
    return result["outputs"]


@dataclass(frozen=True)
class Pair:
    """Two engines to compare. is_own: both of stock, which shows what vLLM differs from itself."""

    what: str
    a: Engine
    b: Engine
    is_own: bool = False


def pairs(args: argparse.Namespace) -> dict[tuple[str, int], list[Pair]]:
    """Return what is compared with what, by the mode and the size that it is reported under."""
    modes = args.modes[: 1 if args.decode and max(args.tp) > 1 else None]
    of = _decode_pairs if args.decode else _prefill_pairs
    return {(mode, tp): of(args, mode, tp) for mode in modes for tp in args.tp}


def _prefill_pairs(args: argparse.Namespace, mode: str, tp: int) -> list[Pair]:
    one, stock, lut = (Engine(args.stock, 1, mode), Engine(args.stock, tp, mode), Engine(args.lut, tp, mode))
    if tp == 1:
        return [Pair("plugin, stock", lut, stock)]
    return [
        Pair(f"stock TP {tp}, stock TP 1", stock, one, is_own=True),
        Pair(f"plugin TP {tp}, stock TP 1", lut, one),
        Pair(f"plugin TP {tp}, stock TP {tp}", lut, stock),
    ]


def _decode_pairs(args: argparse.Namespace, mode: str, tp: int) -> list[Pair]:
    one = Engine(args.stock, 1, mode, by_decode=True)
    lut = Engine(args.lut, tp, mode, by_decode=True)
    ours = replace(lut, decode_kernel=True)
    others = [other for other in args.modes if other != mode and MODES[other][0] == MODES[mode][0]]
    found = [Pair(f"stock, {other}", one, replace(one, mode=other), is_own=True) for other in others]
    if tp == 1 or not others:
        found.insert(0, Pair("stock by decode, by prefill", one, replace(one, by_decode=False), is_own=True))
    if tp == 1:
        found.append(Pair(WITHOUT, lut, one))
    found.append(Pair(OURS, ours, lut))
    if args.damaged:
        found.append(Pair(DAMAGED, replace(ours, directory=args.damaged), lut))
    return found


def is_met(args: argparse.Namespace, mode: str, tp: int, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the rows of one mode and size, as `pairs` orders them, are what they must be."""
    demanded = MODES[mode][0] in args.arithmetics and tp == 1
    gaps = [float(row["mean_gap"]) for row in rows]
    if not args.decode:
        return gaps[-1] <= SLACK * gaps[0] if tp > 1 else not demanded or bool(rows[0]["identical"])
    own = [row for row in rows if row["own"]]
    named = {row["what"]: row for row in rows}
    same = True
    if WITHOUT in named:
        eager = "enforce_eager" in MODES[mode][1]
        without = named[WITHOUT]
        same = not demanded or bool(without["identical"]) or (not eager and is_within(without, own))
    seen = DAMAGED not in named or not is_within(named[DAMAGED], own)
    verdicts = {"decode kernel": is_within(named[OURS], own)} | ({"without decode kernel": same} if demanded else {})
    for what, verdict in verdicts.items():
        print(f"{mode}, TP {tp}: {what}: {'as it must be' if verdict else 'NOT as it must be'}", flush=True)
    if DAMAGED in named:
        print(f"{mode}: damage is {'seen' if seen else 'NOT SEEN: this check could not fail'}", flush=True)
    return same and is_within(named[OURS], own) and seen


def damage(lut: Path, damaged: Path) -> None:
    """Copy a checkpoint, with zeros in the last quarter of K of 64 output channels of every down projection."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(lut, damaged)
    for path in damaged.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        hit = [name for name in tensors if name.endswith("down_proj.weight_packed")]
        for name in hit:
            tensors[name][-(tensors[name].shape[0] // 4) :, : 4 * 64] = 0  # a zero nibble is the code 0
        if hit:
            path.unlink()  # it may be a link to the original
            save_file(tensors, path, metadata)


def run_all(
    args: argparse.Namespace, prompts: list[list[int]], engines: Sequence[Engine]
) -> Iterator[tuple[Engine, Any]]:
    """Run engines, and yield each with its outputs when it is done."""
    with ThreadPoolExecutor(args.jobs) as single, ThreadPoolExecutor(args.jobs) as several:
        runs = {
            (single if engine.tp == 1 else several).submit(serve, args, prompts, engine): engine for engine in engines
        }
        for run in as_completed(runs):
            yield runs[run], run.result()


def rows_of(
    model: str,
    compared: Mapping[tuple[str, int], Sequence[Pair]],
    outputs: Mapping[Engine, Any],
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return a row for each pair of which there are both outputs, by mode and size."""
    return {
        (mode, tp): [
            {"model": model, "tp": pair.a.tp, "mode": mode, "what": pair.what, "own": pair.is_own}
            | compare(outputs[pair.a], outputs[pair.b])
            for pair in several
            if outputs.get(pair.a) and outputs.get(pair.b)
        ]
        for (mode, tp), several in compared.items()
    }


def without_repeats(found: Mapping[tuple[str, int], Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return all rows, those that several sizes share once."""
    rows: list[dict[str, Any]] = []
    for row in (row for several in found.values() for row in several):
        if row not in rows:
            rows.append(row)
    return rows


def main() -> int:
    """Run the engines, print the table, return 1 if a demand is not met."""
    args = parse()
    prompts = make_prompts(args)
    model = json.loads((args.stock / "config.json").read_text())["architectures"][0]
    question = "Does the plugin compute what vLLM computes from the stock checkpoint?"
    if args.decode:
        question = "Is the decode kernel as near to CUTLASS as stock W4A8 is to itself?"
    outputs: dict[Engine, Any] = {}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="w4a8-equivalence-") as root:
        args.turn = Path(root) / "turn"
        args.damaged = Path(root) / "damaged" if args.decode and not args.no_damage else None
        if args.damaged:
            damage(args.lut, args.damaged)
        compared = pairs(args)
        engines = {engine for several in compared.values() for pair in several for engine in (pair.a, pair.b)}
        # Those that take longest first.
        for engine, output in run_all(
            args, prompts, sorted(engines, key=lambda engine: (-engine.tp, engine.mode, engine))
        ):
            outputs[engine] = output
            found = rows_of(model, compared, outputs)
            if any(found.values()) and not args.extend:
                save(args, question, without_repeats(found), packages=VLLM_PACKAGES)
        met = True
        for (mode, tp), several in compared.items():
            new = found[mode, tp]
            whole = len(new) == len(several)
            if whole and is_met(args, mode, tp, new):
                continue
            met = False
            if whole and tp == 1 and not args.decode:
                stock = several[0].b
                if again := serve(args, prompts, replace(stock, run=2)):
                    about = {"model": model, "tp": 1, "mode": mode, "what": "stock, stock again", "own": True}
                    new.append(about | compare(again, outputs[stock]))
    rows = without_repeats(found)
    header = (
        "mode",
        "TP",
        "compared",
        "log-probs equal",
        "mean gap",
        "largest",
        "shift",
        "other choices",
        "greedy tokens",
    )
    cells = [
        (
            row["mode"],
            row["tp"],
            row["what"],
            f"{row['prompt_logprobs_equal']} of {row['prompt_logprobs']}",
            f"{row['mean_gap']:.2e}",
            f"{row['max_gap']:.2e}",
            f"{row['shift']:+.1e} ± {row['shift_error']:.1e}",
            row["choices_other"],
            f"{row['tokens_equal']} of {row['tokens']}",
        )
        for row in rows
    ]
    text = vllm_engine.table(header, cells)
    text += f"\n{'demands met' if met else 'DEMANDS NOT MET'}"
    settings: dict[str, Any] = {"scales": sorted(args.arithmetics), "met": met, "environment": dict(args.env)}
    vllm_engine.finish(args, question, rows, text, extend=args.extend, **settings)
    return 0 if met else 1


if __name__ == "__main__":
    vllm_engine.start(worker, main)
