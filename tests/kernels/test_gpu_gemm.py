"""The GEMM against its reference, vLLM's op and float64: interpreted without a GPU, compiled with one."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import GOLDEN_CUT, ROOT
from safetensors.torch import load_file

from convert_w4a8.encoding.tables import decode, expand_tables
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import reference, workspace
from convert_w4a8.linear import Packing, W4A8Linear

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.gemm.gpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = 2.0**-8 if DEVICE == "cuda" else 2.0**-7
"""What rounding to bfloat16 may change, relative to the result; Triton's interpreter cuts off instead."""


def random_case(m: int, n: int, k: int, seed: int = 0) -> list[torch.Tensor]:
    """Return tokens, their scales, codes, tables of entries of either sign, and channel scales."""
    generator = torch.Generator().manual_seed(seed)
    act = torch.randn(m, k, generator=generator).bfloat16()
    packed = torch.randint(-(2**31), 2**31, (k // 32, 4 * n), generator=generator).int()
    tables = torch.randn(k // 128, n, 8, generator=generator).mul(20).to(torch.float8_e4m3fn)
    return [*quantize_tokens(act), packed, tables, torch.rand(n, generator=generator)]


def run(case: list[torch.Tensor], launch: object = None) -> torch.Tensor:
    on_device = [tensor.to(DEVICE) for tensor in case]
    found: torch.Tensor = KERNELS.gemm_by(*on_device, launch) if launch else KERNELS.gemm(*on_device)
    return found.cpu()


def assert_right(case: list[torch.Tensor], found: torch.Tensor) -> None:
    """Compare with float64, by the size of the terms: they cancel each other."""
    tokens, token_scale, packed, tables, channel = case
    weights = reference.weights(packed, tables).double()
    exact = (tokens.double() @ weights.t()) * channel.double() * token_scale.double()
    terms = (tokens.double().abs() @ weights.abs().t()) * channel.double() * token_scale.double()
    slack = terms * 2.0**-11 if DEVICE == "cuda" else terms * 2.0**-20  # the tensor core's sums have about 14 bits
    assert ((found.double() - exact).abs() <= exact.abs() * BF16 + slack).all()


@pytest.mark.parametrize("case", ["gauss", "edge"])
@pytest.mark.parametrize("m", [1, 17, 64])
def test_products_are_those_of_vllm(case: str, m: int) -> None:
    """What `cutlass_w4a8_mm` wrote on an H200, within one rounding; nearly all of it to the byte."""
    vectors = load_file(GOLDEN_CUT)
    if f"{case}.m{m}.act" not in vectors:
        pytest.skip("not in the part of the vectors that is kept here")
    expected = vectors[f"{case}.m{m}.out"]
    n, k = vectors[f"{case}.weight_packed"].shape[0], vectors[f"{case}.weight_packed"].shape[1] * 8
    packed = vectors[f"{case}.lut_weight_bytes"].view(torch.int32).view(k // 32, 4 * n)
    tables = vectors[f"{case}.lut_scale_bytes"].view(torch.float8_e4m3fn).view(k // 128, n, 8)
    tokens, token_scale = quantize_tokens(vectors[f"{case}.m{m}.act"])
    found = run([tokens, token_scale, packed, tables, vectors[f"{case}.channel_scale"]])
    gap = (found.float() - expected.float()).abs()
    assert (gap <= expected.float().abs() * 2.0**-7 + expected.float().abs().max() * 2.0**-9).all()
    if DEVICE == "cuda":
        assert (gap == 0).float().mean() > 0.9


def test_every_code_and_every_byte_of_a_table() -> None:
    """All 16 codes on all 256 bytes of an entry, NaN apart: a single 1 picks each weight by itself."""
    byte = torch.arange(256, dtype=torch.uint8)
    byte[(byte & 0x7F) == 0x7F] = 0
    n, k = 256, 128
    tables = byte.view(n, 1).expand(n, 8).contiguous().view(torch.float8_e4m3fn).view(1, n, 8)
    packed = torch.arange(16, dtype=torch.int64).repeat(k // 32 * 4 * n // 2 // 8 * 8)
    packed = (packed.view(-1, 8) << (4 * torch.arange(8))).sum(1).to(torch.int32)[: k // 32 * 4 * n]
    packed = packed.view(k // 32, 4 * n)
    tokens = torch.eye(k).to(torch.float8_e4m3fn)
    case = [tokens, torch.ones(k, 1), packed, tables, torch.ones(n)]
    expected = reference.weights(packed, tables)
    assert len(set(expected.flatten().tolist())) > 200
    assert torch.equal(run(case).t().float(), expected)


@given(
    m=st.integers(1, 100),
    n=st.integers(1, 12).map(lambda tiles: 16 * tiles),
    k=st.integers(1, 9).map(lambda groups: 128 * groups),
    splits=st.integers(1, 5),
    chain=st.booleans(),
    block_n=st.sampled_from([64, 128]),
)
def test_any_size_however_it_is_cut(m: int, n: int, k: int, splits: int, chain: bool, block_n: int) -> None:
    """N of any number of tiles, K of any number of groups, more parts of K than groups."""
    case = random_case(m, n, k, seed=m + n + k)
    block_m = max(16, 1 << (m - 1).bit_length())
    launch = KERNELS.Launch(block_m, min(splits, k // 128), chain=chain, block_n=block_n)
    assert_right(case, run(case, launch))


@pytest.mark.parametrize(
    ("m", "n", "shared"),
    [
        *((m, n, KERNELS.HOPPER_SHARED) for m in (1, 17, 129, 300) for n in (16, 48, 16 * 67)),
        *((m, n, 99 * 1024) for m, n in ((1, 48), (100, 16 * 67), (300, 16 * 67))),
        (17, 2112, KERNELS.HOPPER_SHARED),
        (129, 2112, KERNELS.HOPPER_SHARED),
    ],
)
def test_every_number_of_tokens_and_of_tiles(m: int, n: int, shared: int) -> None:
    """As it comes: one block for all tokens or several rows of them; more blocks along N than run side by side."""
    case = random_case(m, n, 128, seed=m + n)
    assert_right(case, run(case, KERNELS.choose_launch(m, n, 128, 132, shared)))


@pytest.mark.parametrize("m", [17, 300])
def test_tables_of_group_scales(m: int) -> None:
    """The other form of tables: multiples of a group scale of either sign."""
    tokens, token_scale, packed, _, channel = random_case(m, 80, 384)
    scale = torch.randn(3, 80, generator=torch.Generator().manual_seed(m)).mul(20).clamp(-56, 56)
    case = [tokens, token_scale, packed, expand_tables(scale.to(torch.float8_e4m3fn)), channel]
    assert_right(case, run(case))


def test_results_do_not_depend_on_who_is_last() -> None:
    """Parts of K are added in order: the same bytes run after run, and counters are left as they were found."""
    case = random_case(5, 192, 1024)
    launch = KERNELS.Launch(16, 4)
    first = run(case, launch)
    for _ in range(3 if DEVICE == "cpu" else 200):
        assert torch.equal(run(case, launch), first)
    assert all(not counters.any() for counters in workspace._arrivals.values())


def test_the_reference_is_the_layout_and_the_tables() -> None:
    """Weights that this package decodes by other ways: restored codes, unpacked, looked up."""
    _, _, packed, tables, channel = random_case(1, 96, 512)
    from convert_w4a8.encoding.lut_layout import restore

    layer = W4A8Linear(restore(packed), Packing.PACK_QUANTIZED, None, tables, channel)
    assert torch.equal(reference.weights(packed, tables) * channel[:, None], decode(layer))


def test_no_tokens() -> None:
    """An empty batch gives an empty result."""
    tokens, token_scale, *layer = random_case(1, 16, 128)
    assert run([tokens[:0], token_scale[:0], *layer]).shape == (0, 16)


@given(
    m=st.integers(1, 5000),
    n=st.integers(1, 5000),
    k=st.integers(1, 400),
    sms=st.integers(1, 200),
    shared=st.sampled_from([99 * 1024, KERNELS.HOPPER_SHARED]),
)
def test_launches_are_possible(m: int, n: int, k: int, sms: int, shared: int) -> None:
    """Whatever the size: tokens fit, no part of K is empty, and what is copied ahead has a place."""
    launch = KERNELS.choose_launch(m, 16 * n, 128 * k, sms, shared)
    assert launch.block_m in (16, 32, 64, 128, 256)
    assert 1 <= launch.splits <= k
    assert launch.splits == 1 or (m <= launch.block_m and -(-16 * n // 64) * launch.splits <= 3 * sms)
    assert launch.stages * (128 * launch.block_m + 72 * KERNELS.BLOCK_N) <= shared


@pytest.mark.parametrize("capability", [89, 90, 100, 103, 120])
def test_kernel_compiles_to_lookups_and_fp8_products(capability: int) -> None:
    """For each kind of GPU, without one: weights reach the tensor core in FP8, by registers, and none is spilled."""
    program = ROOT / "tests" / "support" / "compile_gemm.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), str(capability), "16", "64", "128", "4096"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if capability == 103 and "nvdisasm" in done.stderr:
        pytest.skip("this Triton's disassembler does not know the compute capability 10.3")
    assert done.returncode == 0, done.stderr
    products = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 103: "UTCQMMA", 120: "QMMA"}[capability]
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        counts = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}
        assert counts[products] >= 4
        assert counts["HAZARDS"] == 0
        assert counts["HMMA"] == 0
        assert counts["PRMT"] >= 48
        assert counts["LDL"] == counts["STL"] == 0
        assert counts["shared"] <= counts["limit"]
