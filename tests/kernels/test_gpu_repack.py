"""Triton's kernels that change packings against the reference: interpreted without a GPU, compiled with one."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import packings
import pytest
import torch
from packings import random_words
from paths import GOLDEN_CUT, ROOT
from safetensors.torch import load_file

from convert_w4a8.kernels.repack import reference
from convert_w4a8.linear import Packing

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.repack.gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKINGS = pytest.mark.parametrize("packing", packings.WITH_KERNELS, ids=packings.packing_id)
SIZES = [(16, 32), (48, 96), (16, 2048), (208, 32), (272, 160), (512, 64)]
BLOCKS = [
    KERNELS.Block(16, 32, 1),
    KERNELS.Block(64, 32, 4, k_first=True),
    KERNELS.Block(32, 128, 2),
    KERNELS.Block(256, 128, 8),
]


@PACKINGS
@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
def test_reorder_equals_its_reference(packing: Packing, n: int, k: int, assert_untouched: Callable[[], None]) -> None:
    """Sizes that fill no block; nothing beside the output is written."""
    words = random_words(packing, n, k)
    found = KERNELS.reorder(words.to(DEVICE), packing)
    assert_untouched()
    assert torch.equal(found.cpu(), reference.reorder(words, packing))


@PACKINGS
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_gives_the_same_bytes(
    packing: Packing, block: object, assert_untouched: Callable[[], None]
) -> None:
    """How the work is cut changes nothing: at 80 x 160, with some blocks cut short and some whole."""
    words = random_words(packing, 80, 160)
    found = KERNELS.reorder_by(words.to(DEVICE), packing, block)
    assert_untouched()
    assert torch.equal(found.cpu(), reference.reorder(words, packing))


@PACKINGS
def test_every_code_in_every_nibble(packing: Packing) -> None:
    """Over sixteen layers of one tile, each position holds each of the 16 codes."""
    shifts = torch.arange(0, 32, 4)
    base = (random_words(packing, 16, 32)[..., None] >> shifts) & 15
    for first in range(16):
        words = (((base + first) % 16) << shifts).sum(-1).to(torch.int32)
        found = KERNELS.reorder(words.to(DEVICE), packing)
        assert torch.equal(found.cpu(), reference.reorder(words, packing))


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_reorder_gives_the_bytes_of_vllm(case: str) -> None:
    """The same vectors that pin the reference."""
    vectors = load_file(GOLDEN_CUT)
    lut = KERNELS.reorder(vectors[f"{case}.weight_packed"].to(DEVICE), Packing.PACK_QUANTIZED)
    assert torch.equal(lut.cpu().view(torch.uint8).flatten(), vectors[f"{case}.lut_weight_bytes"])


def test_sizes_that_do_not_fit_are_named() -> None:
    """The kernel refuses what its reference refuses."""
    with pytest.raises(ValueError, match="N = 40 is not a multiple of 16"):
        KERNELS.reorder(torch.zeros(8, 40, dtype=torch.int32, device=DEVICE), Packing.GPTQ)


TRANSPOSED = pytest.mark.parametrize("packing", [Packing.GPTQ, Packing.AWQ], ids=str)


@TRANSPOSED
@pytest.mark.parametrize(("n", "k"), [*SIZES, (520, 72), (72, 520)], ids=str)
def test_rows_equal_their_reference(packing: Packing, n: int, k: int, assert_untouched: Callable[[], None]) -> None:
    """`to_pack_quantized`, which takes any multiple of 8."""
    words = random_words(packing, n, k)
    found = KERNELS.to_pack_quantized(words.to(DEVICE), packing)
    assert_untouched()
    assert torch.equal(found.cpu(), reference.to_pack_quantized(words, packing))


@TRANSPOSED
def test_rows_of_some_output_channels(packing: Packing) -> None:
    """A slice, whose rows lie apart, and columns that do."""
    words = random_words(packing, 96, 160)
    expected = reference.to_pack_quantized(words, packing)
    words = words.to(DEVICE)
    part = packing.slice_outputs(words, 16, 64)
    assert not part.is_contiguous()
    assert torch.equal(KERNELS.to_pack_quantized(part, packing).cpu(), expected[16:64])
    turned = words.t().contiguous().t()
    assert torch.equal(KERNELS.to_pack_quantized(turned, packing).cpu(), expected)


@pytest.mark.parametrize("packing", packings.ALL, ids=packings.packing_id)
def test_restore_and_packings_without_a_kernel_are_left_to_the_reference(
    packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, whatever the name of the packing says; the kernels do the rest without the reference."""
    words = random_words(packing, 48, 96)
    expected = {name: getattr(reference, name)(words, packing) for name in ("reorder", "to_pack_quantized")}
    restored = KERNELS.restore(expected["reorder"].to(DEVICE))
    assert restored.device.type == DEVICE
    assert torch.equal(restored.cpu(), expected["to_pack_quantized"])
    blocks = {"reorder": KERNELS.DEFAULT_BLOCKS, "to_pack_quantized": KERNELS.PACK_QUANTIZED_BLOCKS}
    for name, found in expected.items():
        assert torch.equal(getattr(KERNELS, name)(words.to(DEVICE), packing).cpu(), found)
        monkeypatch.delattr(reference, name)
        if packing in blocks[name]:
            assert torch.equal(getattr(KERNELS, name)(words.to(DEVICE), packing).cpu(), found)
            continue
        with pytest.raises(AttributeError, match=name):
            getattr(KERNELS, name)(words.to(DEVICE), packing)


def test_kernels_compile_for_hopper() -> None:
    """All of them, without a GPU; every float operation is rounded to the nearest, by itself."""
    program = ROOT / "tests" / "support" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 19
    assert all(int(shared) <= 48 * 1024 and not inexact for _, shared, *inexact in lines)
