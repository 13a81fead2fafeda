"""Compare what `w4a8 quantize` predicts for large models with what one of their blocks took, times their blocks.

    python scripts/bench/predict_quantize.py docs/benchmarks/results/quantize-block.json [--json FILE]

The file is of bench_quantize_block.py. A model of each name in it is written without its weights (headers and holes),
with a vocabulary of 128,256 tokens, and the plan is asked. Measured minutes are those of the blocks alone: embeddings
and the head are read once. A row says what a GPU and 16 cores of a CPU are predicted to take, too.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import add_options, line, save

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from bench_quantize_block import MODELS, build, random_samples

from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization, with_samples
from convert_w4a8.calibration.prediction import Cost, predict_cost
from convert_w4a8.calibration.run import STATES_BYTES
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.samples.sample import SampleSet

QUESTION = "What does the plan predict for large models, and what was measured?"
VOCABULARY = 128_256
CORES = 16


def write_holes(directory: Path, settings: dict[str, Any]) -> None:
    """Write a checkpoint of a model whose weights are a hole in one file."""
    config, model = build(settings, blocks=settings["layers"], vocabulary=VOCABULARY)
    header: dict[str, Any] = {}
    end = 0
    for name, stub in model.state_dict().items():
        start, end = end, end + 2 * math.prod(stub.shape)
        header[name] = {"dtype": "BF16", "shape": list(stub.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def predict(directory: Path, preset: str, samples: SampleSet, device: str, limit: int) -> Cost:
    """Return what the plan says."""
    checkpoint = open_checkpoint(directory)
    options = with_samples(QuantizeOptions(preset=Preset(preset)), samples)
    plan = plan_quantization(checkpoint, options)
    with patch.object(torch, "get_num_threads", lambda: CORES):
        return predict_cost(checkpoint, plan, options, samples, torch.device(device), limit)


def main() -> None:
    """Print and keep a row for each that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--states-memory", type=int, default=STATES_BYTES)
    add_options(parser)
    args = parser.parse_args()
    rows = []
    for row in json.loads(args.measured.read_text(encoding="utf-8"))["rows"]:
        samples = random_samples(row["tokens"] // 2048, 2048)
        with tempfile.TemporaryDirectory(prefix="predict-") as name:
            write_holes(Path(name), MODELS[row["model"]])
            on_gpu, on_cpu = (
                predict(Path(name), row["preset"], samples, device, args.states_memory) for device in ("cuda", "cpu")
            )
        rows.append(
            {
                **{key: row[key] for key in ("model", "preset", "layers", "tokens")},
                "measured_minutes": row["model_minutes"],
                "predicted_minutes": on_gpu.seconds / 60,
                "measured_gpu_gib": row["gpu_gib"],
                "predicted_gpu_gib": (on_gpu.gpu_memory or 0) / 2**30,
                "measured_host_gib": row["host_gib"],
                "predicted_host_gib": on_gpu.memory / 2**30,
                "measured_disk_gib": row["disk_gib"],
                "predicted_disk_gib": on_gpu.disk / 2**30,
                "cpu_hours": on_cpu.seconds / 3600,
                "cpu_gib": on_cpu.memory / 2**30,
            }
        )
        print(rows[-1], flush=True)
    print(line(save(args, QUESTION, rows)))


if __name__ == "__main__":
    main()
