"""The zoo's own arithmetic: BF16 twins of checkpoints whose weights are known. Needs neither vLLM nor its packages."""

from pathlib import Path

import pytest
import torch
from factories import CASES, Case
from safetensors.torch import load_file
from zoo import reference, sources, table

FOUR_BITS = [case for case in CASES if "8-bit" not in case.id]


@pytest.mark.parametrize("case", FOUR_BITS, ids=lambda case: case.id)
def test_a_twin_has_the_weights_that_the_source_means(case: Case, tmp_path: Path) -> None:
    """Of every input format that the factories write: codes, zero-points, activation order, groups, what is dense."""
    checkpoint = case.write(tmp_path / "in")
    reference.write_twin(checkpoint.path, tmp_path / "twin")
    found = load_file(tmp_path / "twin" / "model.safetensors")
    names = {f"{module}.weight": torch.from_numpy(layer.weight) for module, layer in checkpoint.layers.items()}
    assert len(found) == len(names) + len(checkpoint.dense)
    if "mixtral" in str(checkpoint.model.config):
        return  # names are the model's own there
    for name, weight in names.items():
        torch.testing.assert_close(found[name].double(), weight.double(), rtol=2**-8, atol=1e-6)
    for name, tensor in checkpoint.dense.items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_tiny_sources_mean_their_twins() -> None:
    """Codes that are packed come out again, and stand for the twin's weight, near what was quantized."""
    weight = torch.randn(16, 256).bfloat16()
    tensors, plain = sources.quantized_layer("m", weight)
    parts = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    assert torch.equal(reference.dequantize(parts, {}), plain)
    assert float((plain.float() - weight.float()).abs().max()) <= float(parts["weight_scale"].float().max())


def test_a_line_of_the_table_says_where() -> None:
    """One word where all agree; versions of vLLM or ranks where these decide; each reason once."""
    row = {"architecture": "a", "format": "lut", "scales": "search", "tp": 1, "reason": "", "layers": 3, "options": ""}
    rows = [row | {"vllm": version, "tp": tp, "status": "right"} for version in ("1", "2") for tp in (1, 2)]
    assert table.summarize(rows)[0]["lut_search"] == "right"
    rows[2] |= {"status": "wrong", "reason": "x_y"}
    rows[3] |= {"status": "wrong", "reason": "x_y"}
    line = table.summarize(rows)[0]
    assert line["lut_search"] == "right (1), wrong (2)"
    assert line["why"] == r"wrong: x\_y"
