"""Safetensors files: whatever the library writes is read, what we write the library reads, the rest is refused."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from convert_w4a8.checkpoint.safetensors_file import (
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    layout_file,
    read_header,
    read_into,
    read_tensor,
    tensor_nbytes,
)
from convert_w4a8.errors import ConvertError

DTYPES = sorted(TORCH_DTYPES)
SHAPES = [(), (0,), (1,), (3,), (0, 5), (2, 0, 3), (3, 5), (1, 1, 1), (2, 3, 4)]


def make_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return a tensor of arbitrary bits (0 and 1 for BOOL)."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == "BOOL" else 256
    nbytes = tensor_nbytes(dtype, shape)
    return (
        torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8).view(TORCH_DTYPES[dtype]).view(shape)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes (NaN equals itself)."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header, as JSON or as raw bytes, and any claim of its length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def write_ours(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file with our layout."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    head, infos = layout_file(
        path, [TensorSpec(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    )
    content = bytearray(head) + bytearray(sum(info.nbytes for info in infos.values()))
    for name, info in infos.items():
        data = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        content[info.start : info.start + info.nbytes] = data
    path.write_bytes(content)


def entry(start: int, end: int, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# Both directions, with the library as the witness.


def test_every_dtype_and_shape_of_the_library_is_read(tmp_path: Path) -> None:
    """What `save_file` wrote comes back bit for bit: all dtypes, empty and zero-dimensional tensors."""
    tensors = {f"{dtype}.{shape}": make_tensor(dtype, shape, i) for i, dtype in enumerate(DTYPES) for shape in SHAPES}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "é"})
    metadata, infos = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt", "note": "é"}
    assert infos.keys() == tensors.keys()
    assert all(same_bits(read_tensor(infos[name]), tensor) for name, tensor in tensors.items())


def test_the_library_reads_every_dtype_and_shape_of_ours(tmp_path: Path) -> None:
    """What `layout_file` lays out is read bit for bit by `safe_open`, and by us."""
    tensors = {f"{dtype}.{shape}": make_tensor(dtype, shape, i) for i, dtype in enumerate(DTYPES) for shape in SHAPES}
    path = tmp_path / "a.safetensors"
    write_ours(path, tensors)
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert set(handle.keys()) == tensors.keys()
        assert all(same_bits(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
    infos = read_header(path)[1]
    assert all(same_bits(read_tensor(infos[name]), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("direction", ["library-to-us", "us-to-library"])
@given(
    contents=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda s: s != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
            st.integers(0, 1000),
        ),
        max_size=6,
    )
)
def test_round_trip(
    direction: str,
    contents: dict[str, tuple[str, tuple[int, ...], int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any names, dtypes and shapes pass between the library and us, both ways."""
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    tensors = {name: make_tensor(*what) for name, what in contents.items()}
    if direction == "library-to-us":
        save_file(tensors, path)
        found = {name: read_tensor(info) for name, info in read_header(path)[1].items()}
    else:
        write_ours(path, tensors)
        with safe_open(path, "pt") as handle:
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_tensors_of_our_files_are_aligned(tmp_path: Path) -> None:
    """Each tensor begins at a multiple of its item size, whatever lies before it."""
    specs = [TensorSpec(f"{dtype}{i}", dtype, (2 * i + 1,)) for i in range(3) for dtype in DTYPES]
    head, infos = layout_file(tmp_path / "a", specs)
    assert len(head) % 8 == 0
    assert all(info.start % TORCH_DTYPES[info.dtype].itemsize == 0 for info in infos.values())


