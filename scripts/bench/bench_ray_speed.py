#!/usr/bin/env python3
"""How the time of a conversion on Ray falls with GPUs and with cores, and what it cannot fall below.

python scripts/bench/bench_ray_speed.py gpus --commands convert --gigabytes 20 --workers 4 8 --keep ray-gpus
python scripts/bench/bench_ray_speed.py cores --input awq-zp --gigabytes 4 --shard-size 100MB --keep ray-cores
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from ray_runs import PACKAGES, Outcome, cluster, convert, digest_of_weights, run_chosen
from results import save, visible_gpus
from synthetic import make_checkpoint, repeat_block


def gpus(args: argparse.Namespace, root: Path) -> None:
    """Time conversions with new codes, and quantization without data, on one GPU and on all of them.

    Of two sizes each: what a small one takes is mostly the start, of processes and of Ray; what more bytes take is
    work. Before them a conversion compiles the kernels.
    """
    rows: list[dict[str, Any]] = []
    every = visible_gpus()
    runs: dict[str, tuple[str, tuple[object, ...], list[str]]] = {
        "one": ("1 GPU, without Ray", (), every[:1]),
        "several": (f"{len(every)} GPUs, `--ray`", ("--ray",), every),
        "ray": ("1 GPU, `--ray`", ("--ray",), every[:1]),
    }
    for command in args.commands:
        for gigabytes in (args.small, args.gigabytes):
            source = root / f"{command}-{gigabytes}"
            if command == "convert":
                make_checkpoint(source, "awq-zp", 0)
                repeat_block(source, gigabytes)
            else:
                make_model(source, gigabytes)
        small = root / f"{command}-{args.small}"
        convert(small, root / "out", "--quiet", command=command, device="cuda", gpus=every[0])
        shutil.rmtree(root / "out")
        threads = args.workers if command == "convert" else [None]
        sizes = [(args.small, threads[0]), *((args.gigabytes, count) for count in threads)]
        for gigabytes, count in sizes:
            for number, (words, more, visible) in runs.items():
                if number in (args.only or number):
                    row = {"command": command, "gigabytes": gigabytes, "run": words, "gpus": len(visible)}
                    options = (*more, *(("--workers", count) if count else ()))
                    row |= {"workers": count, **_on_gpus(root, command, gigabytes, options, visible)}
                    rows.append(row)
                    compare(rows)
                    print(rows[-1], file=sys.stderr, flush=True)
                    save(args, "How much faster are two GPUs?", rows, packages=PACKAGES)


def _on_gpus(
    root: Path, command: str, gigabytes: float, more: tuple[object, ...], visible: list[str]
) -> dict[str, Any]:
    """Convert, and return how long that took and what the tasks of Ray did meanwhile."""
    size = ("--max-shard-size", f"{gigabytes * (50 if command == 'convert' else 15):.0f}MB")
    source, gpus = root / f"{command}-{gigabytes}", ",".join(visible)
    outcome = convert(source, root / "out", "--json", *size, *more, command=command, device="cuda", gpus=gpus)
    said = json.loads(outcome.stdout)
    found = {"wall_s": outcome.seconds, "work_s": said["seconds"], "cpu_s": outcome.cpu_seconds}
    found |= {"sha256": digest_of_weights(root / "out")}
    shutil.rmtree(root / "out")
    tasks = [task["seconds"] for task in said.get("ray", {}).get("tasks", [])]
    if not tasks:
        return found
    return found | {
        "tasks": len(tasks),
        "task_s": sum(tasks),
        "median_task_s": statistics.median(tasks),
        "longest_task_s": max(tasks),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Say of the last row how much faster it is than the first of its command and size, and what more bytes take.

    By the seconds that commands say, which hold no imports of their own, and of two sizes: s_per_gb is what a GB takes,
    start_s what a command takes that converts nothing, the start of Ray and of its workers for the most.
    """
    row = rows[-1]
    alike = [other for other in rows if other["command"] == row["command"]]
    alone = next(other for other in alike if other["gigabytes"] == row["gigabytes"])
    row["same"] = "yes" if row["sha256"] == alone["sha256"] else "NO"
    row["faster"] = alone["work_s"] / row["work_s"] if row is not alone else None
    smaller = [other for other in alike if other["run"] == row["run"] and other["gigabytes"] < row["gigabytes"]]
    if smaller:
        (other, *_) = smaller
        row["s_per_gb"] = (row["work_s"] - other["work_s"]) / (row["gigabytes"] - other["gigabytes"])
        row["start_s"] = other["work_s"] - row["s_per_gb"] * other["gigabytes"]
        if "s_per_gb" in alone and row is not alone:
            row["faster_per_gb"] = alone["s_per_gb"] / row["s_per_gb"]


def cores(args: argparse.Namespace, root: Path) -> None:
    """Time conversions with new codes on so many CPUs of one machine, as nodes of eight."""
    make_checkpoint(root / "in", args.input, args.gigabytes)
    rows: list[dict[str, Any]] = []
    convert(root / "in", root / "out", "--quiet")
    shutil.rmtree(root / "out")
    size = ("--max-shard-size", args.shard_size, "--json")

    def add(words: str, cpus: int, outcome: Outcome) -> None:
        said = json.loads(outcome.stdout)
        row = {"run": words, "cpus": cpus, "wall_s": outcome.seconds, "work_s": said["seconds"]}
        row |= {"tasks": len(said.get("ray", {}).get("tasks", [])), "sha256": digest_of_weights(root / "out")}
        row |= {"input": args.input, "gigabytes": args.gigabytes}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        shutil.rmtree(root / "out")

    for _ in range(args.rounds):
        add("without Ray", 4, convert(root / "in", root / "out", *size, "--workers", 4))
        for cpus in args.cpus:
            with cluster(*[min(cpus, 8)] * max(1, cpus // 8)) as made:
                add("`--ray ADDRESS`", cpus, convert(root / "in", root / "out", *size, "--ray", made.address))
        save(args, "How does the time fall with the CPUs of a cluster?", rows, packages=PACKAGES)


def make_model(directory: Path, gigabytes: float) -> None:
    """Write blocks with the layers of Llama-8B in BF16, of so many GB."""
    import torch
    from safetensors.torch import save_file
    from synthetic import LLAMA_8B

    directory.mkdir(parents=True)
    torch.manual_seed(0)
    blocks = max(1, round(gigabytes * 1e9 / sum(2 * n * k for _, n, k in LLAMA_8B)))
    weight_map: dict[str, str] = {}
    for block in range(blocks):
        name = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        found = {
            f"model.layers.{block}.{layer}.weight": torch.randn(n, k).mul_(0.02).bfloat16() for layer, n, k in LLAMA_8B
        }
        save_file(found, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(found, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gpus", "cores"])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the input")
    parser.add_argument("--rounds", type=int, default=2, help="of cores")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[4], help="of gpus: threads of a conversion or a task"
    )
    parser.add_argument("--commands", nargs="+", default=["convert", "quantize"], help="of gpus")
    parser.add_argument("--only", nargs="+", choices=("one", "several", "ray"), help="of gpus: not all")
    parser.add_argument("--small", type=float, default=0.25, help="of gpus: GB of the smaller input")
    parser.add_argument("--input", default="awq-zp", help="of cores: its format")
    parser.add_argument("--shard-size", default="5GB", help="of cores")
    parser.add_argument("--cpus", type=int, nargs="+", default=[4, 8, 16], help="of cores")
    run_chosen(parser, globals())


if __name__ == "__main__":
    main()
