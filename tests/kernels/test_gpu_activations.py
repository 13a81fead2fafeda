"""Quantization of activations, alone and with norms and SwiGLU: against torch, and exact where it claims to be."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.activations import reference

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.activations.gpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATIONS = ("quantize", "silu_quantize", "norm_quantize", "add_norm_quantize")


def arguments(operation: str, m: int, k: int, seed: int = 0) -> list[Any]:
    """Return random arguments: channels of different sizes, one far beyond the others."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * k if operation == "silu_quantize" else k
    x = torch.randn(m, width, generator=generator) * torch.randn(width, generator=generator).exp()
    x[:, 3] *= 100
    weight, residual = torch.randn(k, generator=generator).bfloat16(), torch.randn(m, k, generator=generator).bfloat16()
    found: list[Any] = [x.bfloat16()]
    found += [residual] if operation == "add_norm_quantize" else []
    return [*found, weight, 1e-5] if "norm" in operation else found


def run(operation: str, given: list[Any], terms: int) -> tuple[torch.Tensor, ...]:
    on_device = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in given]
    return tuple(value.cpu() for value in getattr(KERNELS, operation)(*on_device, terms))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("terms", [1, 2])
@given(m=st.integers(0, 5), k=st.integers(1, 5).map(lambda groups: 128 * groups), seed=st.integers(0, 99))
def test_operations_are_those_of_torch(operation: str, terms: int, m: int, k: int, seed: int) -> None:
    """Bit for bit, but where a sum over channels in another order moves a value to the other side of a rounding."""
    given = arguments(operation, m, k, seed)
    found, expected = run(operation, given, terms), getattr(reference, operation)(*given, terms)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if ours.numel():
            different = (ours.float() != theirs.float()).float().mean()
            assert different <= (0.02 if "norm" in operation or "silu" in operation else 0)


def test_one_term_is_what_vllm_does() -> None:
    """The scale of `QuantFP8`, and its numbers but for the last bit of a division."""
    x = arguments("quantize", 7, 512)[0]
    tokens, scale = run("quantize", [x], 1)
    expected, expected_scale = quantize_tokens(x)
    assert torch.equal(scale, expected_scale)
    assert (tokens.float() != expected.float()).float().mean() < 0.01


def test_two_terms_hold_all_of_bfloat16() -> None:
    """Every significand, every exponent down to 2⁻¹³ of the largest: exactly; below, to 2⁻²¹ of the largest."""
    significands = torch.arange(128, 256).float()
    x = torch.cat([significands * 2.0**-e for e in range(30)]).repeat(2, 1)
    x[1] *= -(2.0**-9)
    tokens, scale = run("quantize", [x.bfloat16()], 2)
    assert torch.equal(x.bfloat16().float(), x)
    found = (tokens[:2].double() + tokens[2:].double() / reference.LOW_TERM) * scale.double()
    largest = x.double().abs().amax(1, keepdim=True)
    exact = x.double().abs() >= largest * 2.0**-13
    assert exact.sum() > 2 * 128 * 12
    assert torch.equal(found[exact], x.double()[exact])
    assert ((found - x.double()).abs() <= largest * 2.0**-21).all()


@pytest.mark.parametrize("terms", [1, 2])
def test_empty_rows_and_the_least_scale(terms: int) -> None:
    """Zeros stay zeros; their scale is vLLM's least, or the power of two above it."""
    tokens, scale = run("quantize", [torch.zeros(1, 128).bfloat16()], terms)
    assert not tokens.float().any()
    assert torch.equal(scale, torch.tensor([[reference.LEAST_SCALE if terms == 1 else 2.0**-17]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes by
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_with_nan_stays_one(operation: str) -> None:
    """Its scale is NaN, or numbers of it are; other rows are what they are without it."""
    given = arguments(operation, 3, 256)
    whole = run(operation, given, 1)
    given[0][1, 7] = float("nan")
    tokens, scale = run(operation, given, 1)[:2]
    assert scale[1].isnan()
    assert torch.equal(tokens.float()[::2], whole[0].float()[::2])
    assert torch.equal(scale[::2], whole[1][::2])
    if DEVICE == "cuda":  # the interpreter's own FP8 has no NaN
        assert tokens[1].float().isnan().any()
        assert run(operation, given, 2)[0][1::3].float().isnan().any(1).all()


def test_rows_may_lie_apart() -> None:
    """A part of the columns of a larger matrix."""
    wide = arguments("quantize", 3, 512)[0]
    found, expected = KERNELS.quantize(wide[:, 128:256].to(DEVICE), 1), reference.quantize(wide[:, 128:256])
    assert torch.equal(found[0].cpu().float(), expected[0].float())


def compiled(program: str) -> list[dict[str, str]]:
    """Return what a program of `tests/support` prints of kernels that it compiles without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "support" / program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [dict(part.split("=") for part in line.split()) for line in done.stdout.splitlines()]


def test_rows_in_clusters_compile_for_hopper() -> None:
    """Without a GPU: blocks meet when each knows its largest number, and leave when all have read; no spills."""
    lines = compiled("compile_activations.py")
    assert len(lines) == 4
    for counts in lines:
        assert (counts["UCGABAR_ARV"], counts["UCGABAR_WAIT"]) == ("2", "2")
        assert (counts["LDL"], counts["STL"]) == ("0", "0")
        assert (counts["ACQBULK"], counts["PREEXIT"]) == ("1", "1")


def test_decode_kernels_compile_for_hopper() -> None:
    """Without a GPU: lookups, FP8 products, no spills but where registers are few.

    Each waits for the kernel before, and lets the next begin.
    """
    lines = compiled("compile_hopper.py")
    assert len(lines) == 20
    for counts in lines:
        tiles = int(counts["TILES"])
        assert counts["HMMA"] == "0"
        most = 8 if int(counts["registers"]) else 0  # as measured: more blocks are worth a few
        assert int(counts["LDL"]) <= most
        assert int(counts["STL"]) <= most
        groups = int(counts["QGMMA"]) // (4 * tiles)  # as many as the loop and what follows it have
        assert groups >= 1
        assert 48 * tiles * groups <= int(counts["PRMT"]) <= 64 * tiles * groups
        assert counts["HAZARDS"] == "0"
        assert counts["MISALIGNED"] == "0"
        assert int(counts["ACQBULK"]) >= 1
        assert counts["PREEXIT"] == "1"
        assert int(counts["FENCE"]) >= 1  # Triton 3.7 has one of its own besides
        assert int(counts["UCGABAR_ARV"]) == int(int(counts["CLUSTER"]) > 0)
        assert (int(counts["STAS"]) > 0) == (int(counts["CLUSTER"]) > 0)
