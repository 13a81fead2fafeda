"""What else lies in a checkpoint: the files that are copied as they are, and those that are left out, with the reason.

Safetensors files that are no part of the weights are copied where they belong to the model: adapters, modules of
sentence-transformers, layers for multi-token prediction. Copies of the weights in another form are left out, and so is
what would be read by the settings of the source's quantization, which an output has no more.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from convert_w4a8.checkpoint.files import (
    CARD,
    CONFIG,
    INDEX,
    MISTRAL_CONFIG,
    OTHER_FORMATS,
    OTHER_FORMS,
    PICKLES,
    SAFETENSORS,
    SETTINGS_FILES,
    LeftOut,
    is_adapter,
    is_consolidated,
    is_index,
    is_ours,
)
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.checkpoint.places import check_weights, homes_of
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_header
from convert_w4a8.checkpoint.settings import find_settings
from convert_w4a8.checkpoint.weights import Weights
from convert_w4a8.errors import ConvertError

PICKLE = "may be a pickle, which can run code"
OTHER_FORMAT = "weights in another format"
OTHER_FORM = "the weights in another form"
_TOOLS_OWN = frozenset({".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"})
"""Hidden files that are the tools' own, and no part of a checkpoint."""
_INT4_ROLES = ("qweight", "weight_packed")


def find_side_files(
    root: Path, paths: Iterable[Path], weights: Weights
) -> tuple[tuple[Path, ...], tuple[LeftOut, ...]]:
    """Return every file that is copied as it is, and what is left out; of neither kind is what is written anew.

    That is config.json, the model card, the index, and settings of the quantization in files of their own.
    paths: all that lies in the checkpoint (`places.list_paths`).

    Raises:
        ConvertError: a file that is to be copied cannot be read.

    """
    found: list[Path] = []
    left_out: list[LeftOut] = []
    more: dict[Path, list[Path]] = {}
    indexes = []
    for path in paths:
        relative = path.relative_to(root)
        reason = None
        if path.is_symlink():
            reason = "a link to nothing" if not path.exists() else "a link to a directory" if path.is_dir() else None
        elif not path.is_file():
            continue
        hidden = next((part for part in relative.parts if part.startswith(".")), None)
        if relative in weights.files:
            continue
        if reason is None and hidden is not None:
            if hidden in _TOOLS_OWN:
                continue
            reason = "hidden"
        if reason is None:
            reason = _why_left_out(relative, root)
        if reason is not None:
            left_out.append(LeftOut(str(relative), reason))
        elif path.name.endswith(SAFETENSORS):
            more.setdefault(relative.parent, []).append(relative)
        elif path.name.endswith(".index.json"):
            indexes.append(relative)
        elif str(relative) not in (CONFIG, CARD, *SETTINGS_FILES):
            found.append(relative)
    for directory, files in more.items():
        kept = [file for file in files if is_adapter(file.name)]
        kept += _judge(root, directory, [file for file in files if file not in kept], weights, left_out)
        found += kept
        found += [index for index in indexes if kept and index.parent == directory != Path() and is_index(index.name)]
    for relative in found:
        if not os.access(root / relative, os.R_OK):  # now, rather than when all layers are converted
            name = str(root / relative)
            raise ConvertError(name, "cannot be read (Permission denied)", "let it be read, or move it away")
    return tuple(sorted(found)), tuple(sorted(left_out, key=lambda item: item.path))


def _why_left_out(relative: Path, root: Path) -> str | None:
    """Return why a file is left out whatever it holds."""
    name = relative.name
    if is_consolidated(name) or (str(relative) == MISTRAL_CONFIG and any(root.glob(f"consolidated*{SAFETENSORS}"))):
        return "Mistral's own form of the model"
    if name.endswith(PICKLES):
        return PICKLE
    if name.endswith(OTHER_FORMATS):
        return OTHER_FORMAT
    if name.endswith(SAFETENSORS) and not OTHER_FORMS.isdisjoint(relative.parts[:-1]):
        return OTHER_FORM
    return None


def _judge(root: Path, directory: Path, files: Iterable[Path], weights: Weights, left_out: list[LeftOut]) -> list[Path]:
    """Return which safetensors files of a directory, no part of the weights, are copied; say why the others are not."""
    headers: dict[Path, Mapping[str, TensorInfo]] = {}
    for file in files:
        try:
            headers[file] = read_header(check_weights(root / file, homes_of(root)))[1]
        except ConvertError as error:
            left_out.append(LeftOut(str(file), error.problem.reason))
    at_the_top, index = directory == Path(), weights.index or INDEX
    names = {name for tensors in headers.values() for name in tensors}
    described = not at_the_top and _has_settings(root, directory)
    modules = {_module(name) for name in weights.tensors}
    is_copy = not at_the_top and _is_copy(names, weights.tensors)
    kept = []
    for file, tensors in headers.items():
        reason = None
        if is_copy or (at_the_top and 2 * sum(map(modules.__contains__, map(_module, tensors))) > len(tensors)):
            reason = OTHER_FORM
        elif not described and any(name.rpartition(".")[2] in _INT4_ROLES for name in tensors):
            where = f"that {index} does not list: list them there to have them converted"
            reason = f"INT4 weights {where if at_the_top else 'without settings'}"
        elif at_the_top and is_ours(file.name):
            reason = f"weights that {index} does not list"
        if reason is None:
            kept.append(file)
        else:
            left_out.append(LeftOut(str(file), reason))
    return kept


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_copy(names: set[str], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a directory has all of the weights that is not quantized, such as norms and embeddings."""
    plain = {name for name in tensors if name.rpartition(".")[2] in ("weight", "bias")}
    return bool(plain) and plain <= names


def _has_settings(root: Path, directory: Path) -> bool:
    """Whether a directory of a checkpoint says itself how its weights are quantized."""
    try:
        config = read_json(root / directory / CONFIG) if (root / directory / CONFIG).is_file() else {}
        return bool(find_settings(root / directory, config).block)
    except ConvertError:
        return False
