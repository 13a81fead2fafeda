"""Which safetensors files are a checkpoint's weights: those of its index, or, without one, what vLLM would load."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from convert_w4a8.checkpoint.files import (
    INDEX,
    OTHER_FORMATS,
    PICKLES,
    SAFETENSORS,
    SINGLE_FILE,
    is_adapter,
    is_consolidated,
    is_index,
    is_shard,
    is_variant,
)
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.checkpoint.places import check_link, check_weights, homes_of
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_header
from convert_w4a8.errors import ConvertError
from convert_w4a8.text import shortened

_LISTED = 4


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint, from headers alone.

    files: relative to the checkpoint. index: the name of their index, if they have one.
    named: those of the files that keep their names in an output, since code may read them by name. Without an index
        vLLM loads every safetensors file beside config.json, and so model.safetensors may have others beside it.
    """

    tensors: Mapping[str, TensorInfo]
    files: frozenset[Path]
    index: str | None = None
    named: frozenset[str] = frozenset()


def read_weights(root: Path) -> Weights:
    """Read the headers of a checkpoint's weights.

    Raises:
        ConvertError: there are none, it is not clear which, or files are damaged or inconsistent with each other.

    """
    index = _find_index(root)
    return _read_without_index(root) if index is None else _read_indexed(root, index)


def files_in_index(root: Path) -> set[str]:
    """Return the names of safetensors files that a checkpoint's index lists, whether they are there or not."""
    index = _find_index(root)
    weight_map = None if index is None else read_json(root / index).get("weight_map")
    return (
        {str(file) for file in weight_map.values() if _is_inside(str(file))} if isinstance(weight_map, dict) else set()
    )


def _find_index(root: Path) -> str | None:
    """Return the name of the index: transformers' own, or the only other (AutoGPTQ names it after its files).

    Raises:
        ConvertError: there are several others, or a link leads out of the checkpoint.

    """
    check_link(root / INDEX, homes_of(root))
    if (root / INDEX).is_file():
        return INDEX
    found = sorted(path.name for path in root.iterdir() if is_index(path.name) and not is_consolidated(path.name))
    if not found or ((root / SINGLE_FILE).is_file() and all(name.startswith(f"{SINGLE_FILE}.") for name in found)):
        return None  # an index of a variant of the weights, such as model.safetensors.index.fp16.json
    if len(found) > 1:
        raise ConvertError(
            str(root),
            f"has {len(found)} indexes ({shortened(found, listed=_LISTED)}), and none is {INDEX}",
            f"rename the one of the weights to {INDEX}, or remove the others",
        )
    check_link(root / found[0], homes_of(root))
    return found[0]


def _read_without_index(root: Path) -> Weights:
    homes = homes_of(root)
    files, used = _files_without_index(root), []
    found: dict[str, TensorInfo] = {}
    for name in files:
        tensors = read_header(check_weights(root / name, homes))[1]
        if len(files) > 1 and tensors and all(".lora_" in tensor for tensor in tensors):
            continue  # an adapter by another name
        used.append(name)
        for tensor, info in tensors.items():
            if tensor in found:
                raise ConvertError(
                    str(root),
                    f"{found[tensor].path.name} and {name} both hold {tensor!r}, and there is no {INDEX}",
                    "keep the one that is meant, or restore the index",
                )
            found[tensor] = info
    if not used:
        raise _without_weights(root, files, "adapters without their model")
    main = SINGLE_FILE if SINGLE_FILE in used else max(used, key=lambda name: (root / name).stat().st_size)
    return Weights(found, frozenset(map(Path, used)), None, frozenset(used) - {main})


def _files_without_index(root: Path) -> list[str]:
    """Return the names of the weights, without other forms of them and without adapters.

    Raises:
        ConvertError: there are none, or they are shards, whose index is missing.

    """
    names = sorted(path.name for path in root.glob(f"*{SAFETENSORS}") if path.is_file())
    seen = [name for name in names if not name.startswith(".")] or names
    files = [name for name in seen if not (is_consolidated(name) or is_adapter(name) or is_variant(name, seen))]
    if not files:
        if names:
            what = "Mistral's own form of a model" if is_consolidated(seen[0]) else "adapters without their model"
            raise _without_weights(root, seen, what)
        others = sorted(path.name for path in root.iterdir() if path.name.endswith((*PICKLES, *OTHER_FORMATS)))
        reason = f"no safetensors file, only {others[0]} (a pickle can run code)" if others else "no safetensors file"
        raise ConvertError(str(root), reason, "save the model with safe_serialization=True first")
    if len(files) > 1 and any(map(is_shard, files)):
        raise ConvertError(
            str(root),
            f"{len(files)} safetensors files but no {INDEX} ({shortened(files, listed=_LISTED)})",
            "restore the index or keep a single file",
        )
    return files


def _without_weights(root: Path, names: Sequence[str], what: str) -> ConvertError:
    reason = f"has no weights but {shortened(names, listed=_LISTED)}, {what}"
    return ConvertError(str(root), reason, f"give a checkpoint with {SINGLE_FILE} or {INDEX}")


def _read_indexed(root: Path, index: str) -> Weights:
    index_path = root / index
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index_path}: weight_map", "is missing or not an object", "restore the index")
    tensors: dict[str, TensorInfo] = {}
    homes = homes_of(root)
    shards = sorted({str(file) for file in weight_map.values()})
    for shard in shards:
        if not _is_inside(shard):
            raise ConvertError(
                f"{index_path}: {shard!r}",
                "is not the name of a safetensors file beside it or in a directory of it",
                "restore the index",
            )
        if not os.path.isfile(root / shard):  # noqa: PTH113  (which takes names that cannot be, too)
            raise _absent(root, index, shards, shard)
        for name, info in read_header(check_weights(root / shard, homes))[1].items():
            if weight_map.get(name) != shard:
                where = f"puts it into {weight_map[name]}" if name in weight_map else "does not list it"
                raise ConvertError(f"{root / shard}: tensor {name!r}", f"{index} {where}", "restore the index")
            tensors[name] = info
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ConvertError(
            f"{root / weight_map[missing[0]]}: tensor {missing[0]!r}",
            f"is listed in {index} but not in the shard ({len(missing)} such)",
            "download the shard and the index again",
        )
    return Weights(tensors, frozenset(map(Path, shards)), index)


def _absent(root: Path, index: str, shards: Sequence[str], shard: str) -> ConvertError:
    """Return the error for a file that an index names and that is not there; the index may be that of other weights."""
    others = sorted(
        path.name
        for path in root.glob(f"*{SAFETENSORS}")
        if path.is_file() and path.name not in shards and not (is_consolidated(path.name) or is_adapter(path.name))
    )
    if others and not any((root / name).is_file() for name in shards if _is_inside(name)):
        named, there = shortened(shards, listed=_LISTED), shortened(others, listed=_LISTED)
        return ConvertError(
            str(root / index),
            f"names no file that is there ({named}), but there is {there}",
            "remove it if these are the weights, or download the files that it names",
        )
    return ConvertError(str(root / shard), f"is named by {index} but is absent", "download the shard")


def _is_inside(name: str) -> bool:
    """Whether a name in an index is that of a safetensors file beside it, or below that, and written plainly."""
    path = PurePosixPath(name)
    return name.endswith(SAFETENSORS) and not path.is_absolute() and ".." not in path.parts and str(path) == name