def test_layout_does_not_depend_on_the_order_of_the_specs(tmp_path: Path) -> None:
    """The same tensors give the same bytes, so that two conversions can be compared."""
    specs = [TensorSpec(name, dtype, (3,)) for name in "abc" for dtype in ("F32",)] + [TensorSpec("d", "U8", (1,))]
    assert layout_file(tmp_path, specs)[0] == layout_file(tmp_path, specs[::-1])[0]


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    """An empty file of the library, and its shortest header, hold nothing."""
    save_file({}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")[1] == {}
    assert read_header(raw_file(tmp_path / "b.safetensors", {})) == ({}, {})


def test_part_of_a_tensor_beyond_four_gigabytes_is_read(tmp_path: Path) -> None:
    """Headers are checked without touching the data, and offsets are not 32-bit (a sparse file of 8 GiB)."""
    size = 8 << 30
    path = raw_file(tmp_path / "big.safetensors", {"a": entry(0, size, (size // 2,), "F16")})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
        file.seek(-8, 2)
        file.write(b"the end!")
    info = read_header(path)[1]["a"]
    buffer = torch.empty(8, dtype=torch.uint8)
    read_into(info, buffer, info.nbytes - 8)
    assert buffer.numpy().tobytes() == b"the end!"


# What is refused. The second value says whether the library refuses it too.

GOOD = {"a": entry(0, 4), "b": entry(4, 8)}

REFUSED: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "empty-file": (lambda p: p.write_bytes(b""), True, "0 bytes"),
    "length-cut-short": (lambda p: p.write_bytes(b"\x02\0\0"), True, "header length"),
    "length-without-header": (lambda p: p.write_bytes((2).to_bytes(8, "little")), True, "header length 2"),
    "header-truncated": (lambda p: raw_file(p, GOOD, length=1000), True, "header length 1000"),
    "header-length-huge": (lambda p: raw_file(p, GOOD, bytes(8), length=2**63 + 5), True, "header length"),
    "header-length-0": (lambda p: raw_file(p, GOOD, bytes(8), length=0), True, "header length 0"),
    "header-over-100-MB": (
        lambda p: raw_file(p, b'{"a":' + b" " * 100_000_000 + b"0}"),
        True,
        "header length 100000007",
    ),
    "header-cuts-json": (lambda p: raw_file(p, GOOD, bytes(8), length=40), True, "not valid JSON"),
    "not-json": (lambda p: raw_file(p, b"{hello}"), True, "not valid JSON"),
    "not-an-object": (lambda p: raw_file(p, [1, 2]), True, "not a JSON object"),
    "not-utf-8": (lambda p: raw_file(p, b'{"\xff\xfe": 0}'), True, "not valid JSON"),
    "deep-json": (lambda p: raw_file(p, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), True, "not valid JSON"),
    "integer-of-10000-digits": (lambda p: raw_file(p, b'{"a":' + b"9" * 10_000 + b"}"), True, "not valid JSON"),
    "metadata-of-numbers": (lambda p: raw_file(p, {"__metadata__": {"a": 1}}), True, "__metadata__"),
    "metadata-a-list": (lambda p: raw_file(p, {"__metadata__": ["a"]}), True, "__metadata__"),
    "duplicate-tensor": (
        lambda p: raw_file(p, b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        False,
        "duplicate key 'a'",
    ),
    "duplicate-key-of-an-entry": (
        lambda p: raw_file(p, b'{"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        True,
        "duplicate key 'dtype'",
    ),
    "overlap": (lambda p: raw_file(p, {"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), True, "'b' overlaps"),
    "same-bytes-twice": (lambda p: raw_file(p, {"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), True, "overlaps"),
    "gap": (lambda p: raw_file(p, {"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)), True, "'b' leaves a gap"),
    "gap-at-the-front": (lambda p: raw_file(p, {"a": entry(1, 5)}, bytes(5)), True, "'a' leaves a gap"),
    "truncated-data": (lambda p: raw_file(p, GOOD, bytes(7)), True, "is truncated"),
    "trailing-bytes": (lambda p: raw_file(p, GOOD, bytes(9)), True, "has trailing bytes"),
    "trailing-bytes-without-tensors": (lambda p: raw_file(p, {}, bytes(1)), True, "has trailing bytes"),
    "reversed-offsets": (lambda p: raw_file(p, {"a": entry(4, 0)}, bytes(4)), True, "spans -4 bytes, not 4"),
    "negative-offset": (lambda p: raw_file(p, {"a": entry(-4, 0)}, bytes(4)), True, "'a' is malformed"),
    "size-mismatch": (
        lambda p: raw_file(p, {"a": entry(0, 4, (3,), "F16")}, bytes(4)),
        True,
        "'a' (F16 [3]) spans 4 bytes, not 6",
    ),
    "shape-overflows-64-bit": (
        lambda p: raw_file(p, {"a": entry(0, 4, (2**40, 2**40), "F32")}, bytes(4)),
        True,
        "'a' has an impossible size",
    ),
    "more-dimensions-than-torch-has": (
        lambda p: raw_file(p, {"a": entry(0, 1, (1,) * 65)}, bytes(1)),
        False,
        "'a' has 65 dimensions",
    ),
    "brackets-without-tensors": (
        lambda p: raw_file(p, b'{"a":[' + b"[]," * 1_100_000 + b"[]]}"),
        True,
        "header is not that of a safetensors file (1,100,002 times '[')",
    ),
    "commas-without-tensors": (
        lambda p: raw_file(p, b'{"a":[' + b"0," * 1_100_000 + b"0]}"),
        True,
        "header is not that of a safetensors file (1,100,000 times ',')",
    ),
    "offset-overflows-64-bit": (
        lambda p: raw_file(p, {"a": entry(2**70, 2**70 + 4)}, bytes(4)),
        True,
        "'a' is malformed",
    ),
    "negative-dimension": (lambda p: raw_file(p, {"a": entry(0, 4, (-2, -2))}, bytes(4)), True, "'a' is malformed"),
    "boolean-dimension": (lambda p: raw_file(p, {"a": entry(0, 1, (True,))}, bytes(1)), True, "'a' is malformed"),
    "fractional-dimension": (lambda p: raw_file(p, {"a": entry(0, 4, (4.0,))}, bytes(4)), True, "'a' is malformed"),
    "text-dimension": (lambda p: raw_file(p, {"a": entry(0, 4, "4")}, bytes(4)), True, "'a' is malformed"),
    "three-offsets": (
        lambda p: raw_file(p, {"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)),
        True,
        "'a' is malformed",
    ),
    "no-shape": (lambda p: raw_file(p, {"a": {"dtype": "U8", "data_offsets": [0, 4]}}), True, "'a' is malformed"),
    "entry-null": (lambda p: raw_file(p, {"a": None}), True, "'a' is malformed"),
    "dtype-number": (lambda p: raw_file(p, {"a": entry(0, 4, dtype=8)}, bytes(4)), True, "'a' is malformed"),
    "dtype-unknown": (lambda p: raw_file(p, {"a": entry(0, 4, dtype="INT4")}, bytes(4)), True, "dtype INT4 is unknown"),
    "a-directory": (lambda p: p.mkdir(), True, "cannot be read"),
    "absent": (lambda p: None, True, "cannot be read"),  # noqa: ARG005
}


@pytest.mark.parametrize(("make", "library_refuses", "reason"), REFUSED.values(), ids=REFUSED)
def test_damaged_file_is_refused(
    make: Callable[[Path], object], library_refuses: bool, reason: str, tmp_path: Path
) -> None:
    """A file that the format forbids is one ConvertError that names it and says why; the library agrees."""
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(ConvertError) as caught:
        read_header(path)
    assert caught.value.problem.subject.startswith(str(path))
    assert reason in caught.value.problem.reason
    assert "\n" not in str(caught.value)
    if library_refuses:
        with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt") as handle:
            handle.keys()


ONE_BYTE = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
LAX = {
    "utf-16": ('{"a":'.encode("utf-16-le") + ONE_BYTE.decode().encode("utf-16-le"), b"x"),
    "byte-order-mark": (b'\xef\xbb\xbf{"a":' + ONE_BYTE, b"x"),
    "half-a-surrogate-pair": (b'{"\\ud800":' + ONE_BYTE, b"x"),
    "metadata-false": (b'{"__metadata__":false}', b""),
    "metadata-empty-list": (b'{"__metadata__":[]}', b""),
    "dimension-beyond-64-bit": (b'{"a":{"dtype":"U8","shape":[99999999999999999999,0],"data_offsets":[0,0]}}', b""),
}


@pytest.mark.parametrize(
    ("header", "data"),
    [pytest.param(*file, id=name) for name, file in LAX.items()],
)
def test_what_the_library_refuses_is_refused(header: bytes, data: bytes, tmp_path: Path) -> None:
    """Headers that only Python's JSON reader takes: a file that nothing else loads must not convert."""
    path = raw_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(SafetensorError), safe_open(path, "pt") as handle:
        handle.keys()
    with pytest.raises(ConvertError):
        read_header(path)


def test_as_many_dimensions_as_torch_has_are_read(tmp_path: Path) -> None:
    """64 of them, which the table's file has one too many of."""
    path = raw_file(tmp_path / "a.safetensors", {"a": entry(0, 1, (1,) * 64)}, b"\x07")
    assert read_tensor(read_header(path)[1]["a"]).flatten().tolist() == [7]


def test_the_good_file_of_the_table_is_accepted(tmp_path: Path) -> None:
    """The table's files are refused for what is wrong with them and not for what they share."""
    assert set(read_header(raw_file(tmp_path / "a", GOOD, bytes(8)))[1]) == {"a", "b"}


@given(data=st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A byte changed, inserted or cut anywhere never gives another exception, nor a tensor outside the file."""
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    save_file({"a": make_tensor("F16", (3,)), "b": make_tensor("I32", (2, 2)), "c": make_tensor("U8", ())}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "insert", "cut"])):
            case "change":
                content[position] = data.draw(st.integers(0, 255))
            case "insert":
                content.insert(position, data.draw(st.integers(0, 255)))
            case "cut":
                del content[position : position + data.draw(st.integers(1, 20))]
    path.write_bytes(content)
    try:
        infos = read_header(path)[1]
    except ConvertError:
        return
    for info in infos.values():
        assert 8 <= info.start <= info.start + info.nbytes <= len(content)
        assert read_tensor(info).numel() == math.prod(info.shape)


# Parts of a tensor.

WHOLE = ("F16", (4, 3, 5))


@pytest.fixture
def experts(tmp_path: Path) -> tuple[TensorInfo, torch.Tensor]:
    """Write a file with a tensor between two others; return where it lies, and its values."""
    tensors = {"a": make_tensor("F16", (7,), 1), "experts": make_tensor(*WHOLE), "z": make_tensor("U8", (3,), 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    return read_header(tmp_path / "a.safetensors")[1]["experts"], tensors["experts"]


def test_rows_of_a_tensor_are_read_alone(experts: tuple[TensorInfo, torch.Tensor]) -> None:
    """Every row, every run of rows, and parts of parts are the slices that torch makes of the whole."""
    info, tensor = experts
    for start in range(4):
        row = info.part(start)
        assert (row.name, row.dtype, row.shape, row.whole) == ("experts", "F16", (3, 5), info)
        assert same_bits(read_tensor(row), tensor[start])
        for stop in range(start + 1, 5):
            part = info.part(start, stop)
            assert (part.shape, part.whole) == ((stop - start, 3, 5), info)
            assert part.nbytes == tensor[start:stop].nbytes
            assert same_bits(read_tensor(part), tensor[start:stop])
            assert same_bits(read_tensor(part.part(stop - start - 1)), tensor[stop - 1])
            assert part.part(0).whole == info
        for inner in range(3):
            assert same_bits(read_tensor(row.part(inner)), tensor[start, inner])
    assert sum(info.part(i).nbytes for i in range(4)) == info.nbytes


def test_a_part_is_read_from_an_offset(experts: tuple[TensorInfo, torch.Tensor]) -> None:
    """Offsets count from the beginning of the part."""
    info, tensor = experts
    buffer = torch.empty(6, dtype=torch.uint8)
    read_into(info.part(2), buffer, 10)
    assert torch.equal(buffer, tensor[2].flatten().view(torch.uint8)[10:16])


@pytest.mark.parametrize("rows", [(-1,), (4,), (0, 0), (2, 1), (0, 5), (-1, 2), (4, 5)], ids=str)
def test_rows_that_there_are_not_are_a_bug(rows: tuple[int, ...], experts: tuple[TensorInfo, torch.Tensor]) -> None:
    """A part never reaches into the tensor behind it."""
    with pytest.raises(IndexError, match=r"experts \[4, 3, 5\] has no rows"):
        experts[0].part(*rows)


def test_a_number_has_no_rows(tmp_path: Path) -> None:
    """A tensor without dimensions cannot be cut."""
    with pytest.raises(IndexError, match="has no rows"):
        TensorInfo("scalar", "F32", (), tmp_path, 0).part(0)


# What changes after the header was read.


def test_a_file_that_shrank_is_noticed(tmp_path: Path) -> None:
    """A tensor that ends beyond the end of the file is an error, not garbage."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(100)}, path)
    info = read_header(path)[1]["a"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(ConvertError, match="ends inside tensor 'a'"):
        read_tensor(info)


def test_a_file_that_vanished_is_noticed(tmp_path: Path) -> None:
    """A shard that was removed after its header was read gives one line that names file and tensor."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(4)}, path)
    info = read_header(path)[1]["a"]
    path.unlink()
    with pytest.raises(ConvertError, match=r"a\.safetensors: tensor 'a': cannot be read"):
        read_tensor(info)


def test_reading_goes_on_after_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system that returns seven bytes at a time still gives the whole tensor."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    tensor = torch.arange(50)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    assert torch.equal(read_tensor(read_header(tmp_path / "a.safetensors")[1]["a"]), tensor)
