#!/usr/bin/env python3
"""Time whole conversions against `cp -r` and compressed-tensors' converter, alternating, in one run.

Makes synthetic checkpoints once (Llama-8B layer shapes, or a mixture of many small experts), then runs every
contender in turn for several rounds, each as a process of its own, from a warm page cache. Prints medians: wall and
CPU seconds, peak memory of the process, MB/s of input, and the ratios to `cp -r`, which leaves its copy in the page
cache, and to `cp -r` with the copy on the disk, where a conversion's output is.

    python scripts/bench/bench_convert.py --gigabytes 2 --rounds 5
    python scripts/bench/bench_convert.py --inputs awq gptq moe --peer-python .peer/bin/python --json result.json
    python scripts/bench/bench_convert.py --gigabytes 1 4 16 --inputs gptq --formats lut --scales search

The peer wants an environment of its own: `python -m venv .peer; .peer/bin/pip install compressed-tensors transformers`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GROUP = 128
SHARDS = 4
# (name, out_features, in_features) of one Llama-3.1-8B block.
LLAMA_8B = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 1024, 4096),
    ("self_attn.v_proj", 1024, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 14336, 4096),
    ("mlp.up_proj", 14336, 4096),
    ("mlp.down_proj", 4096, 14336),
)
EXPERTS, EXPERT_HIDDEN, EXPERT_INTERMEDIATE = 128, 2048, 768  # Qwen3-30B-A3B
MOE = tuple(
    (f"mlp.experts.{expert}.{name}", n, k)
    for expert in range(EXPERTS)
    for name, n, k in (
        ("gate_proj", EXPERT_INTERMEDIATE, EXPERT_HIDDEN),
        ("up_proj", EXPERT_INTERMEDIATE, EXPERT_HIDDEN),
        ("down_proj", EXPERT_HIDDEN, EXPERT_INTERMEDIATE),
    )
)
INPUTS = ("awq", "awq-zp", "gptq", "compressed-tensors", "moe")
"""awq: every zero-point is 8; awq-zp: random zero-points, as AutoAWQ's own; moe: GPTQ experts."""

OURS = "from convert_w4a8.cli.convert import convert_command; convert_command()"
PEER = """
import sys
from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], AutoAWQConverter(), max_workers=int(sys.argv[3]), device="cpu")
"""


