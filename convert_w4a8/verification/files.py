"""Copied tensors and config.json of an output against the source's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CONFIG
from convert_w4a8.checkpoint.mixture import ConfigGroup, Mixture
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import Problem
from convert_w4a8.targets.base import Target, make_block
from convert_w4a8.verification.ignored import find_contradictions
from convert_w4a8.verification.reading import LibraryReader

_CHUNK_BYTES = 8 << 20
_DTYPE_KEYS = ("dtype", "torch_dtype")
_SETTINGS_KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""What is called so in config.json, in any part of it, says how weights are quantized."""


def check_copy(
    source: TensorInfo, copy: TensorInfo | None, name: str, read: LibraryReader, *, carried: bool = False
) -> list[Problem]:
    """Compare a tensor that was copied, byte for byte, or from FP16 to BF16 where it is of no carried layer."""
    if copy is None:
        return [problem(name, "is not in the output")]
    rounds = source.dtype == "F16" and not carried
    dtype = "BF16" if rounds else source.dtype
    if (copy.dtype, copy.shape) != (dtype, source.shape):
        return [problem(name, f"is {copy.dtype} {list(copy.shape)}, not {dtype} {list(source.shape)}")]
    ours, theirs = read.flat_bytes(copy), read.flat_bytes(source)
    for start in range(0, source.nbytes, _CHUNK_BYTES):
        part = theirs[start : start + _CHUNK_BYTES]
        if rounds:
            part = part.view(torch.float16).bfloat16().view(torch.uint8)
        if not torch.equal(ours[start : start + _CHUNK_BYTES], part):
            return [problem(name, "differs from the source")]
    return []


def check_config(
    out: Checkpoint,
    source: Checkpoint,
    target: Target,
    converted: set[str],
    carried: Sequence[ConfigGroup],
    *,
    whole: bool = True,
) -> list[Problem]:
    """Check that config.json is the source's, but for bfloat16 and the block of the format.

    whole: whether the output has all layers of the source, and not a sample.
    """
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
        if not same(ours[key], theirs[key])
    ]
    places = [place for place in _places(out.config) if place != "quantization_config"]
    found += [problem(f"{CONFIG}: {place}", "is another quantization_config, which vLLM may read") for place in places]
    if "quantization_config" not in out.config:
        found.append(problem(f"{CONFIG}: quantization_config", "is absent, and vLLM reads no other"))
    block = out.quantization_config
    expected = make_block(
        target,
        source.quantization_config,
        _strings(block.get("ignore")),
        target.stored_mode(out),
        {},
        Mixture(tuple(converted), tuple(carried)),
    )
    quantized = converted | {name for group in carried for name in group.modules}
    found += [
        problem("quantization_config: ignore", reason) for reason in find_contradictions(out, quantized, whole=whole)
    ]
    for key in sorted(expected.keys() | block.keys()):
        if key not in ("ignore", "conversion") and not (
            key in block and key in expected and same(block[key], expected[key])
        ):
            found.append(problem(f"quantization_config: {key}", f"is {block.get(key)!r}, not {expected.get(key)!r}"))
    return found


def _settings(value: Any, keys: tuple[str, ...] = (*_DTYPE_KEYS, *_SETTINGS_KEYS)) -> Any:
    """Return a model's settings without those that a conversion changes: dtypes, but in lists, and the quantization."""
    if isinstance(value, Mapping):
        return {key: _settings(item, keys) for key, item in value.items() if key not in keys}
    return [_settings(item, _SETTINGS_KEYS) for item in value] if isinstance(value, list) else value


def _places(value: Any, place: str = "") -> Iterator[str]:
    """Yield where a configuration says how weights are quantized."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in parts:
        name = f"{place}.{key}" if place else str(key)
        if key in _SETTINGS_KEYS and item is not None:
            yield name
        else:
            yield from _places(item, name)


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, 1 and true and 1.0 told apart."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def problem(subject: str, reason: str) -> Problem:
    """Return a problem of an output, which converting again mends."""
    return Problem(subject, reason, "convert the checkpoint again")
