"""A checkpoint directory as it lies on disk: configuration, tensor headers, side files. Nothing is loaded here."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.files import CARD, CONFIG, SETTINGS_FILES, LeftOut
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.checkpoint.places import check_link, homes_of, list_paths
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.checkpoint.settings import find_settings
from convert_w4a8.checkpoint.side_files import find_side_files
from convert_w4a8.checkpoint.weights import read_weights
from convert_w4a8.errors import ConvertError


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the parsed config.json, every tensor's header entry, and the files beside them.

    quantization_config: the settings of its quantization, wherever they are; empty where it has none.
    """

    root: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    """Relative to `root`: what is copied as it is (tokenizer, templates, custom code, adapters, …)."""
    left_out: tuple[LeftOut, ...] = ()
    """What is neither read nor copied, with the reason."""
    settings_place: str = ""
    """Where `quantization_config` was found, in words."""
    index: str | None = None
    """The name of the index of its weights."""
    named_files: frozenset[str] = frozenset()
    """Files of the weights that keep their names in an output (`weights.Weights.named`)."""

    def modules_with(self, role: str) -> list[str]:
        """Return the modules that have a tensor called `module.role`, sorted."""
        suffix = "." + role
        return sorted(name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix))

    def number(self, key: str) -> int | None:
        """Return a number above 0 of the language model's configuration, as `hidden_size`; None where it has none."""
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

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
    homes = homes_of(root)
    for name in (CONFIG, *SETTINGS_FILES, CARD):
        check_link(root / name, homes)
    config = read_json(root / CONFIG)
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConvertError(str(root / CONFIG), "holds lone surrogates, which are no text", "repair the file") from error
    settings = find_settings(root, config)
    paths = list_paths(root)
    weights = read_weights(root)
    side_files, left_out = find_side_files(root, paths, weights)
    return Checkpoint(
        root=root,
        config=config,
        quantization_config=settings.block,
        tensors=weights.tensors,
        side_files=side_files,
        left_out=left_out,
        settings_place=settings.place,
        index=weights.index,
        named_files=weights.named,
    )
