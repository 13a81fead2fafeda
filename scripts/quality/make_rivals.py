"""Quantize a 16-bit model to W4A16 with other programs, all from the same calibration windows, to be compared with.

    make_rivals.py MODEL DATA OUT [--only auto-round,llm-compressor-awq] [--window 512] [--limit-minutes 30]

DATA is JSONL with `text` (scripts/quality/make_calibration.py writes it); each line is cut to --window tokens. Every
rival of RIVALS is made by its own program, in an environment of its own below --environments that is set up when it is
not there (--here: with the packages of the Python that runs this): 4 bits, groups of 128. It runs on a GPU where torch
finds one, else on the CPU, where AutoRound and AWQ take half an hour on two cores for 31M parameters. Checkpoints go to
OUT/NAME, and OUT/rivals.json says of each how it was made: versions, settings, device, seconds; or the end of the error
by which it failed. A rival that is in OUT is left as it is.
"""

import argparse
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path.home() / ".cache" / "w4a8-convert" / "rivals"
TORCH = "torch==2.13.0"
"""Of which there is a build for CPUs."""
PACKAGES = ("torch", "transformers", "auto-round", "llmcompressor", "compressed-tensors", "gptqmodel")
Settings = dict[str, Any]
Windows = list[list[int]]


@dataclass(frozen=True)
class Rival:
    """How a rival is made.

    environment: the directory of its packages. packages: what pip installs there; with `build`, after what they need
    to be built. make: called there with the model's directory, windows of token ids, the directory to write, settings.
    """

    environment: str
    packages: tuple[str, ...]
    make: Callable[[str, Windows, str, Settings], None]
    settings: Settings
    build: tuple[str, ...] = ()


def make_auto_round(model: str, windows: Windows, out: str, settings: Settings) -> None:
    """Run AutoRound: rounding and ranges learned by the sign of gradients, block by block."""
    os.environ["AR_DISABLE_META_LOAD"] = "1"  # it does not find the weights of fused experts otherwise
    import torch
    from auto_round import AutoRound

    batches = torch.split(torch.tensor(windows), 8)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
    common = {"dataset": loader, "seqlen": len(windows[0]), "nsamples": len(windows), "batch_size": 8}
    AutoRound(model, **settings, **common, device_map=device).quantize_and_save(out, format="auto_round")
    for directory in Path(out).glob("*-w4g128"):  # it adds a directory with the model's name
        for file in directory.iterdir():
            file.rename(Path(out) / file.name)
        directory.rmdir()


def make_llm_compressor(model: str, windows: Windows, out: str, settings: Settings) -> None:
    """Run llm-compressor with the modifiers of settings["recipe"]: (class, its arguments) in a row."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.cuda.is_available():  # AWQ pins memory without asking whether there is a device to copy to
        IntermediatesCache.pin_memory = lambda *_: None
    classes = {each.__name__: each for each in (GPTQModifier, QuantizationModifier, AWQModifier)}
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(
        model=dense,
        tokenizer=tokenizer,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]),
        recipe=[classes[name](**arguments) for name, arguments in settings["recipe"]],
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    dense.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def make_gptqmodel(model: str, windows: Windows, out: str, settings: Settings) -> None:
    """Run GPTQModel's GPTQ."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its own default is too small on two cores
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    dense = GPTQModel.load(model, QuantizeConfig(**settings, device="cpu"), torch_dtype=torch.bfloat16)
    dense.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=4)
    dense.save(out)


def _llm_compressor(*recipe: tuple[str, Settings]) -> Rival:
    return Rival("llm-compressor", (TORCH, "llmcompressor==0.14.0.1"), make_llm_compressor, {"recipe": recipe})


