"""The files of an output against the source's: copied tensors, config.json, side files, and files that were added."""

import filecmp
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import CARD, CONFIG, INDEX, Checkpoint
from convert_w4a8.checkpoint.names import linear_modules, natural_key
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import Problem
from convert_w4a8.targets.base import Target
from convert_w4a8.verification.reading import LibraryReader

_CHUNK_BYTES = 8 << 20
_DTYPE_KEYS = ("dtype", "torch_dtype")
_CODE_SUFFIXES = frozenset({
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".keras", ".msgpack"),
    *(".gguf", ".onnx", ".safetensors", ".py", ".pyc", ".so", ".sh"),
})  # fmt: skip
"""Files that run code or hold weights, for one program or another; pickles among them."""


def check_copy(source: TensorInfo, copy: TensorInfo | None, name: str, read: LibraryReader) -> list[Problem]:
    """Compare a tensor that was copied, byte for byte or from FP16 to BF16."""
    if copy is None:
        return [problem(name, "is not in the output")]
    dtype = "BF16" if source.dtype == "F16" else source.dtype
    if (copy.dtype, copy.shape) != (dtype, source.shape):
        return [problem(name, f"is {copy.dtype} {list(copy.shape)}, not {dtype} {list(source.shape)}")]
    ours, theirs = read.flat_bytes(copy), read.flat_bytes(source)
    for start in range(0, source.nbytes, _CHUNK_BYTES):
        part = theirs[start : start + _CHUNK_BYTES]
        if source.dtype == "F16":
            part = part.view(torch.float16).bfloat16().view(torch.uint8)
        if not torch.equal(ours[start : start + _CHUNK_BYTES], part):
            return [problem(name, "differs from the source")]
    return []


def check_config(out: Checkpoint, source: Checkpoint, target: Target, converted: set[str]) -> list[Problem]:
    """Check that config.json is the source's, but for bfloat16 and the block of the format."""
    found = []
    dtypes = {str(out.config[key]) for key in _DTYPE_KEYS if key in out.config}
    if dtypes != {"bfloat16"}:
        found.append(problem(f"{CONFIG}: dtype", f"is {', '.join(sorted(dtypes)) or 'absent'}, not bfloat16"))
    ours, theirs = _settings(out.config), _settings(source.config)
    found += [problem(f"{CONFIG}: {key}", "is not in the output") for key in sorted(theirs.keys() - ours.keys())]
    found += [problem(f"{CONFIG}: {key}", "is not in the source") for key in sorted(ours.keys() - theirs.keys())]
    found += [
        problem(f"{CONFIG}: {key}", "is not what the source has")
        for key in sorted(ours.keys() & theirs.keys())
        if not _same(ours[key], theirs[key])
    ]
    block = out.quantization_config
    ignore = block.get("ignore")
    modules = linear_modules(out.tensors.values()) - converted
    expected = target.quantization_config(
        source.quantization_config, sorted(modules, key=natural_key), target.stored_mode(out), {}
    )
    if not isinstance(ignore, list) or not modules <= set(map(str, ignore)) or converted & set(map(str, ignore)):
        found.append(problem("quantization_config: ignore", "does not list the modules that are not quantized"))
    for key in sorted(expected.keys() | block.keys()):
        if key not in ("ignore", "conversion") and not (
            key in block and key in expected and _same(block[key], expected[key])
        ):
            found.append(problem(f"quantization_config: {key}", f"is {block.get(key)!r}, not {expected.get(key)!r}"))
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's settings without those that a conversion changes: dtypes, and the quantization."""
    return {
        key: _settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (*_DTYPE_KEYS, "quantization_config")
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, 1 and true and 1.0 told apart."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def check_side_files(out: Checkpoint, source: Checkpoint) -> tuple[list[Problem], list[str]]:
    """Compare side files; return problems, and files of the output that the source has not but that do no harm."""
    found = []
    for relative in source.side_files:
        copy = out.root / relative
        if not copy.is_file():
            found.append(problem(str(relative), "is not in the output"))
        elif not filecmp.cmp(copy, source.root / relative, shallow=False):
            found.append(problem(str(relative), "differs from the source"))
    known = {*map(str, source.side_files), CONFIG, CARD, INDEX}
    known |= {str(path.relative_to(out.root)) for path in {info.path for info in out.tensors.values()}}
    added = []
    for path in sorted(out.root.rglob("*")):
        relative = path.relative_to(out.root)
        if str(relative) in known or (path.is_dir() and not path.is_symlink()):
            continue
        if runs_code(relative) or path.is_symlink():
            found.append(problem(str(relative), "is in the output, but not in the source, and may run code"))
        else:
            added.append(str(relative))
    return found, added


def runs_code(relative: PurePath) -> bool:
    """Whether some program runs a file of this name, or reads weights from it."""
    return bool(_CODE_SUFFIXES & {suffix.lower() for suffix in relative.suffixes})


def problem(subject: str, reason: str) -> Problem:
    """Return a problem of an output, which converting again mends."""
    return Problem(subject, reason, "convert the checkpoint again")
