"""Every file of a source, in its directory and the output's: copied, converted, written anew, or left out.

What may be left out, and why, is decided here from the directories alone. The converter's own list is not asked.
"""

import filecmp
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import LeftOut
from convert_w4a8.errors import Problem
from convert_w4a8.verification.files import problem

_INDEX = "model.safetensors.index.json"
_WRITTEN_ANEW = ("config.json", "README.md")
_STALE = (
    *("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json"),
    "*.index.json",
)
"""Files beside config.json of which the output has its own or none: how weights are quantized, and where they lie."""
_MISTRAL = ("consolidated*.safetensors", "consolidated*.index.json")
"""Where such a file is, at any depth, vLLM loads no other weights."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".nemo")
_OTHER_PROGRAMS = (
    *(".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".keras", ".msgpack", ".tflite", ".mlmodel"),
    *(".engine", ".trt", ".ot", ".pte", ".llamafile"),
)
_OTHER_FORMS = {"original", "metal", "onnx", "openvino", "gguf", "mlx", "coreml", "tensorrt", "trt"}
_TOOLS_OWN = {".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store"}
_INT4 = (".qweight", ".weight_packed")
_CODE_SUFFIXES = frozenset({
    *(*_PICKLES, ".npy", ".npz", ".h5", ".keras", ".msgpack", ".gguf", ".onnx"),
    *(".safetensors", ".py", ".pyc", ".so", ".sh"),
})  # fmt: skip
"""Files that run code or hold weights, for one program or another; pickles among them."""


@dataclass(frozen=True)
class Accounts:
    """What became of the files of a source, and what the output has besides.

    left_out: files of the source that are not in the output, and the reason, which is a good one.
    added: files of the output that the source has not, and that do no harm.
    copied_weights: safetensors files that are copied as they are.
    """

    problems: tuple[Problem, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    added: tuple[str, ...] = ()
    copied_weights: tuple[str, ...] = ()


def account(out: Checkpoint, source: Checkpoint) -> Accounts:
    """Account for every file of a source and of an output."""
    weights = {info.path.relative_to(source.root) for info in source.tensors.values()}
    known = {path.relative_to(out.root) for path in {info.path for info in out.tensors.values()}}
    known |= {*map(Path, _WRITTEN_ANEW), Path(_INDEX)}
    problems: list[Problem] = []
    left_out: list[LeftOut] = []
    copied: list[str] = []
    reasons = _Reasons(source, weights)
    for relative in _files(source.root):
        if relative in weights or str(relative) in _WRITTEN_ANEW or _is_stale(relative):
            continue
        copy = out.root / relative
        if relative in known or not copy.is_file() or copy.is_symlink() or _must_be_absent(relative):
            reason = reasons.why(relative)
            if reason is None:
                problems.append(problem(str(relative), "is not in the output, and nothing says why"))
            elif reason:
                left_out.append(LeftOut(str(relative), reason))
            continue
        known.add(relative)
        if relative.name.endswith(".safetensors"):
            copied.append(str(relative))
        if not filecmp.cmp(copy, source.root / relative, shallow=False):
            problems.append(problem(str(relative), "differs from the source"))
    added = []
    for relative in _files(out.root):
        if _is_stale(relative) and relative != Path(_INDEX):
            problems.append(problem(str(relative), "describes other weights than the output's"))
        elif relative not in known:
            if runs_code(relative) or (out.root / relative).is_symlink():
                where = "and is never copied" if (source.root / relative).exists() else "but not in the source"
                problems.append(problem(str(relative), f"is in the output, {where}, and may run code"))
            else:
                added.append(str(relative))
    problems.extend(_unlisted(out))
    return Accounts(tuple(problems), tuple(left_out), tuple(added), tuple(copied))


def runs_code(relative: PurePath) -> bool:
    """Whether some program runs a file of this name, or reads weights from it."""
    return bool(_CODE_SUFFIXES & {suffix.lower() for suffix in relative.suffixes})


def _files(root: Path) -> Iterator[Path]:
    """Yield every file and every link below a directory, relative to it, in order, without following links."""
    found = []
    for directory, folders, files in os.walk(root):
        links = [name for name in folders if Path(directory, name).is_symlink()]
        found += [Path(directory, name).relative_to(root) for name in (*files, *links)]
    return iter(sorted(found))


def _is_stale(relative: Path) -> bool:
    return relative.parent == Path() and any(fnmatchcase(relative.name, pattern) for pattern in _STALE)


def _must_be_absent(relative: Path) -> bool:
    """Whether a file is in no right output: a pickle, or what vLLM would load instead of the output's weights."""
    return relative.name.endswith(_PICKLES) or any(fnmatchcase(relative.name, pattern) for pattern in _MISTRAL)


