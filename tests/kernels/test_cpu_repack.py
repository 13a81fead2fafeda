"""numba's kernels that change packings against the reference, byte for byte."""

from collections.abc import Callable
from importlib import import_module

import packings
import pytest
import torch
from packings import random_words

from convert_w4a8.kernels.repack import reference
from convert_w4a8.linear import Packing

pytest.importorskip("numba", reason="numba is not installed")
KERNELS = import_module("convert_w4a8.kernels.repack.cpu")
PACKINGS = pytest.mark.parametrize("packing", packings.ALL, ids=packings.packing_id)
SIZES = [(16, 32), (48, 96), (16, 2048), (208, 32), (272, 160), (512, 64)]


@PACKINGS
@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
def test_reorder_and_restore(packing: Packing, n: int, k: int, assert_untouched: Callable[[], None]) -> None:
    """Into the kernel's order and back; nothing beside the outputs is written, and the inputs stay as they are."""
    words = random_words(packing, n, k)
    before = words.clone()
    found = KERNELS.reorder(words, packing)
    restored = KERNELS.restore(found)
    assert_untouched()
    assert torch.equal(words, before)
    assert torch.equal(found, reference.reorder(words, packing))
    assert torch.equal(restored, reference.restore(found))
    assert torch.equal(restored, reference.to_pack_quantized(words, packing))


@pytest.mark.parametrize("packing", [Packing.GPTQ, Packing.AWQ], ids=str)
@pytest.mark.parametrize(("n", "k"), [*SIZES, (8, 8), (520, 72), (72, 520)], ids=str)
def test_to_pack_quantized(packing: Packing, n: int, k: int, assert_untouched: Callable[[], None]) -> None:
    """Any multiples of 8, those that fill no block of a kernel among them."""
    words = random_words(packing, n, k)
    before = words.clone()
    found = KERNELS.to_pack_quantized(words, packing)
    assert_untouched()
    assert torch.equal(words, before)
    assert torch.equal(found, reference.to_pack_quantized(words, packing))


@pytest.mark.parametrize("packing", packings.WITHOUT_KERNELS, ids=packings.packing_id)
def test_a_packing_without_a_kernel_is_left_to_the_reference(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name says."""
    words = random_words(packing, 48, 96)
    expected = reference.reorder(words, packing), reference.to_pack_quantized(words, packing)
    assert torch.equal(KERNELS.reorder(words, packing), expected[0])
    assert torch.equal(KERNELS.to_pack_quantized(words, packing), expected[1])
    for name in ("reorder", "to_pack_quantized"):
        monkeypatch.delattr(reference, name)
        with pytest.raises(AttributeError, match=name):
            getattr(KERNELS, name)(words, packing)


@PACKINGS
def test_some_channels_of_a_layer(packing: Packing) -> None:
    """Slices, whose rows lie apart, and what is transposed, whose columns do."""
    words = random_words(packing, 96, 160)
    whole, rows = reference.reorder(words, packing), reference.to_pack_quantized(words, packing)
    outputs = packing.slice_outputs(words, 16, 64)
    assert torch.equal(KERNELS.reorder(outputs, packing), whole[:, 64:256])
    assert torch.equal(KERNELS.to_pack_quantized(outputs, packing), rows[16:64])
    inputs = packing.slice_inputs(words, 32, 128)
    assert torch.equal(KERNELS.reorder(inputs, packing), whole[1:4])
    assert torch.equal(KERNELS.to_pack_quantized(inputs, packing), rows[:, 4:16])
    turned = words.t().contiguous().t()
    assert torch.equal(KERNELS.reorder(turned, packing), whole)
    assert torch.equal(KERNELS.to_pack_quantized(turned, packing), rows)
    assert torch.equal(KERNELS.restore(whole[1:4, 64:256]), rows[16:64, 4:16])
    assert torch.equal(KERNELS.restore(whole.t().contiguous().t()), rows)


def test_every_code_in_every_nibble_is_restored() -> None:
    """All 65,536 half words, which the order never cuts, in either half of a word."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for reordered in (halves, halves.roll(1)):
        words = reordered.view(torch.int32).view(-1, 64)
        assert torch.equal(KERNELS.restore(words), reference.restore(words))


@PACKINGS
def test_sizes_that_do_not_fit_are_named(packing: Packing) -> None:
    """The kernels refuse what their reference refuses."""
    with pytest.raises(ValueError, match="N = 40 is not a multiple of 16"):
        KERNELS.reorder(random_words(packing, 40, 64), packing)
    with pytest.raises(ValueError, match="K = 40 is not a multiple of 32"):
        KERNELS.reorder(random_words(packing, 16, 40), packing)


@pytest.mark.parametrize("packing", [Packing.AWQ, packings.WITHOUT_KERNELS[2]], ids=packings.packing_id)
def test_a_single_column_may_have_any_stride(packing: Packing) -> None:
    """A dimension of length 1 has no stride that matters: eight output channels, turned on the way."""
    words = random_words(packing, 8, 40)
    turned = words.view(1, 40).t()
    assert turned.stride() == (1, 40)
    expected = reference.to_pack_quantized(words, packing)
    assert torch.equal(KERNELS.to_pack_quantized(turned, packing), expected)
    assert torch.equal(reference.to_pack_quantized(turned, packing), expected)
