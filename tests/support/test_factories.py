"""The test checkpoints themselves: outside witnesses say that they are what the field's tools write."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import (
    IntQuantizationCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig
from factories import CASES, Case
from factories.formats import Awq, CompressedTensors, Format, Gptq
from factories.layers import (
    Scheme,
    dequantize,
    pack_codes,
    pack_columns,
    pack_columns_awq,
    quantize,
    unpack_columns,
    unpack_columns_awq,
    unpack_rows,
)
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

Q_PROJ = "model.layers.0.self_attn.q_proj"
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

matrices = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda shape: (8 * shape[0], 8 * shape[1])),
    elements=st.integers(0, 15),
)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _relative_error(weight: NDArray[np.float64], original: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(weight - original) / np.linalg.norm(original))


@given(matrices)
def test_packing_is_that_of_compressed_tensors(codes: NDArray[np.uint8]) -> None:
    """compressed-tensors packs the same codes into the same words, along either dimension."""
    signed = torch.from_numpy((codes.astype(np.int16) - 8).astype(np.int8))
    assert np.array_equal(pack_columns(codes), pack_to_int32(signed, 4).numpy())
    assert np.array_equal(pack_codes(codes), pack_to_int32(signed, 4, packed_dim=0).numpy())
    assert np.array_equal(unpack_columns(pack_columns(codes)), codes)
    assert np.array_equal(unpack_rows(pack_codes(codes)), codes)


@given(matrices)
def test_awq_packing_is_that_of_compressed_tensors(codes: NDArray[np.uint8]) -> None:
    """compressed-tensors' reader of AutoAWQ files finds the codes that were packed."""
    packed = torch.from_numpy(pack_columns_awq(codes))
    found, _ = AutoAWQConverter.reverse_awq_order(*AutoAWQConverter.unpack_awq(packed, None, 4), 4)
    assert np.array_equal(found.numpy() & 15, codes)
    assert np.array_equal(unpack_columns_awq(packed.numpy()), codes)


def test_real_gptq_dequantizes_to_its_original(shared: Path) -> None:
    """Read by these conventions, GPTQModel's file is 0.13 from the weights that it was made of."""
    real = _tensors(shared / "models" / "llama-31m-gptq")
    original = _tensors(shared / "models" / "llama-31m-bf16")
    modules = sorted(name.removesuffix(".qweight") for name in real if name.endswith(".qweight"))
    assert len(modules) == 4 * 7
    for module in modules:
        codes = unpack_rows(real[f"{module}.qweight"].numpy()).T
        stored = real[f"{module}.qzeros"].numpy().view(np.uint32) + np.uint32(0x11111111)
        zeros = unpack_columns(stored.view(np.int32))
        weight = dequantize(codes, zeros, real[f"{module}.scales"], real[f"{module}.g_idx"].numpy())
        assert _relative_error(weight, original[f"{module}.weight"].double().numpy()) < 0.15, module


def test_real_awq_dequantizes_to_its_original(shared: Path) -> None:
    """Read by these conventions, AutoAWQ's file is close to the original, once the smoothing is undone.

    0.10 to 0.15 by layer; the wrong rule for zero-points gives 0.35, the wrong order of nibbles 1.2.
    """
    real = _tensors(shared / "models" / "llama-31m-awq-zp")
    original = _tensors(shared / "models" / "llama-31m-bf16")
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        for part, norm in (
            ("self_attn.q_proj", "input_layernorm.weight"),
            ("self_attn.k_proj", "input_layernorm.weight"),
            ("mlp.gate_proj", "post_attention_layernorm.weight"),
        ):
            module = prefix + part
            codes = unpack_columns_awq(real[f"{module}.qweight"].numpy()).T
            zeros = unpack_columns_awq(real[f"{module}.qzeros"].numpy())
            groups = (np.arange(codes.shape[1]) // 128).astype(np.int32)
            weight = dequantize(codes, zeros, real[f"{module}.scales"], groups)
            # AutoAWQ divides the norm by what it multiplies the weight by: their product is unchanged.
            weight = weight * real[prefix + norm].double().numpy()
            expected = original[f"{module}.weight"].double() * original[prefix + norm].double()
            assert _relative_error(weight, expected.numpy()) < 0.16, module


REAL: tuple[tuple[str, Format], ...] = (
    ("llama-31m-gptq", Gptq()),
    ("tiny-qwen3moe-gptq", Gptq()),
    ("llama-31m-awq-zp", Awq()),
    ("tiny-mixtral-awq-zp", Awq(skip=("gate",))),
    ("llama-31m-ct", CompressedTensors(actorder="static")),
    (
        "tiny-llama-ct-asym",
        CompressedTensors({"Linear": Scheme(symmetric=False, scale_dtype=torch.bfloat16)}, actorder="static"),
    ),
)


@pytest.mark.parametrize(("directory", "form"), REAL, ids=[directory for directory, _ in REAL])
def test_tensors_and_config_are_those_of_the_real_tools(directory: str, form: Format, shared: Path) -> None:
    """A layer becomes tensors of the names, dtypes and shapes that the real tool writes; so does the config."""
    path = shared / "models" / directory
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    real = _tensors(path)
    scheme = form.scheme(Q_PROJ)
    assert scheme is not None
    count = real[f"{Q_PROJ}.scales"].shape[0] if f"{Q_PROJ}.scales" in real else real[f"{Q_PROJ}.weight_scale"].shape[1]
    k = 128 * count
    layer = quantize(np.random.default_rng(0), k, k, scheme)
    ours = form.tensors(Q_PROJ, layer)
    theirs = {name: tensor for name, tensor in real.items() if name.startswith(f"{Q_PROJ}.")}
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in theirs.items()
    }
    _assert_agrees(form.config(), config)