def random_words(*shape: int) -> "torch.Tensor":
    """Return int32 words of which every bit is random."""
    import torch

    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def layer_tensors(kind: str, name: str, n: int, k: int) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield one layer's tensors in the input format `kind`."""
    import torch

    groups = k // GROUP
    scales = torch.rand(groups, n).mul_(0.01).add_(0.002).half()
    if kind.startswith("awq"):
        yield f"{name}.qweight", random_words(k, n // 8)
        zeros = random_words(groups, n // 8) if kind == "awq-zp" else torch.full((groups, n // 8), -0x77777778)
        yield f"{name}.qzeros", zeros.to(torch.int32)
        yield f"{name}.scales", scales
    elif kind == "compressed-tensors":
        yield f"{name}.weight_packed", random_words(n, k // 8)
        yield f"{name}.weight_scale", scales.t().contiguous().bfloat16()
        yield f"{name}.weight_shape", torch.tensor([n, k])
    else:
        yield f"{name}.qweight", random_words(k // 8, n)
        yield f"{name}.qzeros", torch.full((groups, n // 8), 0x77777777, dtype=torch.int32)
        yield f"{name}.scales", scales
        yield f"{name}.g_idx", (torch.arange(k) // GROUP).int()


def quantization_config(kind: str) -> dict[str, object]:
    """Return the quantization_config block that the tool which writes `kind` leaves."""
    if kind.startswith("awq"):
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    if kind == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
        group = {"targets": ["Linear"], "weights": weights}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def make_checkpoint(directory: Path, kind: str, gigabytes: float) -> None:
    """Write a synthetic checkpoint of about this size in 4 shards."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    block = MOE if kind == "moe" else LLAMA_8B
    block_bytes = sum(n * k // 2 for _, n, k in block) * 1.04
    blocks = max(1, round(gigabytes * 1e9 / block_bytes))
    layers = [(f"model.layers.{i}.{name}", n, k) for i in range(blocks) for name, n, k in block]
    weight_map = {}
    for shard in range(SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = layers[shard * len(layers) // SHARDS : (shard + 1) * len(layers) // SHARDS]
        tensors = {key: value for layer in chosen for key, value in layer_tensors(kind, *layer)}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(1024, 4096).half()
        save_file(tensors, directory / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(kind)}))


@dataclass(frozen=True)
class Run:
    """What one process cost: seconds, and its peak resident memory in MiB."""

    wall: float
    cpu: float
    rss: float


def timed(command: list[str], out: Path, rest: float) -> Run:
    """Run a command that writes `out`, then remove `out`.

    A virtual machine may hand the memory of what is removed back to its host after a second or two, and take long to
    get it again. After a rest, every contender finds the same.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    time.sleep(rest)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        message = process.stderr.read().decode() if process.stderr else ""
        sys.exit(f"{' '.join(command)} failed:\n{message}")
    shutil.rmtree(out, ignore_errors=True)
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def contenders(kind: str, source: Path, out: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the commands to compare for one input, `cp -r` first."""
    arguments = [str(source), str(out), "--quiet", "--device", args.device]
    ours = [sys.executable, "-c", OURS, *arguments]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "cp -r, on the disk": ["sh", "-c", f'cp -r "{source}" "{out}" && sync "{out}"/*'],
    }
    for mode in args.scales:
        for form in args.formats:
            if (form, mode) != ("compressed-tensors", "direct"):
                commands[f"{form}, {mode}"] = [*ours, "--format", form, "--scales", mode]
    if kind.startswith("awq") and args.peer_python:
        for workers in (1, 2):
            commands[f"peer, {workers} worker" + "s" * (workers > 1)] = [
                *(args.peer_python, "-c", PEER, str(source), str(out), str(workers)),
            ]
    return commands


def bench(kind: str, gigabytes: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all contenders on one input and return a row for each."""
    source, out = args.directory / f"{kind}-{gigabytes:g}", args.directory / "out"
    if not (source / "config.json").is_file():
        # In a process of its own: the peak memory of a forked child begins with its parent's.
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(source, kind, gigabytes))
        maker.start()
        maker.join()
    megabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    for path in source.iterdir():  # into the page cache
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    commands = contenders(kind, source, out, args)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for round_number in range(args.rounds):
        for name, command in commands.items():
            if name.startswith("peer") and round_number >= args.peer_rounds:
                continue
            runs[name].append(timed(command, out, args.rest))
            print(f"{kind} {name}: {runs[name][-1].wall:.2f} s", file=sys.stderr)
    copy, durable = (statistics.median(run.wall for run in runs[name]) for name in list(runs)[:2])
    rows = []
    for name, results in runs.items():
        wall = statistics.median(run.wall for run in results)
        rows.append(
            {
                "input": kind,
                "gigabytes": gigabytes,
                "contender": name,
                "runs": len(results),
                "wall_s": wall,
                "cpu_s": statistics.median(run.cpu for run in results),
                "rss_mib": max(run.rss for run in results),
                "mb_per_s": megabytes / wall,
                "wall_to_cp": wall / copy,
                "wall_to_durable_cp": wall / durable,
            }
        )
    return rows


def main() -> None:
    """Parse the arguments, run, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("bench-data"), help="where checkpoints are kept")
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[2.0])
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=["awq", "gptq", "compressed-tensors"])
    parser.add_argument("--scales", nargs="+", default=["reference", "search", "direct"])
    parser.add_argument("--formats", nargs="+", default=["lut", "compressed-tensors"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", type=float, default=4.0, help="seconds before each run")
    parser.add_argument("--peer-rounds", type=int, default=1, help="the peer takes minutes; fewer rounds suffice")
    parser.add_argument("--peer-python", help="Python of an environment with compressed-tensors")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for kind in args.inputs for gigabytes in args.gigabytes for row in bench(kind, gigabytes, args)]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, torch {version('torch')}")
    print("| input | GB | contender | wall s | CPU s | peak MiB | MB/s | wall / cp | wall / cp on the disk |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            "| {input} | {gigabytes:g} | {contender} | {wall_s:.2f} | {cpu_s:.2f} | {rss_mib:.0f} | {mb_per_s:.0f}"
            " | {wall_to_cp:.2f} | {wall_to_durable_cp:.2f} |".format(**row)
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
