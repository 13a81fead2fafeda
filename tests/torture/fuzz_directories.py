"""Ways to damage what stands beside the weights: the index, the directory, the configuration. See fuzz_mutations.py."""

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from fuzz_mutations import Expect, Mutation, shards
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


# The index and the directory.


def index_lies(root: Path, rng: random.Random) -> Expect:
    """Let the index name shards that are absent or elsewhere, or lose or gain tensors."""
    path = root / INDEX
    outside = root.parent / "outside.safetensors"
    if not path.exists():
        return directory(root, rng)
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    shutil.copy(rng.choice(shards(root)), outside)
    match rng.randrange(10):
        case 0:
            index["weight_map"][name] = rng.choice(
                ("absent.safetensors", "../outside.safetensors", str(outside), "a/b.safetensors", "..", "", "model.bin")
            )
        case 1:
            index["weight_map"][name] = rng.choice((None, 7, ["x"], {"a": 1}, True, "a\0.safetensors", "x" * 5000))
        case 2:
            del index["weight_map"][name]
        case 3:
            index["weight_map"]["ghost.weight"] = rng.choice(shards(root)).name
        case 4:
            index["weight_map"] = rng.choice(([], {}, None, 7, "x", [[name, "x"]]))
        case 5:
            path.write_bytes(rng.choice((b"", b"\xff\xfe{}", b"[" * 100_000, b"{", b"[]", b"nul")))
            return Expect((INDEX,))
        case 6:
            shard = rng.choice(shards(root))
            shard.rename(root.parent / "elsewhere.safetensors")
            shard.symlink_to(rng.choice((root.parent / "elsewhere.safetensors", Path("../elsewhere.safetensors"))))
            return Expect((shard.name,))
        case 7:
            path.unlink()
            return Expect((INDEX,))
        case 8:
            other = rng.choice([shard.name for shard in shards(root) if shard.name != index["weight_map"][name]])
            index["weight_map"][name] = other
        case _:
            shard = rng.choice(shards(root))
            shard.unlink()
            replacement(shard, rng)
            return Expect((shard.name,))
    path.write_text(json.dumps(index))
    return Expect((INDEX, name, "absent.safetensors"))


def replacement(path: Path, rng: random.Random) -> None:
    """Put something in a file's place that cannot be read as one."""
    match rng.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case _:
            path.symlink_to("nowhere")


def directory(root: Path, rng: random.Random) -> Expect:
    """Take away or replace whole files: no weights, only pickles, a configuration that is none, links outside."""
    match rng.randrange(6):
        case 0:
            for path in shards(root):
                path.rename(path.with_suffix(rng.choice((".bin", ".pt", ".pth"))))
            (root / INDEX).unlink(missing_ok=True)
            return Expect((str(root),))
        case 1:
            path = rng.choice(shards(root))
            path.unlink()
            replacement(path, rng)
            return Expect((path.name, str(root)))
        case 2:
            (root / CONFIG).unlink()
            replacement(root / CONFIG, rng)
            return Expect((CONFIG,))
        case 3:
            (root / "tokenizer.model").symlink_to("/etc/hostname")
            return Expect(("tokenizer.model",))
        case 4:
            (root / "assets").mkdir(exist_ok=True)
            (root.parent / "secret.txt").write_text("secret")
            (root / "assets" / "notes.txt").symlink_to("../../secret.txt")
            return Expect(("notes.txt",))
        case _:
            shutil.copy(shards(root)[0], root / "second.safetensors")
            return Expect(("second.safetensors", INDEX), refused=not (root / INDEX).exists())


# The configuration.


