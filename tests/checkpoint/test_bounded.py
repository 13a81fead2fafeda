"""Small inputs that would take for ever, or all memory: refused within seconds, in one line."""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.names import natural_key
from convert_w4a8.checkpoint.safetensors_file import read_header
from convert_w4a8.errors import ConvertError

SECONDS = 10
"""As the issue has it; what is refused takes a tenth of one."""
MEBIBYTES = 600


def entry(shape: list[int], size: int) -> str:
    """Return the header entry of a uint8 tensor."""
    return json.dumps({"dtype": "U8", "shape": shape, "data_offsets": [0, size]})


def many_keys_then_the_first_again() -> str:
    """Return a header whose last key is a duplicate: to find which must not take the square of their number."""
    names = [f"t{i}" for i in range(100_000)]
    return "{" + ",".join(f'"{name}":{entry([0], 0)}' for name in [*names, names[-2]]) + "}"


def many_dimensions() -> str:
    """Return a tensor whose size is a number of megabytes."""
    return '{"a":' + entry([2**62] * 200_000, 0) + "}"


def impossible_size() -> str:
    """Return an empty tensor that the safetensors library cannot count, since it multiplies from the left."""
    return '{"a":' + entry([2**40, 2**40, 0], 0) + "}"


def empty_lists() -> str:
    """Return tens of megabytes of lists, each of which takes fifty bytes and more."""
    return '{"__metadata__":{"a":"b"},"x":[' + "[]," * 20_000_000 + "[]]}"


def numbers() -> str:
    """Return tens of megabytes of numbers."""
    return '{"x":[' + "7," * 30_000_000 + "7]}"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (many_keys_then_the_first_again, "duplicate key 't99998'"),
        (many_dimensions, "has 200,000 dimensions"),
        (impossible_size, "has an impossible size"),
        (empty_lists, "header is not that of a safetensors file"),
        (numbers, "header is not that of a safetensors file"),
        (lambda: '{"a":' + "9" * 100_000 + "}", "is not valid JSON"),
        (lambda: '{"a":' + "[" * 100_000 + "}", "is not valid JSON"),
    ],
    ids=["duplicate", "dimensions", "impossible size", "lists", "numbers", "digits", "depth"],
)
def test_headers(make: Callable[[], str], reason: str, tmp_path: Path) -> None:
    """Whatever a header of some megabytes says."""
    header = make().encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    del header
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ConvertError, match=reason):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < MEBIBYTES << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < SECONDS


@pytest.mark.parametrize("text", ['{"a":[' + "[]," * 3_000_000 + "[]]}", '{"a":[' + "1," * 6_000_000 + "1]}"])
def test_configurations(text: str, tmp_path: Path) -> None:
    """What is no checkpoint's JSON file is not parsed."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConvertError, match=r"config\.json: is not a checkpoint's JSON file"):
        open_checkpoint(tmp_path)


def test_text_that_is_none(tmp_path: Path) -> None:
    """JSON may hold half a character; no file can."""
    (tmp_path / "config.json").write_text('{"model_type": "\\ud800"}')
    with pytest.raises(ConvertError, match="lone surrogates"):
        open_checkpoint(tmp_path)


def test_directories_without_end(tmp_path: Path) -> None:
    """Nested deeper than Python's own walk can follow."""
    (tmp_path / "config.json").write_text("{}")
    deep = tmp_path
    for _ in range(40):
        deep /= "d"
    deep.mkdir(parents=True)
    with pytest.raises(ConvertError, match="is nested too deep for a checkpoint"):
        open_checkpoint(tmp_path)


def test_numbers_in_names_may_be_long() -> None:
    """Python refuses to read numbers of more than 4300 digits; the order of names does not need them."""
    long = "9" * 5000
    names = [f"layers.{number}.x" for number in ("0", "2", "10", "007", long, "1" + "0" * 5000)]
    assert sorted(names, key=natural_key) == [f"layers.{number}.x" for number in ("0", "2", "007", "10", long)] + [
        names[-1]
    ]
