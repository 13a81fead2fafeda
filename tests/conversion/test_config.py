"""What becomes of the dtypes of config.json, in whatever form they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_edits import edit_json, write_case

from convert_w4a8 import convert, verify

DTYPES: tuple[Any, ...] = (
    "float16",
    {"": "float16", "text_config": "float32"},
    {"x" * 70_000: ["x"]},
    ["float16"],
    5,
    None,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: type(dtype).__name__)
def test_any_dtype_becomes_bfloat16(dtype: object, tmp_path: Path) -> None:
    """Of sub-models too, and where an object names one for each of them; what is written verifies."""
    source = write_case("gptq-v1", tmp_path / "in").path
    edit_json(source / "config.json", dtype=dtype, text_config={"torch_dtype": dtype})
    convert(source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["dtype"] == found["text_config"]["torch_dtype"] == "bfloat16"
    assert not verify(tmp_path / "out", source).problems