_LINEAR: Settings = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*\\.gate$"]}
_AUTO_ROUND = ("auto-round", (TORCH, "auto-round==0.16.1"), make_auto_round)
RIVALS: dict[str, Rival] = {
    "auto-round": Rival(*_AUTO_ROUND, {"scheme": "W4A16", "iters": 200, "enable_torch_compile": False}),
    "llm-compressor-awq": _llm_compressor(
        ("AWQModifier", {"offload_device": None}), ("QuantizationModifier", {**_LINEAR, "scheme": "W4A16"})
    ),
    "llm-compressor-awq-asym": _llm_compressor(
        ("AWQModifier", {"offload_device": None}), ("QuantizationModifier", {**_LINEAR, "scheme": "W4A16_ASYM"})
    ),
    "llm-compressor-gptq": _llm_compressor(("GPTQModifier", {**_LINEAR, "scheme": "W4A16"})),
    "gptqmodel": Rival(
        "gptqmodel",
        (TORCH, "gptqmodel==7.6.0"),
        make_gptqmodel,
        {"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        build=(TORCH, "setuptools", "wheel", "ninja"),
    ),
    "auto-round-1000": Rival(*_AUTO_ROUND, {"scheme": "W4A16", "iters": 1000, "enable_torch_compile": False}),
}
"""Settings are the defaults of each program where none is named; W4A16 is symmetric, in groups of 128. The second of
AWQ has zero-points, as in that program's examples. The last takes five times as long as the first."""


EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What Mixtral's checkpoints call the layers of an expert; programs that take experts apart may call them otherwise."""


def name_experts(directory: Path) -> None:
    """Give the experts of a Mixtral the names by which transformers and vLLM know them."""
    from safetensors.torch import load_file, save_file

    def mended(value: Any) -> Any:
        if isinstance(value, dict):
            return {mended(key): mended(each) for key, each in value.items()}
        if isinstance(value, list):
            return [mended(each) for each in value]
        if not isinstance(value, str):
            return value
        value = re.sub(r"\.mlp\.(?=gate\b|gate$|experts\b)", ".block_sparse_moe.", value)
        return re.sub(r"(\.experts\.\d+)\.(\w+_proj)", lambda match: f"{match[1]}.{EXPERTS[match[2]]}", value)

    config = json.loads((directory / "config.json").read_text())
    if config["model_type"] != "mixtral":
        return
    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(mended(tensors), directory / "model.safetensors", {"format": "pt"})
    for path in directory.glob("*config.json"):
        path.write_text(json.dumps(mended(json.loads(path.read_text())), indent=2) + "\n")


def read_windows(model: str, data: str, window: int) -> Windows:
    """Return the lines of JSONL as windows of token ids, those that are shorter left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    found = [tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids[:window] for line in lines]
    return [ids for ids in found if len(ids) == window]


def worker(name: str, model: str, data: str, out: str, window: int) -> None:
    """Make one rival in this process, and print what is known of it as the last line, JSON."""
    import torch

    random.seed(0)
    torch.manual_seed(0)
    rival, windows = RIVALS[name], read_windows(model, data, window)
    start = time.perf_counter()
    rival.make(model, windows, out, dict(rival.settings))
    name_experts(Path(out))
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    about = {
        "settings": rival.settings,
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "windows": len(windows),
        "window": window,
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(about))


def prepare(rival: Rival, environments: Path) -> Path:
    """Return the Python of a rival's environment, set up if it is not there."""
    directory = environments / rival.environment
    python, ready = directory / "bin" / "python", directory / "ready.json"
    wanted = json.dumps([*rival.build, *rival.packages])
    if not (ready.is_file() and ready.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        if rival.build:
            subprocess.run([str(python), "-m", "pip", "install", *rival.build], check=True)
        flags = ["--no-build-isolation"] if rival.build else []
        subprocess.run([str(python), "-m", "pip", "install", *flags, *rival.packages], check=True)
        ready.write_text(wanted)
    return python


def make(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make one rival in its environment; return how, or how that failed."""
    rival, out = RIVALS[name], args.out / name
    log = args.out / f"{name}.log"
    try:
        python = Path(sys.executable) if args.here else prepare(rival, args.environments)
        command = [str(python), __file__, "--worker", name, *map(str, (args.model, args.data, out, args.window))]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        with log.open("wb") as file:
            limit = args.limit_minutes * 60
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env, check=True, timeout=limit)
    except (subprocess.SubprocessError, OSError) as error:
        tail = log.read_text(errors="replace").splitlines()[-3:] if log.is_file() else []
        return {"failed": " | ".join([str(error).split("]")[-1].strip() or type(error).__name__, *tail])}
    about: dict[str, Any] = json.loads(log.read_text(errors="replace").splitlines()[-1])
    return about


def main() -> int:
    """Make what is not there yet; return 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the model in 16 bits")
    parser.add_argument("data", type=Path, help="calibration text, JSONL")
    parser.add_argument("out", type=Path, help="directory for the checkpoints")
    parser.add_argument("--only", default=",".join(RIVALS), help="of " + ", ".join(RIVALS))
    parser.add_argument("--window", type=int, default=512, help="tokens of each line")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--limit-minutes", type=float, default=120, help="for each rival")
    parser.add_argument("--here", action="store_true", help="use the packages of the Python that runs this")
    parser.add_argument("--environments", type=Path, default=CACHE)
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(RIVALS)):
        parser.error(f"unknown: {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rivals.json"
    for name in names:
        if not (args.out / name / "config.json").is_file():
            about = make(name, args)
            known = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(known | {name: about}, indent=2) + "\n")
            print(f"{name}: {about.get('failed') or str(about['seconds']) + ' s'}", flush=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    return 1 if any("failed" in known.get(name, {}) for name in names) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        rival_name, model_directory, data_file, directory_out, length = sys.argv[2:]
        worker(rival_name, model_directory, data_file, directory_out, int(length))
    else:
        sys.exit(main())
