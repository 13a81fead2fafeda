#!/usr/bin/env python3
"""Time what a command does before it converts: `--help`, and `--dry-run` on an index of 100,000 tensors in 400 shards.

The checkpoint is made of headers and holes: it takes no space on a disk that has sparse files.

    python scripts/bench/bench_startup.py --rounds 5
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_options, line, save
from tables import COLUMNS, table

OURS = "from convert_w4a8.cli.convert import convert_command; convert_command()"
SHARDS, LAYERS_PER_SHARD = 400, 62
"""Four tensors a layer: 99,200 in all, as a mixture of 384 experts a block has them."""
N = K = 256
PARTS = {
    "qweight": ("I32", (K // 8, N)),
    "qzeros": ("I32", (K // 128, N // 8)),
    "scales": ("F16", (K // 128, N)),
    "g_idx": ("I32", (K,)),
}


def make_checkpoint(directory: Path) -> int:
    """Write the headers, the index and the configuration; return the number of tensors."""
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        header, end = {}, 0
        for number in range(shard * LAYERS_PER_SHARD, (shard + 1) * LAYERS_PER_SHARD):
            layer, expert, projection = number // 1152, number % 1152 // 3, ("gate", "up", "down")[number % 3]
            for part, (dtype, shape) in PARTS.items():
                nbytes = (2 if dtype == "F16" else 4) * shape[0] * (shape[1] if len(shape) > 1 else 1)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.{part}"
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + nbytes)}
                weight_map[name] = file_name
                end += nbytes
        raw = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return len(weight_map)


def timed(arguments: list[str]) -> tuple[float, float]:
    """Run our command and return its wall and CPU seconds."""
    command = [sys.executable, "-c", OURS, *arguments]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Make the checkpoint, run, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        count = make_checkpoint(Path(name))
        what = f"--dry-run, {count:,} tensors in {SHARDS} shards"
        commands = {"--help": ["--help"], what: [name, f"{name}-out", "--dry-run"]}
        for title, arguments in commands.items():
            runs = [timed(arguments) for _ in range(args.rounds)]
            wall, cpu = (statistics.median(figures) for figures in zip(*runs, strict=True))
            rows.append({"command": title, "runs": args.rounds, "wall_s": wall, "cpu_s": cpu})
    print(line(save(args, "How long does a command take before it converts?", rows)))
    print(*table(COLUMNS["startup"], rows), sep="\n")


if __name__ == "__main__":
    main()
