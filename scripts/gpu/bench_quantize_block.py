"""Time one decoder block through `w4a8 quantize --data`, step by step, and what memory it takes.

    python scripts/gpu/bench_quantize_block.py [--device cuda] [--models llama-8b ...] [--presets fast full]
                                               [--samples 128] [--length 2048] [--directory DIR] [--json FILE]

A model of one block with these shapes and a vocabulary of 1,024 tokens is written (normal weights) and read back from
the page cache; the samples are random tokens. The block goes through all of `calibration/walk.py`, its layers are
encoded and written to a file. Before each model a small one of the same kind goes the same way, for the compilers.

Seconds are wall time; on a CPU the processors' time, of all of them. A step's do not hold those of steps within it, and
on a GPU each step waits for those before, so that it is its own: `forward` (the block's own code, up to each stage, in
both versions), `states` (hidden states from memory or disk and back), `rounding` (to FP8), `moments`, `factor` (of
second moments), `target` (half-way to the original's outputs), `codebooks` (codes and tables), `write`, and `rest`.
`start` (embeddings) is not in `seconds`.
"""

import argparse
import gc
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from results import PACKAGES, add_options, line, save

from convert_w4a8.calibration import block, matrix, mixture, walk
from convert_w4a8.calibration.block import Block
from convert_w4a8.calibration.mixture import TOGETHER
from convert_w4a8.calibration.model import Model
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization, with_samples
from convert_w4a8.calibration.run import STATES_BYTES
from convert_w4a8.calibration.states import States, batches
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.samples.sample import Sample, SampleSet, TokenKind, count

QUESTION = "What does a block cost to quantize?"
VOCABULARY = 1024


def llama(hidden: int, intermediate: int, heads: int, keys: int, layers: int, kind: str = "llama") -> dict[str, Any]:
    """Return the settings of a model, whose heads have 128 channels."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 128,
        "layers": layers,
    }


MODELS = {
    "llama-1b": llama(2048, 8192, 16, 8, 16),
    "llama-8b": llama(4096, 14336, 32, 8, 32),
    "llama-70b": llama(8192, 28672, 64, 8, 80),
    "command-a": llama(12288, 33792, 96, 8, 64, "cohere2"),
    "qwen3-30b-a3b": llama(2048, 6144, 32, 4, 48, "qwen3_moe")
    | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
}
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1} | {
    "moe_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def build(settings: dict[str, Any], *, blocks: int, vocabulary: int) -> tuple[Any, torch.nn.Module]:
    """Return the configuration of a model, and the model without weights."""
    known = {key: value for key, value in settings.items() if key not in ("model_type", "layers")}
    more = {"vocab_size": vocabulary, "num_hidden_layers": blocks, "tie_word_embeddings": False}
    more |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(settings["model_type"], **known, **more)
    kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [kind.__name__]
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def write_model(directory: Path, settings: dict[str, Any], device: torch.device) -> tuple[float, int]:
    """Write a model of one block; returns its million weights in linear layers, and how many matrices these are."""
    config, model = build(settings, blocks=1, vocabulary=VOCABULARY)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    weights = matrices = 0
    for name, stub in model.state_dict().items():
        tensor = torch.ones(stub.shape, dtype=torch.bfloat16, device=device)
        if "norm" not in name:
            tensor.normal_(std=0.02, generator=generator)
        tensors[name] = tensor.cpu()
        if ".layers." in name and stub.dim() > 1 and not name.endswith("mlp.gate.weight"):
            weights += stub.numel()
            matrices += stub.shape[0] * (2 if "gate_up" in name else 1) if stub.dim() == 3 else 1
    directory.mkdir()
    config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return weights / 1e6, matrices


def random_samples(number: int, length: int) -> SampleSet:
    """Return samples of random tokens, all of which count."""
    generator = np.random.default_rng(0)
    kinds, kept = np.full(length, TokenKind.TEXT, np.uint8), np.zeros(length, np.uint8)
    samples = [
        Sample(generator.integers(0, VOCABULARY, length).astype(np.int32), kinds, kept, "") for _ in range(number)
    ]
    return SampleSet(tuple(samples), count(samples))


class Steps:
    """Seconds by step; a step within another is not counted in that one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self.now = time.process_time if device.type == "cpu" else time.perf_counter
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what is done here to a step."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is a step."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.step(name):
                return function(*args, **kwargs)

        return call


