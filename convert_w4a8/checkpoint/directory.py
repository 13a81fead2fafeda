"""A checkpoint directory as it lies on disk: configuration, tensor headers, side files. Nothing is loaded here."""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.disk import real_path
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_header
from convert_w4a8.errors import ConvertError

CONFIG = "config.json"
QUANTIZE_CONFIG = "quantize_config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_MAX_JSON_BYTES = 500_000_000
_MAX_JSON_MARKS = 5_000_000
"""Brackets, braces and commas: an index has a comma for each tensor."""
_MAX_DEPTH = 16
"""Directories within each other."""
_TOOLS_OWN = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"})
"""Hidden files that are the tools' own, and no part of a checkpoint."""
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
    left_out: tuple[str, ...] = ()
    """What is neither read nor copied, with the reason."""

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
    if not os.path.isdir(root):  # noqa: PTH112  (which takes names that cannot be)
        raise ConvertError(str(root), "is not a directory", "give a checkpoint directory or a Hub id (org/name)")
    try:
        return _open(root)
    except OSError as error:  # a directory that may not be looked into, a name that is too long
        raise ConvertError(
            str(error.filename or root), f"cannot be read ({error.strerror})", "check the checkpoint directory"
        ) from error


def _open(root: Path) -> Checkpoint:
    homes = _homes(root)
    for name in (CONFIG, QUANTIZE_CONFIG, CARD, INDEX):
        _check_link(root / name, homes)
    config = read_json(root / CONFIG)
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConvertError(str(root / CONFIG), "holds lone surrogates, which are no text", "repair the file") from error
    quantization = config.get("quantization_config")
    if quantization is None and (root / QUANTIZE_CONFIG).is_file():
        quantization = {"quant_method": "gptq", **read_json(root / QUANTIZE_CONFIG)}
    if not isinstance(quantization, dict | None):
        raise ConvertError(f"{root / CONFIG}: quantization_config", "is not a JSON object", "repair the file")
    side_files, left_out = _find_side_files(root)
    return Checkpoint(root, config, quantization or {}, _read_headers(root), side_files, left_out)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConvertError: the file is missing, not UTF-8, not JSON, or not an object.

    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_size > _MAX_JSON_BYTES:
            raise ConvertError(str(path), "is not a JSON file", "download or write the file again")
        raw = path.read_bytes()
        if sum(map(raw.count, (b"[", b"{", b","))) > _MAX_JSON_MARKS:  # parsing takes some 100 bytes for each
            raise ConvertError(str(path), "is not a checkpoint's JSON file", "download or write the file again")
        value = json.loads(raw.decode("utf-8"), parse_constant=_constant)
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
    return read_header(_check_weights(files[0], _homes(root)))[1]


def _read_sharded(root: Path) -> dict[str, TensorInfo]:
    index_path = root / INDEX
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index_path}: weight_map", "is missing or not an object", "restore the index")
    tensors: dict[str, TensorInfo] = {}
    homes = _homes(root)
    for shard in sorted({str(file) for file in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConvertError(
                f"{index_path}: {shard!r}",
                "is not the name of a safetensors file beside it",
                "restore the index",
            )
        if not os.path.isfile(root / shard):  # noqa: PTH113  (which takes names that cannot be, too)
            raise ConvertError(str(root / shard), f"is named by {INDEX} but is absent", "download the shard")
        for name, info in read_header(_check_weights(root / shard, homes))[1].items():
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


def _homes(root: Path) -> list[Path]:
    """Return where a checkpoint's files may really lie: its own directory, and the blobs of the Hub's cache."""
    home = root.resolve()
    return [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]


def _check_link(path: Path, homes: Iterable[Path]) -> Path:
    """Return a path unchanged.

    Raises:
        ConvertError: a link leads out of the checkpoint, and would carry a file of the machine into the output.

    """
    try:
        real = real_path(path)
    except OSError as error:
        raise ConvertError(str(path), "is a link that leads nowhere", "copy the file that is meant") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise ConvertError(
            str(path),
            f"is a link out of the checkpoint, to {real}",
            "copy the file, or give the directory that it lies in",
        )
    return path


def _check_weights(path: Path, homes: Iterable[Path]) -> Path:
    """Return a path unchanged. Raises ConvertError for a link out of the checkpoint, or a name that is not UTF-8."""
    check_name(path)
    return _check_link(path, homes)


def check_name(path: Path) -> None:
    """Raise ConvertError for a name that the safetensors library cannot open."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        reason = "has a name that is not UTF-8, which the safetensors library cannot open"
        raise ConvertError(str(path), reason, "rename it, or choose another path") from error


def _walk(root: Path) -> Iterator[Path]:
    """Yield everything below a directory, without following links.

    Raises:
        ConvertError: directories are nested deeper than any checkpoint's are.

    """
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ConvertError(str(directory), "is nested too deep for a checkpoint", "give the checkpoint's directory")
        for path in directory.iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                waiting.append((path, depth + 1))


def _find_side_files(root: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return every file that is neither a weight, an index, nor written anew, and what is left out, with the reason.

    Raises:
        ConvertError: a link leads out of the checkpoint.

    """
    found, left_out, homes = [], [], _homes(root)
    for path in sorted(_walk(root)):
        relative = path.relative_to(root)
        hidden = next((part for part in relative.parts if part.startswith(".")), None)
        if path.is_symlink():
            if not path.exists():
                left_out.append(f"{relative} (a link to nothing)")
                continue
            _check_link(path, homes)
            if path.is_dir():
                left_out.append(f"{relative} (a link to a directory)")
                continue
        elif not path.is_file():
            continue
        if hidden is not None:
            if hidden not in _TOOLS_OWN:
                left_out.append(f"{relative} (hidden)")
        elif path.name.endswith(_WEIGHT_SUFFIXES):
            if not path.name.endswith(".safetensors"):
                left_out.append(f"{relative} (weights in another format)")
        elif not path.name.endswith(".index.json") and str(relative) not in (CONFIG, QUANTIZE_CONFIG, CARD):
            if not os.access(path, os.R_OK):  # now, rather than when all layers are converted
                raise ConvertError(str(path), "cannot be read (Permission denied)", "let it be read, or move it away")
            found.append(relative)
    return tuple(found), tuple(left_out)
