"""Triton kernels against their torch references, byte for byte: interpreted without a GPU, compiled with one."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from paths import GOLDEN_CUT, ROOT
from safetensors.torch import load_file

from convert_w4a8 import devices
from convert_w4a8.encoding import lut_layout, tables
from convert_w4a8.encoding import packing as packing_module
from convert_w4a8.linear import Packing

pytest.importorskip("triton", reason="Triton is not installed")
repack = importlib.import_module("convert_w4a8.kernels.repack.gpu")
expand = importlib.import_module("convert_w4a8.kernels.tables.gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKINGS = pytest.mark.parametrize("packing", Packing, ids=str)
SIZES = [(16, 32), (48, 96), (16, 2048), (208, 32), (272, 160), (512, 64)]
BLOCKS = [
    repack.Block(16, 32, 1),
    repack.Block(64, 32, 4, k_first=True),
    repack.Block(32, 128, 2),
    repack.Block(256, 128, 8),
]


def random_words(packing: Packing, n: int, k: int) -> torch.Tensor:
    """Return random codes of an [N, K] layer; every int32 is eight codes."""
    shape = {Packing.GPTQ: (k // 8, n), Packing.AWQ: (k, n // 8), Packing.PACK_QUANTIZED: (n, k // 8)}[packing]
    generator = torch.Generator().manual_seed(n * k)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    return words.to(DEVICE)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Give `torch.empty` memory full of a sentinel, within margins of it; return the list of those margins."""
    margins: list[torch.Tensor] = []

    def poisoned(*shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        memory = torch.full((size.numel() + 8192,), 0x5A, dtype=dtype, device=device)
        margins.extend((memory[:4096], memory[-4096:]))
        return memory[4096:-4096].view(size)

    monkeypatch.setattr(torch, "empty", poisoned)
    return margins


def assert_untouched(margins: list[torch.Tensor]) -> None:
    assert margins
    assert all((margin == 0x5A).all() for margin in margins)


@PACKINGS
@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
def test_repack_equals_its_reference(packing: Packing, n: int, k: int, guarded: list[torch.Tensor]) -> None:
    """Sizes that fill no block; nothing beside the output is written."""
    words = random_words(packing, n, k)
    found = repack.repack(words, packing)
    assert_untouched(guarded)
    assert torch.equal(found.cpu(), lut_layout.repack_reference(words.cpu(), packing))


@PACKINGS
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_gives_the_same_bytes(packing: Packing, block: object, guarded: list[torch.Tensor]) -> None:
    """How the work is cut changes nothing: at 80 x 160, with some blocks cut short and some whole."""
    words = random_words(packing, 80, 160)
    found = repack.repack_by(words, packing, block)
    assert_untouched(guarded)
    assert torch.equal(found.cpu(), lut_layout.repack_reference(words.cpu(), packing))


@PACKINGS
def test_every_code_in_every_nibble(packing: Packing) -> None:
    """Over sixteen layers of one tile, each position holds each of the 16 codes."""
    shifts = torch.arange(0, 32, 4)
    base = (random_words(packing, 16, 32).cpu()[..., None] >> shifts) & 15
    for first in range(16):
        words = (((base + first) % 16) << shifts).sum(-1).to(torch.int32)
        found = repack.repack(words.to(DEVICE), packing)
        assert torch.equal(found.cpu(), lut_layout.repack_reference(words, packing))


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_kernels_give_the_bytes_of_vllm(case: str) -> None:
    """The same vectors that pin the references."""
    vectors = load_file(GOLDEN_CUT)
    lut = repack.repack(vectors[f"{case}.weight_packed"].to(DEVICE), Packing.PACK_QUANTIZED)
    assert torch.equal(lut.cpu().view(torch.uint8).flatten(), vectors[f"{case}.lut_weight_bytes"])
    scale = vectors[f"{case}.fp8_group_scale"].t().contiguous().view(torch.float8_e4m3fn)
    entries = expand.expand_tables(scale.to(DEVICE))
    assert torch.equal(entries.cpu().view(torch.uint8).flatten(), vectors[f"{case}.lut_scale_bytes"])


def test_every_scale_byte_expands_like_its_reference() -> None:
    """All 256, NaN and products beyond 448 too."""
    scale = torch.arange(256, dtype=torch.uint8).view(4, 64).view(torch.float8_e4m3fn)
    found = expand.expand_tables(scale.to(DEVICE))
    assert found.shape == (4, 64, 8)
    expected = tables.expand_tables_reference(scale)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (1, 1024), (5, 413)], ids=str)