STEPS: list[tuple[Any, str, str]] = [
    (Model, "load_block", "read"),
    (Block, "inputs", "forward"),
    (Block, "output", "forward"),
    (Block, "all_inputs", "forward"),
    (Block, "stages", "forward"),
    (States, "get", "states"),
    (States, "put", "states"),
    (walk.Walk, "_states", "states"),
    (Moments, "add", "moments"),
    (block, "quantize_tokens", "rounding"),
    (matrix, "curvature", "factor"),
    (matrix, "mixed_target", "target"),
    (matrix, "quantize_matrix", "codebooks"),
    (matrix, "quantize_matrices", "codebooks"),
    (mixture, "down_inputs", "forward"),
]


class HostMemory:
    """The most memory that this process holds while it is open, in GiB, looked at every 20 ms."""

    def __enter__(self) -> Self:
        """Begin to look."""
        self.most = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            shared = int(Path("/proc/self/statm").read_text().split()[2])
            self.most = max(self.most, (pages - shared) * 4096 / 2**30)

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()


def measure(
    settings: dict[str, Any], preset: Preset, samples: SampleSet, device: torch.device, directory: Path, limit: int
) -> dict[str, Any]:
    """Quantize the block of a model; returns seconds by step and memory."""
    model_directory = directory / "model"
    weights, matrices = write_model(model_directory, settings, device)
    options = with_samples(QuantizeOptions(preset=preset), samples)
    checkpoint = open_checkpoint(model_directory)
    plan = plan_quantization(checkpoint, options)
    layers = [layer for layer in plan.converted if ".layers.0." in layer.spec.name]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    steps = Steps(device)
    (directory / "states").mkdir()
    with ExitStack() as stack, HostMemory() as host:
        for owner, name, step in STEPS:
            stack.enter_context(patch.object(owner, name, steps.counted(step, getattr(owner, name))))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        with steps.step("start"):
            ours = walk.Walk(
                Model(checkpoint, device, dtype), batches(samples.samples), options, directory / "states", limit
            )
        start, wall = steps.now(), time.perf_counter()
        with steps.step("rest"), (directory / "out").open("wb") as out:
            for done in ours.quantize(0, layers):
                with steps.step("write"):
                    for parts in plan.target.encode(done.layer.module, done.w4a8).values():
                        for part in parts:
                            out.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        seconds, wall = steps.now() - start, time.perf_counter() - wall
        spilled = sum(path.stat().st_size for path in (directory / "states").iterdir())
    return {
        "million_weights": weights,
        "matrices": matrices,
        "layers": settings["layers"],
        "seconds": seconds,
        "wall_s": wall,
        **{f"{name}_s": value for name, value in steps.seconds.items()},
        "gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "host_gib": host.most,
        "disk_gib": spilled / 2**30,
        "model_minutes": seconds * settings["layers"] / 60,
    }


def main() -> None:
    """Print and keep a row for each model and preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["llama-8b", "llama-70b", "command-a"], choices=MODELS)
    parser.add_argument("--presets", nargs="+", default=["fast", "full"], choices=[str(preset) for preset in Preset])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="of each sample, in tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--states-memory", type=int, default=STATES_BYTES, help="bytes, as `w4a8 quantize` has it")
    parser.add_argument("--together", type=int, default=TOGETHER, help="experts at a time, at most")
    parser.add_argument("--experts", type=int, help="of a mixture, instead of as many as it has")
    parser.add_argument("--directory", type=Path, help="for the model and what is spilled")
    add_options(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    vars(mixture)["TOGETHER"] = args.together
    samples = random_samples(args.samples, args.length)
    rows: list[dict[str, Any]] = []
    packages = (*PACKAGES, "transformers")
    for name in args.models:
        for preset in map(Preset, args.presets):
            found: dict[str, Any] = {}
            whole = MODELS[name] | ({"num_experts": args.experts} if args.experts else {})
            small = MODELS[name] | {key: value for key, value in SMALL.items() if key in MODELS[name]}
            for settings, ours in ((small, random_samples(2, 128)), (whole, samples)):
                with tempfile.TemporaryDirectory(prefix="block-", dir=args.directory) as directory:
                    found = measure(settings, preset, ours, device, Path(directory), args.states_memory)
            head = {"model": name, "preset": str(preset), "device": device.type, "tokens": samples.tokens}
            head |= {"together": args.together, "experts": whole.get("num_experts")}
            rows.append(head | found)
            print(rows[-1], flush=True)
            save(args, QUESTION, rows, packages=packages)  # as they come
    print(line(save(args, QUESTION, rows, packages=packages)))


if __name__ == "__main__":
    main()
