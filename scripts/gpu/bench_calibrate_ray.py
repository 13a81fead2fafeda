"""Time `w4a8 quantize --data` of one decoder block on one GPU, and on all GPUs of this machine through Ray.

    python scripts/gpu/bench_calibrate_ray.py [--models llama-8b qwen3-30b-a3b] [--samples 32] [--length 2048]
                                              [--experts 64] [--device cuda] [--small] [--only one | several]
                                              [--json FILE] [--keep NAME]

The models and samples are those of `bench_quantize_block.py`. One GPU and all of them are a process each. It quantizes
every model with a quarter of the experts and samples first: what counts comes after that, when kernels are compiled and
the workers of Ray have begun. sha256 is of the weights that are written. What limits it:

* here_s: calls that the command made itself. rest_s: what it did beside calls: the way through the block, and writing.
* wait_s: it waited for calls of others. receive_s: it took their results to its GPU.
* task_s: what tasks took elsewhere, from bytes that are there to bytes that can be fetched. trip_s: from asking Ray to
  having the result, of which two may be under way for a GPU. pack_s: taking what is sent off the GPU, beside the rest.
* host_mib, task_host_mib: the most memory of the host that the command and a worker took, what Ray's store shares too.
* best_s: what one GPU took, if calls of a stage were spread evenly over all GPUs at no cost.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_quantize_block import MODELS, SMALL, random_samples, write_model
from results import add_options, save, visible_gpus

from convert_w4a8.calibration.mixture import TOGETHER

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "ray")
QUESTION = "How much faster is calibration on two GPUs?"


class Limits:
    """Seconds of the steps of a calibration's calls, and the bytes that are sent, while a block lasts."""

    def __init__(self) -> None:
        self.found: dict[str, float] = defaultdict(float)
        self.stages: list[list[float]] = []
        """Seconds of the calls of each stage that one process made."""
        self._lock = threading.Lock()

    def add(self, name: str, value: float) -> None:
        """Add to a sum, from any thread."""
        with self._lock:
            self.found[name] += value

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose seconds are added to a sum."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, time.perf_counter() - started)

        return call

    def one_by_one(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Make calls in this process, as `calibration.spread.one_by_one` does."""
        stage: list[float] = []
        self.stages.append(stage)
        for arguments in calls:
            started = time.perf_counter()
            found = function(*arguments)
            stage.append(time.perf_counter() - started)
            self.add("here_s", stage[-1])
            yield found

    @contextmanager
    def of_calls(self) -> Iterator[None]:
        """Count what `CallsOnCluster` does."""
        from convert_w4a8.cluster import calls

        kind = calls.CallsOnCluster
        found, pack = (getattr(kind, name) for name in ("_found", "_packed"))

        def waited(ours: Any, result: Future[Any]) -> Any:
            self.counted("wait_s", result.exception)()
            return self.counted("receive_s", found)(ours, result)

        def packed(ours: Any, value: Any) -> Any:
            made = self.counted("pack_s", pack)(ours, value)
            self.add("sent_mb", made.nbytes / 1e6)
            return made

        with ExitStack() as stack:
            for name, step in (("_made_here", "here_s"), ("_there", "trip_s")):
                stack.enter_context(patch.object(kind, name, self.counted(step, getattr(kind, name))))
            stack.enter_context(patch.object(kind, "_found", waited))
            stack.enter_context(patch.object(kind, "_packed", packed))
            yield


def one(args: argparse.Namespace, root: Path) -> None:
    """Quantize all models in this process, each after a smaller one; print a line of JSON for each."""
    from convert_w4a8.cluster.access import calls_on, cluster_at

    with cluster_at("local" if args.ray else None) as cluster:
        calls = calls_on(cluster, args.device)
        device = torch.device(args.device) if calls is None else calls.device
        if calls is not None:
            calls.hold(1 << 30)
        ran = [] if cluster is None else cluster.ran
        for name in args.models:
            first = quantized(args, root / f"{name}-first", args.samples // 4, device, calls, ran)
            found = quantized(args, root / name, args.samples, device, calls, ran)
            print(json.dumps({"model": name, "first_s": first["seconds"], **found}), flush=True)


def quantized(
    args: argparse.Namespace, model: Path, count: int, device: torch.device, calls: Any, ran: list[Any]
) -> dict[str, Any]:
    """Quantize a model with so many samples; return how long it took, and what for. ran: the tasks of Ray so far."""
    from convert_w4a8.calibration.options import QuantizeOptions
    from convert_w4a8.calibration.plan import plan_quantization, with_samples
    from convert_w4a8.calibration.run import quantize
    from convert_w4a8.checkpoint.directory import open_checkpoint

    samples, checkpoint, out = random_samples(count, args.length), open_checkpoint(model), model.parent / "out"
    plan = plan_quantization(checkpoint, with_samples(QuantizeOptions(preset=args.preset), samples))
    limits, before = Limits(), len(ran)
    with nullcontext() if calls is None else limits.of_calls():
        started = time.perf_counter()
        spread = calls or limits.one_by_one
        quantize(checkpoint, plan, out, samples, device=device, overwrite=True, spread=spread)
        seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {
        "seconds": seconds,
        **limits.found,
        "rest_s": seconds - sum(limits.found[name] for name in ("here_s", "wait_s", "receive_s")),
        "tasks": len(ran) - before,
        "task_s": sum(each.seconds for each in ran[before:]),
        "stages": limits.stages,
        "host_mib": _peak_mib(Path("/proc/self")),
        "task_host_mib": max(map(_peak_mib, _workers()), default=None),
        "sha256": digest.hexdigest(),
    }


def _workers() -> Iterator[Path]:
    """Yield the processes of Ray's workers that are at work, or were."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(b"ray::"):
                yield path.parent


def _peak_mib(process: Path) -> float:
    """Return the largest resident size of a process."""
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) / 1024


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
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a process")
    parser.add_argument("--ray", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.one:
        one(args, args.one)
        return
    rows: list[dict[str, Any]] = []
    is_gpu = args.device == "cuda"
    gpus = visible_gpus() if is_gpu else ["0", "0"]
    with tempfile.TemporaryDirectory(prefix="w4a8-calibrate-", dir=args.directory) as root:
        known = {name: write_models(args, Path(root), name) for name in args.models}
        runs = {"one": ("1 GPU, without Ray", gpus[:1], []), "several": (f"{len(gpus)} GPUs", gpus, ["--ray"])}
        for words, visible, more in [run for number, run in runs.items() if args.only in (None, number)]:
            environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(visible)} if is_gpu else {})}
            command = [sys.executable, __file__, "--one", root, *more, "--models", *args.models]
            command += ["--samples", str(args.samples), "--length", str(args.length)]
            command += ["--device", args.device, "--preset", args.preset]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            timer = threading.Timer(args.limit, process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                row = known[found["model"]] | {"run": words, **found}
                row["gpu"] = torch.cuda.get_device_name(0) if is_gpu else "none"
                if stages := row.pop("stages"):
                    spread = sum(max(*calls, sum(calls) / len(gpus)) for calls in stages if calls)
                    row["best_s"] = row["rest_s"] + spread
                alone = next((other for other in rows if other["model"] == row["model"]), None)
                row["faster"] = alone and alone["seconds"] / row["seconds"]
                row["same"] = "yes" if alone is None or row["sha256"] == alone["sha256"] else "NO"
                rows.append(row)
                rows.sort(key=lambda row: args.models.index(row["model"]))
                print(row, flush=True)
                save(args, QUESTION, rows, packages=PACKAGES)
            timer.cancel()
            if process.wait():
                sys.exit(f"{words}: exit code {process.returncode}, perhaps after --limit {args.limit:.0f}")


def write_models(args: argparse.Namespace, root: Path, name: str) -> dict[str, Any]:
    """Write a model and a smaller one; return what rows say of it."""
    small = {key: SMALL[key] for key in SMALL if key in MODELS[name]} if args.small else {}
    settings: dict[str, Any] = MODELS[name] | small
    if args.experts and "num_experts" in settings:
        settings["num_experts"] = args.experts
    few = settings | {key: max(settings[key] // 4, 2 * TOGETHER) for key in ("num_experts",) if key in settings}
    write_model(root / f"{name}-first", few, torch.device(args.device))
    million, matrices = write_model(root / name, settings, torch.device(args.device))
    row = {"model": name, "million_weights": million, "matrices": matrices, "preset": args.preset}
    return row | {"tokens": args.samples * args.length, "experts": settings.get("num_experts")}


if __name__ == "__main__":
    main()
