"""Every place where vLLM's model code handles a checkpoint's tensors was read: what a new version adds fails here.

tests/data/vllm_models.json lists what was read, with a verdict for each function. After a failure: read the function
in vLLM's sources; add a row to `checkpoint/vllm_loaders.py` or `checkpoint/vllm_layers.py`, or a verdict why none is
needed; then add what the failure prints to the list.
"""

import ast
import json
from typing import Any

import pytest
from paths import ROOT
from vllm_scan import scan
from vllm_sources import VERSIONS, sources

from convert_w4a8.checkpoint.vllm_layers import MERGED
from convert_w4a8.checkpoint.vllm_loaders import KEPT

REVIEWED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "vllm_models.json").read_text(encoding="utf-8"))
EACH_VERSION = pytest.mark.parametrize("version", VERSIONS)
GENERIC = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
"""What `checkpoint.names` merges in every model."""


@pytest.mark.slow
@EACH_VERSION
def test_every_loader_that_reshapes_tensors_was_read(version: str) -> None:
    """Functions by name, and what they do to tensors by a checksum of these expressions."""
    loaders = REVIEWED["loaders"]
    new = {
        f"{file} {function}": checksum
        for (file, function), checksum in scan(version).loaders.items()
        if checksum not in loaders.get(f"{file} {function}", {}).get("expressions", ())
    }
    assert new == {}


@pytest.mark.slow
@EACH_VERSION
def test_every_layer_that_is_never_quantized_was_read(version: str) -> None:
    """Layers that are made without a quantization method, by class and attribute."""
    assert {f"{file} {attribute}" for file, attribute in scan(version).unquantized} - set(
        REVIEWED["unquantized"]
    ) == set()


@pytest.mark.slow
@EACH_VERSION
def test_what_models_merge_is_in_the_table(version: str) -> None:
    """Every list of shards is part of a row, or was found to be none: convolutions, biases, 16-bit layers, drafts."""
    rows = [*GENERIC, *(_leaves(row.shards) for row in MERGED)]
    missing = {
        f"{name} <- {' '.join(sorted(shards))}"
        for name, shards in scan(version).merged
        if not any(_leaves(shards) <= row for row in rows)
    }
    assert missing - set(REVIEWED["merged"]) == set()


@EACH_VERSION
def test_every_layer_without_a_name_is_in_the_table(version: str) -> None:
    """Linear layers that are made with a quantization and without a prefix, by file: no list can keep them."""
    root = sources(version) / "vllm/model_executor/models"
    known = {row.file for row in KEPT} | {"qwen2_rm.py"}  # a head, which no tool quantizes
    assert {path.name for path in root.rglob("*.py") if _has_nameless_layers(path.read_text())} <= known


def _has_nameless_layers(text: str) -> bool:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Linear"):
            named = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if named.get("quant_config", "None") != "None" and not named.keys() & {"prefix", None}:
                return True
    return False


def test_the_list_says_why() -> None:
    """Each function has a verdict, in the order of names."""
    loaders = REVIEWED["loaders"]
    assert list(loaders) == sorted(loaders)
    assert all(entry["verdict"] and entry["expressions"] for entry in loaders.values())


def _leaves(names: Any) -> set[str]:
    return {name.rpartition(".")[2] for name in names}
