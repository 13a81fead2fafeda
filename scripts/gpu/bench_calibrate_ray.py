"""Time `w4a8 quantize --data` of one decoder block on one GPU, and on all GPUs of this machine through Ray.

    python scripts/gpu/bench_calibrate_ray.py [--models llama-8b qwen3-30b-a3b] [--samples 32] [--length 2048]
                                              [--experts 64] [--device cuda] [--small] [--only one | several]
                                              [--json FILE] [--keep NAME]

The models and samples are those of `bench_quantize_block.py`. Each run is a process of its own, which quantizes the
model twice: what counts is the second time, when kernels are compiled and the workers of Ray have begun. sha256 is
of the weights that are written; task_s of what tasks took on other GPUs, of sent bytes and waiting without their work.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_quantize_block import MODELS, SMALL, random_samples, write_model
from results import add_options, save, visible_gpus

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "ray")
QUESTION = "How much faster is calibration on two GPUs?"


def one(args: argparse.Namespace, model: Path, out: Path) -> None:
    """Quantize a model twice in this process, and print what the second time took."""
    from convert_w4a8.calibration.options import QuantizeOptions
    from convert_w4a8.calibration.plan import plan_quantization, with_samples
    from convert_w4a8.calibration.run import quantize
    from convert_w4a8.calibration.spread import one_by_one
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cluster.access import calls_on, cluster_at

    samples = random_samples(args.samples, args.length)
    checkpoint = open_checkpoint(model)
    plan = plan_quantization(checkpoint, with_samples(QuantizeOptions(preset=args.preset), samples))
    with cluster_at("local" if args.ray else None) as cluster:
        calls = calls_on(cluster, args.device)
        device = torch.device(args.device) if calls is None else calls.device
        found: dict[str, Any] = {}
        for time_of in ("first_s", "seconds"):
            before = 0 if cluster is None else len(cluster.ran)
            started = time.perf_counter()
            quantize(checkpoint, plan, out, samples, device=device, overwrite=True, spread=calls or one_by_one)
            found[time_of] = time.perf_counter() - started
            ran = [] if cluster is None else cluster.ran[before:]
        found |= {"tasks": len(ran), "task_s": sum(each.seconds for each in ran)}
    digest = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        digest.update(path.read_bytes())
    print(json.dumps(found | {"sha256": digest.hexdigest()}))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-8b", "qwen3-30b-a3b"], choices=list(MODELS))
    parser.add_argument("--preset", default="full", choices=["full", "fast"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--experts", type=int, help="of a mixture, instead of all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=("one", "several"), help="on one GPU, or on all; default: both")
    parser.add_argument("--small", action="store_true", help="models of the same kinds that a CPU can do")
    parser.add_argument("--directory", type=Path, help="where models are made; a temporary one by default")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a run")
    parser.add_argument("--ray", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.one:
        one(args, *args.one)
        return
    rows: list[dict[str, Any]] = []
    is_gpu = args.device == "cuda"
    gpus = visible_gpus() if is_gpu else ["0"]
    with tempfile.TemporaryDirectory(prefix="w4a8-calibrate-", dir=args.directory) as root:
        for name in args.models:
            settings: dict[str, Any] = MODELS[name] | (
                {key: SMALL[key] for key in SMALL if key in MODELS[name]} if args.small else {}
            )
            if args.experts and "num_experts" in settings:
                settings["num_experts"] = args.experts
            million, matrices = write_model(Path(root) / name, settings, torch.device(args.device))
            runs = {"one": ("1 GPU, without Ray", gpus[:1], []), "several": (f"{len(gpus)} GPUs", gpus, ["--ray"])}
            for words, visible, more in [run for number, run in runs.items() if args.only in (None, number)]:
                environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(visible)} if is_gpu else {})}
                command = [sys.executable, __file__, "--one", str(Path(root) / name), str(Path(root) / "out"), *more]
                command += ["--samples", str(args.samples), "--length", str(args.length)]
                command += ["--device", args.device, "--preset", args.preset]
                row: dict[str, Any] = {"model": name, "million_weights": million, "matrices": matrices, "run": words}
                row |= {"preset": args.preset, "tokens": args.samples * args.length}
                row["experts"] = settings.get("num_experts")
                row["gpu"] = torch.cuda.get_device_name(0) if is_gpu else "none"
                try:
                    done = subprocess.run(
                        command, env=environment, check=True, capture_output=True, text=True, timeout=args.limit
                    )
                    row |= json.loads(done.stdout.splitlines()[-1])
                except (subprocess.SubprocessError, ValueError, IndexError) as error:
                    print(f"{name}, {words}: {error}: {getattr(error, 'stderr', '')}"[-3000:], file=sys.stderr)
                    continue
                alone = next((other for other in rows if other["model"] == name), None)
                row["faster"] = alone and alone["seconds"] / row["seconds"]
                row["same"] = "yes" if alone is None or row["sha256"] == alone["sha256"] else "NO"
                rows.append(row)
                print(row, flush=True)
                save(args, QUESTION, rows, packages=PACKAGES)


if __name__ == "__main__":
    main()