def _unlisted(out: Checkpoint) -> Iterator[Problem]:
    """Yield what vLLM would load as weights although it is none: without an index, every safetensors file."""
    if (out.root / _INDEX).is_file():
        return
    weights = {info.path.name for info in out.tensors.values()}
    files = {path.name for path in out.root.glob("*.safetensors")}
    if files - weights or len(weights) > 1:
        yield problem(_INDEX, f"is absent, and vLLM would load all of {', '.join(sorted(files | weights)[:4])}")


class _Reasons:
    """Why files of a source may be left out."""

    def __init__(self, source: Checkpoint, weights: set[Path]) -> None:
        self._source = source
        self._weights = weights

    def why(self, relative: Path) -> str | None:
        """Return why a file need not be in the output; None where it has to be, "" where it is of no interest."""
        path = self._source.root / relative
        if path.is_symlink() and not path.exists():
            return "a link to nothing"
        if path.is_symlink() and path.is_dir():
            return "a link to a directory"
        if not path.is_file():
            return "no file"
        hidden = next((part for part in relative.parts if part.startswith(".")), None)
        if hidden is not None:
            return "" if hidden in _TOOLS_OWN else "hidden"
        if any(fnmatchcase(relative.name, pattern) for pattern in _MISTRAL) or (
            str(relative) == "params.json" and any(self._source.root.glob("consolidated*.safetensors"))
        ):
            return "Mistral's own form of the model"
        if relative.name.endswith(_PICKLES):
            return "may be a pickle, which can run code"
        if relative.name.endswith(_OTHER_PROGRAMS):
            return "weights in another format"
        if relative.name.endswith(".index.json"):
            return "an index of what is left out" if self._without_weights(relative.parent) else None
        return self._why_not_weights(relative) if relative.name.endswith(".safetensors") else None

    def _without_weights(self, folder: Path) -> bool:
        """Whether no safetensors file of a folder belongs into the output."""
        files = [path.relative_to(self._source.root) for path in (self._source.root / folder).glob("*.safetensors")]
        return all(self.why(file) is not None for file in files)

    def _why_not_weights(self, relative: Path) -> str | None:
        """Return why a safetensors file that is no part of the weights need not be in the output."""
        if not _OTHER_FORMS.isdisjoint(relative.parts[:-1]):
            return "the weights in another form"
        names = self._names(relative)
        if names is None:
            return "cannot be read by the safetensors library"
        if relative.name.startswith("adapter_model"):
            return None
        at_the_top = relative.parent == Path()
        if at_the_top and 2 * sum(name.rpartition(".")[0] in self._modules for name in names) > len(names):
            return "the weights in another form"
        if not at_the_top and self._plain and self._plain <= self._names_in(relative.parent):
            return "the weights in another form"
        is_int4 = any(name.endswith(_INT4) for name in names)
        if not at_the_top:
            return "INT4 weights without settings" if is_int4 and not self._is_described(relative.parent) else None
        if is_int4:
            return "INT4 weights that the index does not list"
        is_ours = any(fnmatchcase(relative.name, name) for name in ("model.safetensors", "model-*-of-*.safetensors"))
        return "weights that the index does not list" if is_ours else None

    @cached_property
    def _modules(self) -> set[str]:
        return {name.rpartition(".")[0] for name in self._source.tensors}

    @cached_property
    def _plain(self) -> set[str]:
        return {name for name in self._source.tensors if name.endswith((".weight", ".bias"))}

    def _names_in(self, folder: Path) -> set[str]:
        paths = (self._source.root / folder).glob("*.safetensors")
        return set().union(*(self._names(path.relative_to(self._source.root)) or set() for path in paths))

    def _names(self, relative: Path) -> set[str] | None:
        """Return the names of the tensors in a file; None where it is no safetensors file."""
        try:
            with safe_open(self._source.root / relative, framework="pt") as file:
                return set(file.keys())
        except (SafetensorError, OSError, ValueError, TypeError):  # also for names that are not UTF-8
            return None

    def _is_described(self, folder: Path) -> bool:
        """Whether a folder has settings of a quantization of its own."""
        try:
            if any((self._source.root / folder / name).is_file() for name in _STALE[:-1]):
                return True
            config = json.loads((self._source.root / folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return "quantization_config" in json.dumps(config)
