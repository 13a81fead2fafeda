"""GPTQ: zero-points of both versions, a g_idx or none, and GPTQModel's `dynamic`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_edits import Tensors, edit_json, edit_quantization, edit_tensors, write_case
from factories.layers import BORROW, pack_columns
from layer_specs import find_layers
from safetensors.torch import save_file

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.sources import gptq

Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"


# GPTQ's zero-points.


def write_gptq_layer(path: Path, qzeros: np.ndarray[Any, np.dtype[np.int32]], version: str) -> None:
    """Write a GPTQ checkpoint of one layer [N, 128] with these qzeros [1, N/8]."""
    n = qzeros.shape[1] * 8
    path.mkdir()
    tensors = {
        "x.qweight": torch.zeros(16, n, dtype=torch.int32),
        "x.qzeros": torch.from_numpy(qzeros),
        "x.scales": torch.ones(1, n, dtype=torch.float16),
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "quantize_config.json").write_text("{}")
    edit_json(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    edit_quantization(path, group_size=128, checkpoint_format=version)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_every_pair_of_neighbouring_zero_points(version: str, tmp_path: Path) -> None:
    """All 256 pairs in each of the 8 places of a word, with the borrow of v1 where the lower one is 0."""
    pairs = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(256, 2)
    zeros = np.full((256, 8, 8), 8, dtype=np.uint8)
    for place in range(8):
        zeros[:, place, place] = pairs[:, 0]
        zeros[:, place, (place + 1) % 8] = pairs[:, 1]
    packed = pack_columns(zeros.reshape(1, -1)).view(np.uint32)
    stored = packed - np.uint32(BORROW[4]) if version == "gptq" else packed
    write_gptq_layer(tmp_path / "in", stored.view(np.int32), version)
    checkpoint = open_checkpoint(tmp_path / "in")
    (spec,) = gptq.find_layers(checkpoint, [])
    found = gptq.read_zeros(spec, read_tensor)
    assert found is not None
    assert np.array_equal(found.numpy(), zeros.reshape(1, -1))


@pytest.mark.parametrize(("word", "version"), [(0x77777777, "gptq"), (-0x77777778, "gptq_v2")])
def test_symmetric_zero_points_are_none(word: int, version: str, tmp_path: Path) -> None:
    """The nibble of a symmetric file is 7 in v1 and 8 in v2; both mean that there are no zero-points."""
    write_gptq_layer(tmp_path / "in", np.full((1, 2), word, dtype=np.int32), version)
    checkpoint = open_checkpoint(tmp_path / "in")
    (spec,) = gptq.find_layers(checkpoint, [])
    assert gptq.read_zeros(spec, read_tensor) is None


def test_g_idx_may_be_absent(tmp_path: Path) -> None:
    """Old GPTQ files without g_idx have contiguous groups."""
    written = write_case("gptq-v1", tmp_path / "in")
    edit_tensors(written.path, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])
    checkpoint = open_checkpoint(written.path)
    for spec in gptq.find_layers(checkpoint, []):
        w = gptq.read_layer(spec, read_tensor)
        assert w.g_idx is None
        assert np.array_equal(dequantize(w).double().numpy(), written.layers[spec.name].weight)


# `dynamic` of GPTQModel: like its own function, the first matching pattern decides.


@pytest.mark.parametrize(
    ("dynamic", "group_sizes"),
    [
        pytest.param({}, (128, 128), id="empty"),
        pytest.param({r".*q_proj": {"group_size": 64}}, (64, 128), id="bare"),
        pytest.param({r"+:.*q_proj": {"group_size": 64}}, (64, 128), id="plus"),
        pytest.param({r"q_proj": {"group_size": 64}}, (128, 128), id="matches-from-the-start"),
        pytest.param({r".*q_proj": {"group_size": 64}, r".*": {"group_size": 32}}, (64, 32), id="first-wins"),
        pytest.param({r".*": {"group_size": 32}, r".*q_proj": {"group_size": 64}}, (32, 32), id="order-counts"),
        pytest.param({r".*q_proj": {}, r".*": {"group_size": 32}}, (128, 32), id="empty-override-wins"),
    ],
)
def test_dynamic_overrides(dynamic: dict[str, Any], group_sizes: tuple[int, int], tmp_path: Path) -> None:
    """Overrides decide the expected number of groups: a wrong one is refused by the shape of qzeros."""
    written = write_case("gptq-v1", tmp_path / "in")

    def regroup(tensors: Tensors) -> None:
        for module, size in zip((Q_PROJ, K_PROJ), group_sizes, strict=True):
            for role in ("qzeros", "scales"):
                columns = tensors[f"{module}.{role}"].shape[1]
                tensors[f"{module}.{role}"] = tensors[f"{module}.{role}"][:1].expand(256 // size, columns)

    def keep_two(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith(("qweight", "qzeros", "scales", "g_idx")) and not name.startswith((Q_PROJ, K_PROJ)):
                del tensors[name]

    edit_tensors(written.path, regroup)
    edit_tensors(written.path, keep_two)
    edit_quantization(written.path, dynamic=dynamic)
    specs, problems = find_layers(written.path)
    assert not problems
    assert {spec.name: spec.group_size for spec in specs} == dict(zip((Q_PROJ, K_PROJ), group_sizes, strict=True))
