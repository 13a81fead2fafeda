"""Damage that only the numbers show: holes in the codes, scales that are no scales. And what only looks like it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_edits import Tensors, edit_tensors, write_case

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.sources import find_source

DOWN = "model.layers.0.mlp.down_proj"
PAGE = 4096
CODES = {"gptq-v1": "qweight", "awq-zero-points": "qweight", "ct-w4a16": "weight_packed", "gptq-desc-act": "qweight"}


def read(path: Path, module: str = DOWN) -> None:
    """Read one layer of a checkpoint."""
    checkpoint = open_checkpoint(path)
    source = find_source(checkpoint)
    problems: list[Problem] = []
    (spec,) = (spec for spec in source.find_layers(checkpoint, problems) if spec.name == module)
    source.read_layer(spec, read_tensor)


def refusal(path: Path) -> str:
    """Return why the layer cannot be read."""
    with pytest.raises(ConvertError) as caught:
        read(path)
    return str(caught.value)


def punch(path: Path, name: str, *, after: int, size: int) -> int:
    """Set bytes of a tensor to 0, from the page of the file on that begins `after` bytes into it; return where."""
    info = open_checkpoint(path).tensors[name]
    start = -(-(info.start + after) // PAGE) * PAGE
    assert start + size <= info.start + info.nbytes
    with info.path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    return start - info.start


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("after", [1, 20_000])
def test_a_page_of_zeros_within_codes_is_refused(name: str, after: int, tmp_path: Path) -> None:
    """A download that left out a page reads as thousands of weights of −8: it is said where the hole is."""
    write_case(name, tmp_path / "in")
    read(tmp_path / "in")
    where = punch(tmp_path / "in", f"{DOWN}.{CODES[name]}", after=after, size=PAGE)
    assert f"{DOWN}.{CODES[name]}: has a hole of zeros: 4096 bytes, {where:,} bytes into it" in refusal(tmp_path / "in")


@pytest.mark.parametrize("size", [4, 1000, PAGE - 4])
def test_less_than_a_page_is_no_hole(size: int, tmp_path: Path) -> None:
    """Some codes of −8 side by side may be meant."""
    write_case("gptq-v1", tmp_path / "in")
    punch(tmp_path / "in", f"{DOWN}.qweight", after=1, size=size)
    read(tmp_path / "in")


@pytest.mark.parametrize(("role", "value"), [("qzeros", 0), ("scales", 0)])
def test_zeros_that_mean_zero_are_kept(role: str, value: int, tmp_path: Path) -> None:
    """Padding: where the zero-points or the scales are 0 as well, the weights are 0, as they may be."""
    write_case("awq-zero-points", tmp_path / "in")

    def pad(tensors: Tensors) -> None:
        tensors[f"{DOWN}.qweight"][:256] = 0  # groups 0 and 1 of K
        tensors[f"{DOWN}.{role}"][:2] = value

    edit_tensors(tmp_path / "in", pad)
    read(tmp_path / "in")


def test_int8_zeros_are_weights_of_zero(tmp_path: Path) -> None:
    """In bytes 0 is the weight 0, of which a pruned layer has many."""
    write_case("ct-int8-storage", tmp_path / "in")
    punch(tmp_path / "in", f"{DOWN}.weight", after=1, size=2 * PAGE)
    read(tmp_path / "in")


@pytest.mark.parametrize("name", ["gptq-v1", "awq-zero-points", "ct-w4a16"])
def test_a_scale_a_million_times_the_others_is_refused(name: str, tmp_path: Path) -> None:
    """A wrong bit in an exponent: finite, but no weight."""
    write_case(name, tmp_path / "in")
    role = "weight_scale" if name.startswith("ct") else "scales"

    def set_one(tensors: Tensors) -> None:
        scales = tensors[f"{DOWN}.{role}"].float()
        scales[0, 0] = float(scales.median()) * 3e6
        tensors[f"{DOWN}.{role}"] = scales

    edit_tensors(tmp_path / "in", set_one)
    assert f"{DOWN}.{role}: holds a scale of" in (line := refusal(tmp_path / "in"))
    assert "where the median is" in line


DEAD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "most-tiny": lambda scales: torch.where(torch.arange(scales.shape[1]) % 8 == 0, scales, 1e-9),
    "most-0": lambda scales: torch.where(torch.arange(scales.shape[1]) % 8 == 0, scales, 0.0),
    "one-of-dead-channels": lambda scales: scales.index_fill(1, torch.tensor([0]), 2 / 15),
}


@pytest.mark.parametrize("dead", DEAD)
def test_dead_groups_are_no_outliers(dead: str, tmp_path: Path) -> None:
    """Tools give dead groups a tiny scale, 0 or 2/15; beside them the others are large, and right."""
    write_case("gptq-v1", tmp_path / "in")
    edit_tensors(tmp_path / "in", lambda t: t.update({f"{DOWN}.scales": DEAD[dead](t[f"{DOWN}.scales"].float())}))
    read(tmp_path / "in")