def config_text(root: Path, rng: random.Random) -> Expect:
    """Put something into the place of config.json that is no configuration."""
    path = root / CONFIG
    raw = path.read_bytes()
    wrong = (
        b"", b"{", raw[: len(raw) // 2], raw.replace(b"{", b"{\xff", 1), b"[" * 100_000, b'{"a":' * 100_000, b"null",
        b'"config"', b"[]", raw.decode().encode("utf-16"), b'{"x": ' + b"9" * 10_000 + b"}", b"\x00" * 1000,
    )  # fmt: skip
    path.write_bytes(rng.choice(wrong))
    return Expect((CONFIG,))


def elsewhere(root: Path, rng: random.Random) -> Expect:
    """Put settings, index or weights where other tools put them, or more weights beside them: no damage."""
    path = root / (CONFIG if "quantization_config" in (root / CONFIG).read_text() else "quantize_config.json")
    config = json.loads(path.read_text())
    some = {"mtp.fc.weight": torch.zeros(2, 2)}
    match rng.randrange(6):
        case 0:
            if path.name == CONFIG:
                block = config.pop("quantization_config")
                place = rng.choice(("llm_config", "text_config", "a"))
                config[place] = {
                    **config.get(place, {}),
                    rng.choice(("quantization_config", "compression_config")): block,
                }
                path.write_text(json.dumps(config))
        case 1:
            if (root / INDEX).exists():
                (root / INDEX).rename(root / "gptq_model-4bit-128g.safetensors.index.json")
        case 2:
            (root / "consolidated.safetensors").write_bytes(b"x")
            (root / "params.json").write_text("{}")
        case 3:
            for name in ("mtp.safetensors", "adapter_model.safetensors", "lora/adapter_model.safetensors"):
                (root / name).parent.mkdir(exist_ok=True)
                save_file(some, root / name)
        case 4:
            shutil.copytree(root, root.parent / "copy")
            (root.parent / "copy").rename(root / rng.choice(("original", "checkpoint-500", "onnx")))
        case _:
            for name in ("spk_dict.pt", "model.gguf", "2_Dense/pytorch_model.bin"):
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_bytes(b"x")
    return Expect(("bytes of memory", "the disk has"), refused=False)  # for no other reason


ODD: tuple[Any, ...] = (
    *(0, -7, -1, 3, 8, 4.5, 1e300, 10**30, math.nan, math.inf, "4", "128", "x", ""),
    *(True, False, None, [], [4], {}, {"a": 1}),
)


def config_lies(root: Path, rng: random.Random) -> Expect:
    """Change one value of the quantization configuration, at any depth, to something of another kind or size."""
    path = root / (CONFIG if "quantization_config" in (root / CONFIG).read_text() else "quantize_config.json")
    config = json.loads(path.read_text())
    place = config.get("quantization_config", config)
    while True:
        key = rng.choice(list(place))
        if not (isinstance(place[key], dict) and place[key] and rng.random() < 0.8):
            break
        place = place[key]
    place[key] = rng.choice(ODD)
    path.write_text(json.dumps(config))
    return Expect(("quantization_config", "model.", CONFIG, "quant_method", "group", "--"), refused=False)


def config_surely_wrong(root: Path, rng: random.Random) -> Expect:
    """Let the configuration claim what the tensors contradict: bits, group size, method, patterns that are none."""
    path = root / (CONFIG if "quantization_config" in (root / CONFIG).read_text() else "quantize_config.json")
    config = json.loads(path.read_text())
    block = config.get("quantization_config", config)
    groups = block.get("config_groups")
    scheme = next(iter(groups.values()))["weights"] if groups else block
    bits = rng.choice((8, 3, "4", 4.5, math.nan, [4], -4, True))
    size = rng.choice((0, -7, 3, 32, 512, "128", 1.5, math.nan, [128], 10**30, True, -(10**30)))
    match rng.randrange(4):
        case 0:
            scheme["num_bits" if groups else "bits"] = bits
        case 1:
            scheme["group_size"] = size
        case 2:
            block["quant_method"] = rng.choice(("awq2", "", 7, [], {}, "bitsandbytes", "fp8", None))
        case _:
            if groups:
                target: Any = rng.choice(
                    ("re:(", "re:[", "re:*", "no.such.module", 7, None, {}, "re:(([a-z_.0-9]+)+)+!")
                )
                next(iter(groups.values()))["targets"] = rng.choice(([target], target, []))
            else:
                block["version" if block.get("quant_method") == "awq" else "checkpoint_format"] = rng.choice(
                    ("gemv", "marlin", 7, [1], {"a": 1}, "x")
                )
    path.write_text(json.dumps(config))
    return Expect(("quantization_config", "model.", "quant_method", CONFIG))


def settings_of_other_bytes(root: Path, rng: random.Random) -> Expect:
    """Let a setting say that the bytes, or what belongs to them, are others than are read."""
    path = root / (CONFIG if "quantization_config" in (root / CONFIG).read_text() else "quantize_config.json")
    config = json.loads(path.read_text())
    block = config.get("quantization_config", config)
    by_method: dict[str, dict[str, Any]] = {
        "gptq": {"is_marlin_format": True, "pack_dtype": "int16", "rotation": "random", "adapter": {"path": "eora"}},
        "awq": {"backend": "llm-awq", "rotation": "hadamard", "version": "gemv_fast"},
        "auto-round": {"packing_format": "auto_round:fp8", "data_type": "mx_fp", "act_bits": 8, "super_bits": 6},
        "compressed-tensors": {"format": "marlin-24", "transform_config": {"R1": {}}},
    }
    anywhere = {"packing_order": "x", "layout": 3, "weight_layout": ["a"], "interleave": True, "tile_size": 16}
    values = by_method[block.get("quant_method", "gptq")] | anywhere
    key = rng.choice(list(values))
    block[key] = values[key]
    path.write_text(json.dumps(config))
    return Expect((key,))


def settings_that_are_not_known(root: Path, rng: random.Random) -> Expect:
    """Add settings that no tool writes, and that do not speak of a layout."""
    path = root / (CONFIG if "quantization_config" in (root / CONFIG).read_text() else "quantize_config.json")
    config = json.loads(path.read_text())
    block = config.get("quantization_config", config)
    for number in range(rng.choice((1, 3, 1000))):
        block[rng.choice(("clip", "é\n\x1b[2J", "x" * 3000)) + str(number)] = rng.choice(ODD)
    path.write_text(json.dumps(config))
    return Expect(("quantization_config", CONFIG), refused=False)


MUTATIONS: tuple[Mutation, ...] = (
    *(index_lies, directory, config_text, config_lies, config_surely_wrong, elsewhere),
    *(settings_of_other_bytes, settings_that_are_not_known),
)
