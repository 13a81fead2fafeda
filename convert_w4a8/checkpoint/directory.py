"""A checkpoint directory as it lies on disk: configuration, tensor headers, side files. Nothing is loaded here."""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_header
from convert_w4a8.errors import ConvertError

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_MAX_JSON_BYTES = 100_000_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the parsed config.json, every tensor's header entry, and the files beside them.

    quantization_config: empty where the checkpoint has none.
    """

    root: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    """Relative to `root`: what is copied as it is (tokenizer, templates, custom code, …)."""

    def modules_with(self, role: str) -> list[str]:
        """Return the modules that have a tensor called `module.role`, sorted."""
        suffix = "." + role
        return sorted(name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(root: Path) -> Checkpoint:
    """Open a checkpoint directory, reading its JSON files and safetensors headers only.

    Raises:
        ConvertError: a file is missing, damaged or inconsistent with another.

    """
    if not root.is_dir():
        raise ConvertError(str(root), "is not a directory", "give a checkpoint directory or a Hub id (org/name)")
    config = read_json(root / CONFIG)
    quantization = config.get("quantization_config")
    if quantization is None and (root / QUANTIZE_CONFIG).is_file():
        quantization = {"quant_method": "gptq", **read_json(root / QUANTIZE_CONFIG)}
    if not isinstance(quantization, dict | None):
        raise ConvertError(f"{root / CONFIG}: quantization_config", "is not a JSON object", "repair the file")
    return Checkpoint(root, config, quantization or {}, _read_headers(root), _find_side_files(root))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConvertError: the file is missing, not UTF-8, not JSON, or not an object.

    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_size > _MAX_JSON_BYTES:
            raise ConvertError(str(path), "is not a JSON file", "download or write the file again")
        value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_constant)
    except OSError as error:
        raise ConvertError(str(path), f"cannot be read ({error.strerror})", "check the checkpoint directory") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(str(path), f"is not valid JSON ({error})", "download or write the file again") from error
    if not isinstance(value, dict):
        raise ConvertError(str(path), "does not hold a JSON object", "download or write the file again")
    return value


def _constant(name: str) -> float:
    """Read what is no JSON, but written by Python: infinities, as some models' settings are, but not NaN."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def _read_headers(root: Path) -> dict[str, TensorInfo]:
    if (root / INDEX).is_file():
        return _read_sharded(root)
    files = sorted(path for path in root.glob("*.safetensors") if path.is_file())
    if not files:
        others = sorted(path.name for path in root.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        reason = f"no safetensors file, only {others[0]} (a pickle can run code)" if others else "no safetensors file"
        raise ConvertError(str(root), reason, "save the model with safe_serialization=True first")
    if len(files) > 1:
        raise ConvertError(
            str(root),
            f"{len(files)} safetensors files but no {INDEX}",
            "restore the index or keep a single file",
        )
    return read_header(files[0])[1]


def _read_sharded(root: Path) -> dict[str, TensorInfo]:
    index_path = root / INDEX
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index_path}: weight_map", "is missing or not an object", "restore the index")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted({str(file) for file in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConvertError(
                f"{index_path}: {shard!r}",
                "is not the name of a safetensors file beside it",
                "restore the index",
            )
        if not os.path.isfile(root / shard):  # noqa: PTH113  (which takes names that cannot be, too)
            raise ConvertError(str(root / shard), f"is named by {INDEX} but is absent", "download the shard")
        for name, info in read_header(root / shard)[1].items():
            if weight_map.get(name) != shard:
                where = f"puts it into {weight_map[name]}" if name in weight_map else "does not list it"
                raise ConvertError(f"{root / shard}: tensor {name!r}", f"{INDEX} {where}", "restore the index")
            tensors[name] = info
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ConvertError(
            f"{root / weight_map[missing[0]]}: tensor {missing[0]!r}",
            f"is listed in {INDEX} but not in the shard ({len(missing)} such)",
            "download the shard and the index again",
        )
    return tensors


def _find_side_files(root: Path) -> tuple[Path, ...]:
    """Return every file that is neither a weight, an index, nor written anew: configurations and the card.

    Raises:
        ConvertError: a link leads out of the checkpoint, and would carry a file of the machine into the output.

    """
    found = []
    home = root.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]  # as in the Hub's cache
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        stale = path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json")) or str(relative) in (
            CONFIG,
            QUANTIZE_CONFIG,
            CARD,
        )
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in homes):
            raise ConvertError(
                str(path),
                f"is a link out of the checkpoint, to {path.resolve()}",
                "copy the file, or give the directory that it lies in",
            )
        if not stale:
            found.append(relative)
    return tuple(found)
