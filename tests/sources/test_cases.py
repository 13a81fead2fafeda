"""Checkpoints that people reported: AutoRound, Marlin's layout, an unfilled g_idx, negative scales; and their kin."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_edits import REMOVE, Tensors, edit_quantization, edit_tensors, write_case
from layer_specs import find_layers, opened

from convert_w4a8 import api
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.errors import PlanError
from convert_w4a8.linear import W4Linear
from convert_w4a8.options import Options, ScalesMode

FORMATS = ("lut", "compressed-tensors")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def reported(shared: Path, number: str, out: Path) -> Path:
    """Write one of the reported checkpoints."""
    (script,) = (shared / "cases").glob(f"{number}-*.py")
    subprocess.run([sys.executable, script, out], check=True, timeout=60)
    return out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("number", ["07", "28", "33"])
def test_reported_checkpoints_convert(number: str, form: str, shared: Path, tmp_path: Path) -> None:
    """Without an option, with all codes kept, and verified; nothing is said against the input."""
    source = reported(shared, number, tmp_path / "in")
    assert api.make_plan(source, Options(format=form)).warnings == ()
    result = api.convert(source, tmp_path / "out", Options(format=form))
    assert [layer.stats is not None and layer.stats.codes_kept for layer in result.layers] == [True] * 7
    assert not api.verify(tmp_path / "out", source).problems


@pytest.mark.parametrize("form", FORMATS)
def test_marlin_is_refused_once(form: str, shared: Path, tmp_path: Path) -> None:
    """One problem, that names the layout and what to do."""
    source = reported(shared, "19", tmp_path / "in")
    with pytest.raises(PlanError) as caught:
        api.convert(source, tmp_path / "out", Options(format=form))
    (problem,) = caught.value.problems
    assert problem.subject == "quantization_config: is_marlin_format"
    assert "Marlin" in problem.reason
    assert "the GPTQ checkpoint" in problem.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", list(ScalesMode))
@pytest.mark.parametrize("case", ["gptq-signed", "awq-signed", "ct-signed"])
def test_negative_scales_cost_no_more_than_positive_ones(case: str, mode: ScalesMode, tmp_path: Path) -> None:
    """Every mode keeps the codes, and no layer is worse than the same with all scales positive."""
    written = write_case(case, tmp_path / "in")
    noise = {}
    for sign in ("signed", "positive"):
        out = tmp_path / sign
        result = api.convert(written.path, out, Options(scales=mode))
        assert all(layer.stats is not None and layer.stats.codes_kept for layer in result.layers)
        assert not api.verify(out, written.path).problems
        noise[sign] = [layer.stats.sqnr_db for layer in result.layers if layer.stats is not None]
        edit_tensors(written.path, lambda t: [t[name].abs_() for name in t if name.endswith(("scales", "_scale"))])
    assert noise["signed"] == pytest.approx(noise["positive"], abs=0.5)


def minus_one(tensors: Tensors, role: str, count: int | None) -> None:
    """Put −1 into some g_idx: throughout, or into the first `count` entries."""
    for name, tensor in tensors.items():
        if name.endswith(f".{role}"):
            tensor[:count] = -1


@pytest.mark.parametrize("count", [None, 1, 7])
def test_g_idx_that_calibration_did_not_fill(count: int | None, tmp_path: Path) -> None:
    """A −1 anywhere in compressed-tensors' g_idx means groups in order."""
    written = write_case("ct-g-idx-trivial", tmp_path / "in")
    edit_tensors(written.path, lambda t: minus_one(t, "weight_g_idx", count))
    assert_reads_as_written(written.path, written.layers)


@pytest.mark.parametrize("fill", [-1, 0])
def test_gptq_g_idx_that_was_never_filled(fill: int, tmp_path: Path) -> None:
    """−1 or 0 throughout, without desc_act: groups in order, as AutoGPTQ's kernels take it."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(written.path, lambda t: [t[name].fill_(fill) for name in t if name.endswith("g_idx")])
    assert_reads_as_written(written.path, written.layers)


def assert_reads_as_written(path: Path, layers: dict[str, Any]) -> None:
    """Assert that each layer reads as the weights that were written."""
    _, source, specs = opened(path)
    assert {spec.name for spec in specs} == layers.keys()
    for spec in specs:
        w = source.read_layer(spec, read_tensor)
        assert isinstance(w, W4Linear)
        assert w.g_idx is None
        assert np.array_equal(dequantize(w).double().numpy(), layers[spec.name].weight)


def drop_zeros(tensors: Tensors) -> None:
    """Take all zero-points away."""
    for name in [name for name in tensors if name.endswith("qzeros")]:
        del tensors[name]


def clear_zeros(tensors: Tensors) -> None:
    """Leave zero-points that were never filled in."""
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            tensor.zero_()


@pytest.mark.parametrize("edit", [drop_zeros, clear_zeros])
@pytest.mark.parametrize("case", ["gptq-v1", "gptq-v2", "auto-round"])
def test_symmetric_gptq_without_zero_points(case: str, edit: Callable[[Tensors], None], tmp_path: Path) -> None:
    """No kernel of a symmetric layer reads them, and some tools leave them out, or never fill them in."""
    written = write_case(case, tmp_path / "in")
    edit_tensors(written.path, edit)
    assert_reads_as_written(written.path, written.layers)
    api.convert(written.path, tmp_path / "out")
    assert not api.verify(tmp_path / "out", written.path).problems


@pytest.mark.parametrize("sym", [False, REMOVE])
def test_zero_points_are_missed_where_they_mean_something(sym: object, tmp_path: Path) -> None:
    """A layer that is not said to be symmetric is not taken to be."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(written.path, drop_zeros)
    edit_quantization(written.path, sym=sym)
    assert {problem.reason for problem in find_layers(written.path)[1]} == {"is missing"}


def test_biases_of_zeros_are_copied(tmp_path: Path) -> None:
    """AutoGPTQ writes one for every layer, whether the model has any or not."""
    written = write_case("gptq-v1", tmp_path / "in")

    def add(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("qweight")]:
            tensors[name.replace("qweight", "bias")] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)

    edit_tensors(written.path, add)
    api.convert(written.path, tmp_path / "out")
    assert not api.verify(tmp_path / "out", written.path).problems


def test_a_weight_shape_need_not_be_there(tmp_path: Path) -> None:
    """The packed weight says it, too."""
    written = write_case("ct-w4a16", tmp_path / "in")
    edit_tensors(written.path, lambda t: [t.pop(name) for name in list(t) if name.endswith("weight_shape")])
    assert_reads_as_written(written.path, written.layers)