def test_tables_of_odd_sizes(shape: tuple[int, int], guarded: list[torch.Tensor]) -> None:
    """Counts that are no multiple of a block; a transposed scale is read in its logical order."""
    data = (torch.arange(shape[0] * shape[1]) * 37 % 256).to(torch.uint8).view(shape[::-1])
    scale = data.to(DEVICE).view(torch.float8_e4m3fn).t()
    found = expand.expand_tables(scale)
    assert_untouched(guarded)
    expected = tables.expand_tables_reference(data.view(torch.float8_e4m3fn).t())
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_sizes_that_do_not_fit_are_named() -> None:
    """The kernel refuses what its reference refuses."""
    with pytest.raises(ValueError, match="N = 40 is not a multiple of 16"):
        repack.repack(torch.zeros(8, 40, dtype=torch.int32, device=DEVICE), Packing.GPTQ)


TRANSPOSED = pytest.mark.parametrize("packing", [Packing.GPTQ, Packing.AWQ], ids=str)


@TRANSPOSED
@pytest.mark.parametrize(("n", "k"), [*SIZES, (520, 72), (72, 520)], ids=str)
def test_rows_equal_their_reference(packing: Packing, n: int, k: int, guarded: list[torch.Tensor]) -> None:
    """`to_pack_quantized`, which takes any multiple of 8."""
    words = random_words(packing, n, k)
    found = repack.to_pack_quantized(words, packing)
    assert_untouched(guarded)
    assert torch.equal(found.cpu(), packing_module.to_rows_reference(words.cpu(), packing))


@TRANSPOSED
def test_rows_of_some_output_channels(packing: Packing) -> None:
    """A slice, whose rows lie apart, and columns that do."""
    words = random_words(packing, 96, 160)
    part = packing.slice_outputs(words, 16, 64)
    assert not part.is_contiguous()
    assert torch.equal(
        repack.to_pack_quantized(part, packing).cpu(), packing_module.to_rows_reference(words.cpu(), packing)[16:64]
    )
    turned = words.t().contiguous().t()
    assert torch.equal(
        repack.to_pack_quantized(turned, packing).cpu(), packing_module.to_rows_reference(words.cpu(), packing)
    )


def test_kernels_compile_for_hopper() -> None:
    """All of them, without a GPU; every float operation is rounded to the nearest, by itself."""
    program = ROOT / "tests" / "support" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 13
    assert all(int(shared) <= 48 * 1024 and not inexact for _, shared, *inexact in lines)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: the kernels run interpreted, and nothing dispatches")
def test_cuda_tensors_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`layout.repack` and `tables.expand_tables` hand over; their references run on the device as well."""
    words = random_words(Packing.AWQ, 64, 128)
    expected = lut_layout.repack_reference(words, Packing.AWQ)
    scale = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    entries = tables.expand_tables_reference(scale)
    for module, name in ((packing_module, "repack_reference"), (tables, "expand_tables_reference")):
        monkeypatch.delattr(module, name)
    assert torch.equal(lut_layout.reorder(words, Packing.AWQ), expected)
    assert torch.equal(tables.expand_tables(scale).view(torch.uint8), entries.view(torch.uint8))


@pytest.fixture
def untried() -> Iterator[None]:
    """Forget whether Triton works, before and after."""
    devices._triton_works.cache_clear()
    yield
    devices._triton_works.cache_clear()


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("lacks", ["a C compiler", "Triton"])
def test_without_triton_torch_does_the_work(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine without a compiler, as container images are, still converts."""
    if lacks == "Triton":
        monkeypatch.setattr(devices, "find_spec", lambda _name: None)
    else:

        def failing() -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=failing))
        monkeypatch.setattr(devices, "import_module", lambda _name: SimpleNamespace(driver=driver))
    assert devices.kernels("repack", torch.device("cuda")) is None
    words = random_words(Packing.GPTQ, 16, 32)
    if DEVICE == "cuda":
        assert torch.equal(lut_layout.reorder(words, Packing.GPTQ), lut_layout.repack_reference(words, Packing.GPTQ))


@pytest.mark.usefixtures("untried")
def test_triton_works_where_there_is_a_gpu() -> None:
    """Kernels are found on a GPU, and are not looked for where no driver is."""
    found = devices.kernels("repack", torch.device("cuda"))
    assert found is (repack if DEVICE == "cuda" else None)


def test_every_device_has_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's on CUDA, whichever GPU it is; none on other devices."""
    monkeypatch.setattr(devices, "_triton_works", lambda: True)
    for name in ("repack", "requantize", "tables"):
        found = devices.kernels(name, torch.device("cuda:1"))
        assert found is importlib.import_module(f"convert_w4a8.kernels.{name}")
    assert devices.kernels("repack", torch.device("meta")) is None
