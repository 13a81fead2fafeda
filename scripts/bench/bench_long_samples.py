"""How much memory `w4a8 quantize` takes for one long sample, by its length: of small models made here.

    bench_long_samples.py [--lengths 1024 16384 65536] [--models llama mistral] [--presets fast full] [--keep NAME]

Each model is random, with two blocks of 128 channels: `llama` attends to everything, `mistral` and `gemma3` to windows
of 1,024 tokens (Gemma in one block of the two), `deepseek` has values that are narrower than its keys. Each run is a
process of its own, on a CPU. The peak is that of its resident memory; `more` is what it is above the same run with a
sample of 128 tokens, so without libraries, weights and codebooks; and `bytes a token and channel` is that by length and
width of the model. Hidden states are 2 bytes of it, 4 with the full preset.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results import PACKAGES, add_options, save

QUESTION = "How much memory does quantizing take for one long sample?"
SHORT = 128
WIDTH = 128
_SIZES = {
    "vocab_size": 256,
    "hidden_size": WIDTH,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1 << 17,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 1024}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"sliding_window": 1024, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "first_k_dense_replace": 2,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
        },
    ),
}
"""Name → class, configuration and settings."""


def write_model(name: str, directory: Path) -> None:
    """Write a random model in BF16."""
    import torch
    import transformers

    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, kind)(getattr(transformers, config)(**{**_SIZES, **settings}))
    made.to(torch.bfloat16).save_pretrained(directory)


def quantize_once(directory: Path, length: int, preset: str) -> None:
    """Quantize a model with one sample, and print peak memory in bytes and seconds as JSON."""
    import numpy as np

    from convert_w4a8.api import quantize
    from convert_w4a8.calibration.options import QuantizeOptions
    from convert_w4a8.samples.sample import Sample, SampleSet, TokenKind, count

    tokens = np.random.default_rng(0).integers(0, _SIZES["vocab_size"], length).astype(np.int32)
    kinds = np.full(length, TokenKind.TEXT, np.uint8)
    sample = Sample(tokens, kinds, np.zeros(length, np.uint8), "sample")
    options = QuantizeOptions(preset=preset)  # type: ignore[arg-type]  # strings are taken too
    start = time.monotonic()
    out = directory.parent / f"out-{length}-{preset}"
    quantize(directory, out, options, samples=SampleSet((sample,), count([sample])), device="cpu", overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.monotonic() - start}))


def measure(directory: Path, length: int, preset: str) -> dict[str, float]:
    """Run `quantize_once` in a process of its own."""
    command = [sys.executable, __file__, "--once", str(directory), str(length), preset]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, float] = json.loads(found.splitlines()[-1])
    return result


def main() -> int:
    """Print a line for each model, preset and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 16_384, 65_536])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--presets", nargs="+", choices=("fast", "full"), default=["fast", "full"])
    parser.add_argument("--once", nargs=3, metavar=("DIR", "LENGTH", "PRESET"), help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.once:
        quantize_once(Path(args.once[0]), int(args.once[1]), args.once[2])
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="long-samples-") as work:
        for name in args.models:
            directory = Path(work) / name
            write_model(name, directory)
            for preset in args.presets:
                measure(directory, SHORT, preset)  # what is compiled once is compiled here
                short = measure(directory, SHORT, preset)["peak"]
                for length in args.lengths:
                    found = measure(directory, length, preset)
                    more = found["peak"] - short
                    row = {"model": name, "preset": preset, "tokens": length, "peak_mib": found["peak"] / 2**20}
                    row |= {"more_mib": more / 2**20, "bytes_a_token_and_channel": more / length / WIDTH}
                    rows.append(row | {"seconds": found["seconds"]})
                    print(
                        *(
                            f"{key} {value:.4g}" if isinstance(value, float) else value
                            for key, value in rows[-1].items()
                        ),
                        flush=True,
                    )
                    save(args, QUESTION, rows, packages=(*PACKAGES, "transformers"), settings={"width": WIDTH})
    return 0


if __name__ == "__main__":
    sys.exit(main())
