"""The one operation of linear layers: what it promises torch.compile, and which kernel it takes."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import reference

gemm: Any = importlib.import_module("convert_w4a8.vllm_plugin.gemm")


def random_case(m: int, n: int = 128, k: int = 256) -> list[torch.Tensor]:
    packed = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32)
    tables = torch.randn(k // 128 * n * 8).mul(20).to(torch.float8_e4m3fn)
    return [*quantize_tokens(torch.randn(m, k).bfloat16()), packed, tables, torch.rand(n)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for both kernels, by the reference; the names of those that ran."""
    ran: list[str] = []

    def decode(tokens: Any, scale: Any, packed: Any, tables: Any, channel: Any) -> torch.Tensor:
        ran.append("decode")
        return reference.gemm(tokens, scale, packed, tables, channel)

    def cutlass(**given: Any) -> torch.Tensor:
        ran.append("cutlass")
        k, n = given["a"].shape[1], given["b_q"].shape[1]
        packed, tables = given["b_q"].view(k // 32, 4 * n), given["b_group_scales"].view(-1, n, 8)
        return reference.gemm(given["a"], given["a_token_scales"], packed, tables, given["b_channel_scales"])

    monkeypatch.setattr("convert_w4a8.kernels.gemm.gpu.gemm", decode)
    ops = SimpleNamespace(cutlass_w4a8_mm=cutlass)
    monkeypatch.setitem(importlib.import_module("sys").modules, "vllm", SimpleNamespace(_custom_ops=ops))
    monkeypatch.setattr(gemm, "decode_kernel", lambda _device: True)
    monkeypatch.setattr("convert_w4a8.vllm_plugin.compat.capability", lambda: (9, 0))
    gemm._cutlass_can.cache_clear()
    return ran


@pytest.mark.parametrize(("m", "expected"), [(1, "decode"), (64, "decode"), (256, "decode"), (257, "cutlass")])
def test_kernel_by_the_number_of_tokens(m: int, expected: str, kernels: list[str]) -> None:
    """Both are given the same layer in their own shapes, and give the same."""
    tokens, scale, packed, tables, channel = random_case(m)
    found = gemm.lut_gemm(tokens, scale, packed, tables, channel)
    assert kernels == [expected]
    k, n = tokens.shape[1], packed.shape[1]
    same = reference.gemm(tokens, scale, packed.view(k // 32, 4 * n), tables.view(-1, n, 8), channel)
    assert torch.equal(found, same)


@pytest.mark.parametrize(("capability", "n"), [((9, 0), 2112), ((9, 0), 48), ((8, 9), 128), ((10, 0), 128)])
def test_where_cutlass_cannot_go(
    capability: tuple[int, int], n: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other widths, other GPUs: our kernel takes every number of tokens, and is not asked whether it is faster."""
    monkeypatch.setattr("convert_w4a8.vllm_plugin.compat.capability", lambda: capability)
    for m in (1, 129, 300):
        gemm.lut_gemm(*random_case(m, n))
    assert kernels == ["decode"] * 3


def test_indices_reach_the_kernel_that_reads_them(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that for Hopper takes them; the others are given tables alone."""
    tokens, scale, packed, tables, channel = random_case(3)
    index, distinct = torch.zeros(2, 128, dtype=torch.uint8), tables[: 256 * 8].view(256, 8)
    seen: list[Any] = []

    def multiply(tokens: Any, scale: Any, packed: Any, tables: Any, channel: Any, *more: Any) -> torch.Tensor:
        seen.extend(more)
        return reference.gemm(tokens, scale, packed, tables, channel)

    plain = gemm.lut_gemm(tokens, scale, packed, tables, channel, index, distinct)
    assert kernels == ["decode"]
    hopper = SimpleNamespace(suits=lambda *_: True, gemm=multiply)
    monkeypatch.setattr(gemm, "_hopper", lambda _device: hopper)
    found = gemm.lut_gemm(tokens, scale, packed, tables, channel, index, distinct)
    assert torch.equal(found, plain)
    assert [given.data_ptr() for given in seen] == [index.data_ptr(), distinct.data_ptr()]
    assert gemm.reads_indices(torch.device("cuda"))
    x = torch.zeros(3, tokens.shape[1]).bfloat16()
    assert torch.equal(gemm.lut_linear(x, tokens, scale, packed, tables, channel, index, distinct), plain)
    assert len(seen) == 4


def test_wide_layers_change_earlier() -> None:
    """N = 28672: CUTLASS from 65 tokens on; N = 6144: from 129."""
    assert gemm.takes(64, 28672)
    assert not gemm.takes(65, 28672)
    assert gemm.takes(128, 6144)
    assert not gemm.takes(129, 6144)


def asked_three_times(caplog: pytest.LogCaptureFixture) -> str:
    """Ask for the kernel, which is not there; return the one warning."""
    gemm.decode_kernel.cache_clear()
    assert [gemm.decode_kernel(torch.device("cuda")) for _ in range(3)] == [False] * 3
    gemm.decode_kernel.cache_clear()
    (record,) = caplog.records
    return record.getMessage()


def test_without_triton_cutlass_runs_and_is_said_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning a process, whatever the number of layers."""
    monkeypatch.setattr("convert_w4a8.devices.why_not_compiled", lambda _device: "there is no C compiler")
    monkeypatch.setattr(gemm.compat, "batch_invariant", lambda: False)
    message = asked_three_times(caplog)
    assert "there is no C compiler" in message
    assert "CUTLASS" in message


def test_where_batches_may_not_matter_cutlass_runs_or_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Our kernel adds up in an order that depends on the number of tokens: with VLLM_BATCH_INVARIANT it is left out."""
    monkeypatch.setattr("convert_w4a8.devices.why_not_compiled", lambda _device: None)
    monkeypatch.setattr(gemm.compat, "batch_invariant", lambda: True)
    message = asked_three_times(caplog)
    assert "VLLM_BATCH_INVARIANT" in message
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT"):
        gemm.require_ours("layer", "CUTLASS cannot")


def test_the_variable_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A8_LUT_DECODE=cutlass, without a warning."""
    monkeypatch.setenv(gemm.SETTING, "cutlass")
    gemm.decode_kernel.cache_clear()
    assert not gemm.decode_kernel(torch.device("cuda"))
    gemm.decode_kernel.cache_clear()


def test_torch_knows_the_result_without_running_it(kernels: list[str]) -> None:
    """Shape and dtype, as torch compares them with a run."""
    case = random_case(3)
    torch.library.opcheck(gemm.lut_gemm, tuple(case), test_utils="test_faketensor")
    indices = (torch.zeros(2, 128, dtype=torch.uint8), case[3][: 256 * 8].view(256, 8))
    torch.library.opcheck(gemm.lut_gemm, (*case, *indices), test_utils="test_faketensor")
    assert kernels


def test_a_kernel_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Another Gluon than the one it is written in: one warning, and the Triton kernel."""
    hopper = pytest.importorskip("convert_w4a8.kernels.gemm.hopper", reason="Triton has no Gluon here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    def fail(_device: torch.device) -> None:
        raise TypeError("warpgroup_mma() got an unexpected keyword\nmore")

    monkeypatch.setattr(hopper, "probe", fail)
    gemm._hopper.cache_clear()
    assert [gemm._hopper(torch.device("cuda", 0)) for _ in range(2)] == [None, None]
    gemm._hopper.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "cannot be used (TypeError: warpgroup_mma() got an unexpected keyword): a slower one is"
    )
