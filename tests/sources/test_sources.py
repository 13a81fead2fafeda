"""Input formats: one contract over all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_edits import write_case
from factories import CASES, SEVENS, Case
from factories.layers import nibbles
from layer_specs import opened

from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.linear import W4Linear
from convert_w4a8.sources import LayerSpec, Source, source_named, sources
from convert_w4a8.sources.checks import unpack_words

# A group size that does not divide K, and 8 bits, are not for a reader; test_plan.py has the first.
READABLE = [
    pytest.param(case, id=case.id) for case in (*CASES, *SEVENS) if not case.refused and not case.id.endswith("-odd-k")
]


def read_layer(source: Source, spec: LayerSpec) -> W4Linear:
    """Read a layer that is quantized."""
    w = source.read_layer(spec, read_tensor)
    assert isinstance(w, W4Linear)
    return w


def test_formats_are_the_files_of_the_folder() -> None:
    """All of them, by name; what is beside them is no format."""
    assert [source.NAME for source in sources()] == ["auto-round", "awq", "compressed-tensors", "gptq", "w4afp8"]
    for source in sources():
        assert source_named(source.NAME) is source
        assert source.ANCHOR in source.ROLES
    with pytest.raises(KeyError):
        source_named("checks")


@pytest.mark.parametrize("case", READABLE)
def test_contract(case: Case, tmp_path: Path) -> None:
    """Headers find exactly the quantized layers; their tensors give exactly the weights that were written."""
    written = case.write(tmp_path / "in")
    checkpoint, source, specs = opened(written.path)
    assert [s.NAME for s in sources() if s.matches(checkpoint)] == [written.format]
    assert [spec.name for spec in specs] == sorted(written.layers)
    parts = [info for spec in specs for info in spec.parts.values()]
    names = [info.name for info in parts]
    assert len(names) == len(set(names))
    assert set(names) | written.dense.keys() == checkpoint.tensors.keys()
    assert all(checkpoint.tensors[info.name] == info for info in parts)
    for spec in specs:
        layer = written.layers[spec.name]
        n, k = layer.codes.shape
        size = k if layer.scheme.group_size == -1 else layer.scheme.group_size
        assert (spec.out_features, spec.in_features, spec.group_size) == (n, k, size)
        assert spec.symmetric == layer.scheme.claims_symmetric
        assert set(spec.parts) <= set(source.ROLES)
        assert (spec.source, spec.dense) == (written.format, False)
        assert spec.has_zeros == bool({"qzeros", "weight_zero_point"} & set(spec.parts))
        assert spec.has_g_idx == bool({"g_idx", "weight_g_idx"} & set(spec.parts))
        assert spec.nbytes == sum(checkpoint.tensors[info.name].nbytes for info in spec.parts.values())

        w = read_layer(source, spec)
        assert w.shape_nk == (n, k)
        assert np.array_equal(dequantize(w).double().numpy(), layer.weight)
        assert (w.zeros is None) == bool((layer.zeros == 8).all())
        assert (w.g_idx is None) == bool((layer.groups == np.arange(k) // size).all())
        assert w.is_kernel_ready == (w.zeros is None and w.g_idx is None and size == 128)
        assert torch.equal(w.scales, layer.scales)
        for alone, known in ((source.read_zeros, w.zeros), (source.read_g_idx, w.g_idx)):
            again = alone(spec, read_tensor)
            assert (again is None) == (known is None)
            assert again is None or known is None or torch.equal(again, known)


@pytest.mark.parametrize("case", ["awq-zero-points", "gptq-desc-act-asymmetric", "ct-asymmetric", "ct-int8-storage"])
def test_output_channels_can_be_taken_apart(case: str, tmp_path: Path) -> None:
    """Any slice of a layer, in multiples of 8 channels, dequantizes to the slice of its weights, also when small."""
    written = write_case(case, tmp_path / "in")
    _, source, specs = opened(written.path)
    for spec in specs:
        w = source.read_layer(spec, read_tensor)
        for start, stop in ((0, 8), (8, 24), (spec.out_features - 8, spec.out_features)):
            part = dequantize(w.output_channels(start, stop)).double().numpy()
            assert np.array_equal(part, written.layers[spec.name].weight[start:stop])


@pytest.mark.parametrize(("n", "k"), [(8, 128), (16, 1 << 23), (136, 1 << 20), (100_000, 128), (4096, 12288)])
def test_output_blocks_cover_all_channels_once(n: int, k: int) -> None:
    """Blocks follow each other without gap, in multiples of 16 channels, and are small or one tile high."""
    blocks = list(output_blocks(n, k))
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == n
    assert all(start % 16 == 0 and ((stop - start) * k <= 1 << 23 or stop - start <= 16) for start, stop in blocks)


def test_unpack_words_takes_the_low_nibble_first() -> None:
    """Every byte value in every place of a word, against plain numpy."""
    words = np.arange(256, dtype=np.uint32)[:, None] << (8 * np.arange(4, dtype=np.uint32))
    signed = np.ascontiguousarray(words).view(np.int32)
    assert np.array_equal(unpack_words(torch.from_numpy(signed)).numpy(), nibbles(signed).reshape(256, 32))
