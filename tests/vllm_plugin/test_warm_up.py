"""What is compiled while a model is loaded: everything that any number of tokens needs later."""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
gemm: Any = importlib.import_module("convert_w4a8.vllm_plugin.gemm")
warm_up: Any = importlib.import_module("convert_w4a8.vllm_plugin.warm_up")
gpu: Any = importlib.import_module("convert_w4a8.kernels.gemm.gpu")
grouped: Any = importlib.import_module("convert_w4a8.kernels.gemm.grouped")
most_tokens: Any = importlib.import_module("convert_w4a8.vllm_plugin.experts").most_tokens
SMS = 132
try:
    hopper: Any = importlib.import_module("convert_w4a8.kernels.gemm.hopper")
    grouped_hopper: Any = importlib.import_module("convert_w4a8.kernels.gemm.grouped_hopper_kernel")
    grouped_many: Any = importlib.import_module("convert_w4a8.kernels.gemm.grouped_many_kernel")
except ImportError:  # Triton has no Gluon here
    hopper = None
Launched = set[tuple[Any, ...]]


class Recorder:
    """Stands in for a kernel; notes what Triton would compile it for."""

    def __init__(self, name: str, launched: Launched) -> None:
        self.name = name
        self.launched = launched

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            constants = {key: value for key, value in constants.items() if key != "expert_map"}
            dtypes = tuple(value.dtype for value in arguments if isinstance(value, torch.Tensor))
            self.launched.add((self.name, dtypes, tuple(sorted(constants.items()))))

        return launch

    def warmup(self, *arguments: Any, grid: object, **constants: Any) -> "Compiled":
        """Compile and do not launch, as for clusters."""
        self[grid](*arguments, **constants)
        return Compiled()


class Metadata(NamedTuple):
    """Bytes of shared memory."""

    shared: int


