"""One safetensors file: its header checked in full, its tensors read one by one, a new one written in place.

The safetensors library reads and writes whole files; a converter that must not hold a shard in memory needs the
header alone, single tensors without a memory map (mapped pages count as resident), and a file whose tensors may be
written in any order. Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON
header, then the tensors without gaps).
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.arena import Arena
from convert_w4a8.errors import ConvertError, DiskError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# The safetensors library refuses longer headers, so a file that has one was not written by it.
_MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 64
"""Dimensions of a tensor, as torch has them."""
_MAX_EMPTY = 10_000
"""Tensors without a byte: a model has few, and a small file could have millions."""
_SPARE = 1_000_000
"""Marks of a header that belong to no tensor: those in names and metadata. Parsing takes some 100 bytes for each."""
_DOWNLOAD_AGAIN = "download or write the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `start` (from the beginning of the file at `path`).

    whole: the tensor of which this one is a part, if it is not all of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    whole: "TensorInfo | None" = None

    def part(self, start: int, stop: int | None = None) -> "TensorInfo":
        """Return the tensor's rows start … stop along its first dimension, or without `stop` row `start` alone.

        Raises IndexError where there are no such rows.
        """
        end = start + 1 if stop is None else stop
        if not (self.shape and 0 <= start < end <= self.shape[0]):
            raise IndexError(f"{self.name} {list(self.shape)} has no rows {start} … {end}")
        shape = self.shape[1:] if stop is None else (end - start, *self.shape[1:])
        offset = start * tensor_nbytes(self.dtype, self.shape[1:])
        return replace(self, shape=shape, start=self.start + offset, whole=self.whole or self)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_nbytes(self.dtype, self.shape)


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size in bytes of a tensor with this safetensors dtype name and shape."""
    return TORCH_DTYPES[dtype].itemsize * prod(shape)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata and the tensors of a safetensors file, every offset checked against the file's size.

    Raises:
        ConvertError: the file is not a well-formed safetensors file.

    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"header length {length} does not fit a file of {size} bytes")
            raw = file.read(length)
    except OSError as error:
        raise ConvertError(str(path), f"cannot be read ({error.strerror})", "check the file") from error
    tensors_at_most = raw.count(b'"dtype"')
    for mark, usual in ((b"[", 2), (b"{", 1), (b",", 4 + _MAX_RANK)):
        if raw.count(mark) > usual * tensors_at_most + _SPARE:
            raise _damaged(
                path, f"header is not that of a safetensors file ({raw.count(mark):,} times {mark.decode()!r})"
            )
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        if b"\\u" in raw:  # escaped, lone surrogates are legal JSON, but no text
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ is not an object of strings")
    empty = sum(isinstance(entry, dict) and _is_empty(entry.get("data_offsets")) for entry in header.values())
    if empty > _MAX_EMPTY:
        raise _damaged(path, f"holds {empty:,} tensors without a byte")
    data_start = 8 + length
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors = {name: _parse_entry(path, name, entry, data_start, shapes) for name, entry in header.items()}
    _check_layout(path, tensors.values(), data_start, size)
    return metadata, tensors


def _damaged(path: Path, reason: str) -> ConvertError:
    return ConvertError(str(path), reason, _DOWNLOAD_AGAIN)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {next(name for name, count in counts.items() if count > 1)!r}")
    return result


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # not a bool


def _is_empty(offsets: object) -> bool:
    return isinstance(offsets, list) and len(offsets) == 2 and offsets[0] == offsets[1]


def _parse_entry(
    path: Path, name: str, entry: object, data_start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorInfo:
    """Read one entry of a header. shapes: those found before, which are the same object for a million experts."""
    match entry:
        case {"dtype": str(dtype), "shape": list(sizes), "data_offsets": [start, end]} if (
            _is_size(start) and _is_size(end) and all(map(_is_size, sizes))
        ):
            shape = tuple(sizes)
            shape = shapes.setdefault(shape, shape)
        case _:
            raise _damaged(path, f"header entry of tensor {name!r} is malformed")
    if len(shape) > _MAX_RANK:
        raise _damaged(path, f"tensor {name!r} has {len(shape):,} dimensions")
    if prod(size for size in shape if size) >= 2**59:  # of 16 bytes: more than the library can count
        raise _damaged(path, f"tensor {name!r} has an impossible size")
    if dtype not in TORCH_DTYPES:
        raise ConvertError(
            f"{path}: tensor {name!r}",
            f"dtype {dtype} is unknown",
            "only dtypes that torch has are supported",
        )
    expected = tensor_nbytes(dtype, shape)
    if end - start != expected:
        raise _damaged(path, f"tensor {name!r} ({dtype} {list(shape)}) spans {end - start} bytes, not {expected}")
    return TensorInfo(name, sys.intern(dtype), shape, path, data_start + start)


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Check that the tensors fill the file from the header to its end, without gap or overlap."""
    position = data_start
    for start, nbytes, name in sorted((info.start, info.nbytes, info.name) for info in tensors):
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise _damaged(path, f"tensor {name!r} {what}")
        position += nbytes
    if position != size:
        what = "is truncated" if size < position else "has trailing bytes"
        raise _damaged(path, f"{what}: its header asks for {position} bytes, the file has {size}")


Reader = Callable[[TensorInfo], torch.Tensor]
"""Reads a tensor, or a part of one."""


def read_tensor(info: TensorInfo, arena: Arena | None = None) -> torch.Tensor:
    """Read one tensor, into fresh memory or an arena's.

    Raises:
        ConvertError: the file ends early or cannot be read.

    """
    buffer = torch.empty(info.nbytes, dtype=torch.uint8) if arena is None else arena.take(info.nbytes)
    read_into(info, buffer, 0)
    return buffer.view(TORCH_DTYPES[info.dtype]).view(info.shape)


def read_into(info: TensorInfo, buffer: torch.Tensor, offset: int) -> None:
    """Fill a one-dimensional uint8 buffer with the tensor's bytes from `offset` (bytes) on."""
    view = buffer.numpy().data
    done = 0
    try:
        descriptor = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], info.start + offset + done)
                if count == 0:
                    raise _damaged(info.path, f"ends inside tensor {info.name!r}")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DiskError(
            f"{info.path}: tensor {info.name!r}",
            f"cannot be read ({error.strerror})",
            "check the disk and the file",
        ) from error


def layout_file(path: Path, specs: Iterable[TensorSpec]) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a new file: return its leading bytes (length and header) and where each tensor goes.

    Wider dtypes come first, then names in order, as the safetensors library does: every tensor is aligned.
    """
    ordered = sorted(specs, key=lambda spec: (-TORCH_DTYPES[spec.dtype].itemsize, spec.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in ordered:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    data_start = 8 + len(raw)
    infos = {}
    for spec in ordered:
        start = data_start + header[spec.name]["data_offsets"][0]
        infos[spec.name] = TensorInfo(spec.name, spec.dtype, spec.shape, path, start)
    return len(raw).to_bytes(8, "little") + raw, infos