def _assert_agrees(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that every key of ours is there and, outside of free-form metadata, has the same value."""
    for key, value in ours.items():
        assert key in theirs
        if isinstance(value, dict) and isinstance(theirs[key], dict):
            _assert_agrees(value, theirs[key])
        elif key not in {"format", "version"}:
            assert theirs[key] == value, key


@by_id
def test_case_is_complete_on_disk(case: Case, tmp_path: Path) -> None:
    """Every quantized layer, every other tensor and every side file is in the directory, and nothing else."""
    checkpoint = case.write(tmp_path / "in")
    stored = _tensors(checkpoint.path)
    for name, tensor in checkpoint.dense.items():
        assert torch.equal(stored.pop(name), tensor)
    assert {name.rsplit(".", 1)[0] for name in stored} == set(checkpoint.layers)
    files = {str(p.relative_to(checkpoint.path)) for p in checkpoint.path.rglob("*") if p.is_file()}
    weights = {name for name in files if name.endswith((".safetensors", "model.safetensors.index.json"))}
    assert files - weights == {"config.json", *checkpoint.side_files, *checkpoint.stale}
    index = checkpoint.path / "model.safetensors.index.json"
    if case.options.shards > 1:
        weight_map = json.loads(index.read_text())["weight_map"]
        for name, file in weight_map.items():
            with safe_open(checkpoint.path / file, "pt") as handle:
                assert name in handle.keys()  # noqa: SIM118 - not a dict
        spread = [{weight_map[n] for n in weight_map if n.startswith(f"{m}.")} for m in checkpoint.layers]
        assert all(len(files) > 1 for files in spread)


@by_id
def test_case_exercises_its_kind(case: Case, tmp_path: Path) -> None:
    """Codes, zero-points and groups take the values that make the case hard."""
    for module, layer in case.write(tmp_path / "in").layers.items():
        top = 2**layer.scheme.bits - 1
        assert set(range(16)) <= set(np.unique(layer.codes)), module
        if layer.scheme.symmetric:
            assert np.all(layer.zeros == (top + 1) // 2)
        else:
            assert {0, top} <= set(np.unique(layer.zeros)), module
        contiguous = np.array_equal(layer.groups, np.sort(layer.groups))
        assert contiguous != layer.scheme.act_order


def test_v1_and_v2_differ_by_one_constant(tmp_path: Path) -> None:
    """GPTQ v1 and v2 files of the same layers differ by 0x11111111 in each word of qzeros, modulo 2³²."""
    cases = {case.id: case for case in CASES}
    old = _tensors(cases["gptq-v1-asymmetric"].write(tmp_path / "v1").path)
    new = _tensors(cases["gptq-v2-asymmetric"].write(tmp_path / "v2").path)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if name.endswith(".qzeros"):
            difference = new[name].numpy().view(np.uint32) - tensor.numpy().view(np.uint32)
            assert np.all(difference == 0x11111111)
        else:
            assert torch.equal(tensor, new[name])


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.form.name == "compressed-tensors" and "g-idx" not in case.id],
    ids=lambda case: case.id,
)
def test_compressed_tensors_reads_the_same_weights(case: Case, tmp_path: Path) -> None:
    """compressed-tensors parses the config and decompresses every layer to the weights that were meant."""
    checkpoint = case.write(tmp_path / "in")
    stored = _tensors(checkpoint.path)
    config = QuantizationConfig.model_validate(case.form.config())
    int8 = isinstance(case.form, CompressedTensors) and case.form.int8
    compressor = IntQuantizationCompressor if int8 else PackedQuantizationCompressor
    for module, layer in checkpoint.layers.items():
        scheme = next(
            scheme
            for scheme in config.config_groups.values()
            if (scheme.weights.num_bits, scheme.weights.group_size or -1)
            == (layer.scheme.bits, layer.scheme.group_size)
        )
        state = {name.rsplit(".", 1)[1]: t for name, t in stored.items() if name.startswith(f"{module}.")}
        state["weight_scale"] = state["weight_scale"].float()
        found = compressor.decompress(state, scheme)["weight"]
        assert np.array_equal(found.double().numpy(), layer.weight), module