class Compiled:
    """Stands in for a compiled kernel."""

    packed_metadata = (4, 1, 0)
    metadata = Metadata(0)

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return lambda *_arguments: None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Return what kernels are launched with, on a GPU of 132 multiprocessors."""
    found: Launched = set()
    monkeypatch.setattr(gpu, "_gemm_kernel", Recorder("gemm", found))
    if hopper is not None:
        monkeypatch.setattr(hopper, "_gemm_kernel", Recorder("hopper", found))
        monkeypatch.setattr(grouped_hopper, "_grouped_kernel", Recorder("grouped_hopper", found))
        monkeypatch.setattr(grouped_many, "_grouped_kernel", Recorder("grouped_many", found))
        monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    for name in ("_prepare_kernel", "_grouped_kernel", "_activate_kernel", "_quantize_pairs_kernel", "_combine_kernel"):
        monkeypatch.setattr(grouped, name, Recorder(name, found))
    monkeypatch.setattr("convert_w4a8.kernels.gemm.workspace.multiprocessors", lambda _device: SMS)
    return found


SIZES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (2112, 7168), (48, 128), (256, 16384)]


@pytest.mark.parametrize(
    ("capability", "with_hopper", "indexed"),
    [((9, 0), False, False), ((8, 9), False, False)]
    + [((9, 0), True, indexed) for indexed in (False, True) if hopper is not None],
)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_no_product_needs_another_kernel(
    n: int,
    k: int,
    capability: tuple[int, int],
    with_hopper: bool,
    indexed: bool,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a layer, whatever the number of tokens: where CUTLASS cannot go, and where it can."""
    monkeypatch.setattr("convert_w4a8.vllm_plugin.compat.capability", lambda: capability)
    monkeypatch.setattr(gemm, "decode_kernel", lambda _device: True)
    monkeypatch.setattr(warm_up, "_seen", set())
    monkeypatch.setattr(warm_up, "_compiled", {})
    gemm._cutlass_can.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(_custom_ops=_no_ops()))
    monkeypatch.setattr(gemm, "_hopper", lambda _device: hopper if with_hopper else None)
    monkeypatch.setattr(gemm, "terms", lambda _device: 2 if with_hopper else 1)
    monkeypatch.setattr(warm_up.activations, "quantize", lambda *_: None)
    packed, tables = torch.empty(k // 8, n, dtype=torch.int32), torch.empty(k // 128 * n * 8, dtype=torch.float8_e4m3fn)
    weights = [packed, tables, torch.empty(n)]
    if indexed:
        weights += [torch.empty(k // 128, n, dtype=torch.uint8), torch.empty(256, 8, dtype=torch.float8_e4m3fn)]
    warm_up.linear(*weights)
    warm = set(launched)
    assert warm
    for m in [*range(1, 1100), 4096]:
        tokens = torch.empty(m * (2 if with_hopper and m <= 8 else 1), k, dtype=torch.float8_e4m3fn)
        gemm.gemm(tokens, torch.empty(m, 1), *weights)
    assert launched == warm
    assert ("hopper" in {name for name, *_ in launched}) == (with_hopper and n % 64 == 0)
    gemm._cutlass_can.cache_clear()


def _no_ops() -> Any:
    return SimpleNamespace(cutlass_w4a8_mm=lambda **_: torch.empty(0))


MIXTURES = [(128, 8, 2048, 768), (8, 2, 4096, 14336), (256, 8, 7168, 256), (16, 1, 640, 384), (64, 6, 2048, 1408)]


@pytest.mark.parametrize(("count", "choices", "hidden", "intermediate"), MIXTURES)
@pytest.mark.parametrize("here", [1, 2])
@pytest.mark.parametrize("with_hopper", [False] if hopper is None else [False, True])
def test_no_mixture_needs_another_kernel(
    count: int,
    choices: int,
    hidden: int,
    intermediate: int,
    here: int,
    with_hopper: bool,
    launched: Launched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all experts on this rank and with half of them: up to what is ours, and beyond."""
    monkeypatch.setattr(gemm, "_hopper", lambda _device: hopper if with_hopper else None)
    local = count // here
    expert_map = None if here == 1 else torch.zeros(count, dtype=torch.int32)
    weights: list[torch.Tensor] = []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        weights.append(torch.empty(local, n, k // 8, dtype=torch.int32))
        weights.append(torch.empty(local * k // 128 * n * 8, dtype=torch.float8_e4m3fn))
        weights.append(torch.empty(local, n))

    few: list[torch.Tensor | None] = [None] * 4
    if with_hopper:
        distinct = torch.empty(256, 8, dtype=torch.float8_e4m3fn)
        few[:2] = [torch.empty(local, hidden // 128, 2 * intermediate, dtype=torch.uint8), distinct]

    def run(m: int) -> None:
        x = torch.empty(m, hidden, dtype=torch.bfloat16)
        ids = torch.empty(m, choices, dtype=torch.int32)
        warm_up.lut_experts(x, torch.empty(m, choices), ids, *weights, expert_map, "silu", *few)

    for most in (most_tokens(choices, count), None):
        launched.clear()
        warm_up._seen.clear()
        warm_up.experts(choices, weights, expert_map, "silu", most, few)
        warm = set(launched)
        assert warm
        differ = grouped.most_pairs(local) // choices
        for m in range(1, most + 1) if most else [*range(1, differ + 50), 4 * differ]:
            run(m)
        assert launched == warm
        assert ("grouped_hopper" in {name for name, *_ in launched}) == with_hopper


def test_what_is_compiled_already_is_left_out() -> None:
    """Numbers of tokens that bring nothing new are not run."""
    compiled: set[Any] = {"a"}
    needed = {1: {"a"}, 2: {"a", "b"}, 3: {"b"}, 4: {"c", "b"}}
    assert warm_up.representatives(needed.__getitem__, 4, compiled) == [2, 4]
    assert compiled == {"a", "b", "c"}
