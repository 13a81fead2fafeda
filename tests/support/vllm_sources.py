"""Unpacked vLLM sources (see scripts/fetch_vllm_wheels.py) for tests: where they are, and how to import parts of them.

vLLM cannot be imported without CUDA builds and a hundred packages. `isolated` imports the few modules that decide how
weights are loaded as they are, and puts stand-ins where they import the rest.
"""

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from convert_w4a8.encoding.lut_layout import restore
from convert_w4a8.encoding.tables import decode
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import Packing, W4A8Linear

VERSIONS = ("0.25.1", "0.33.0")
SOURCES = Path(os.environ.get("W4A8_VLLM_SOURCES", Path.home() / ".cache" / "w4a8-convert" / "vllm"))

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_CT = f"{_QUANTIZATION}.compressed_tensors"
_REAL = (
    "vllm.model_executor.custom_op",
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base",
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.quantization",
    "vllm.model_executor.layers.quantization.base_config",
    f"{_CT}.compressed_tensors",
    f"{_CT}.compressed_tensors_moe",
    f"{_CT}.compressed_tensors_moe.compressed_tensors_moe",
    f"{_CT}.utils",
    f"{_QUANTIZATION}.utils.config_utils",
    "vllm.model_executor.model_loader.reload.layerwise",
    "vllm.model_executor.model_loader.reload.meta",
    "vllm.model_executor.model_loader.reload.sanitize",
    "vllm.model_executor.model_loader.reload.types",
    "vllm.model_executor.model_loader.reload.utils",
    "vllm.model_executor.models.utils",
    "vllm.model_executor.parameter",
    "vllm.model_executor.utils",
)
"""Modules taken as vLLM has them; every other `vllm.*` is a stand-in."""


def sources(version: str) -> Path:
    """Return the directory that holds `vllm/` of a version; skips the test where it was not fetched."""
    directory = SOURCES / version
    if not (directory / "vllm" / "model_executor" / "parameter.py").is_file():
        pytest.skip(f"vLLM {version} is not in {SOURCES}: run scripts/fetch_vllm_wheels.py")
    return directory


class _Anything(type):
    """A class with any attribute, usable as base class, decorator, context and value."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__dict__.get("_is_stand_in"):
            return cls
        return super().__call__(*args, **kwargs)

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __bool__(cls) -> bool:
        return False


def _stand_in(name: str) -> Any:
    return _Anything(name, (), {"_is_stand_in": True})


class _StandInModule(types.ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 - never changed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        qualified = f"{self.__name__}.{name}"
        return importlib.import_module(qualified) if qualified in _REAL else _stand_in(name)


class _Finder(MetaPathFinder, Loader):
    """Finds `vllm.*`: the real file for `_REAL`, a stand-in for everything else."""

    def __init__(self, root: Path, overrides: dict[str, dict[str, Any]]) -> None:
        self.root = root
        self.overrides = overrides

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        if name.partition(".")[0] != "vllm":
            return None
        if name not in _REAL:
            return ModuleSpec(name, self, is_package=True)
        base = self.root.joinpath(*name.split("."))
        if base.is_dir():
            return importlib.util.spec_from_file_location(
                name, base / "__init__.py", submodule_search_locations=[str(base)]
            )
        return importlib.util.spec_from_file_location(name, base.with_suffix(".py"))

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _StandInModule(spec.name)
        vars(module).update(self.overrides.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave the stand-in as it was created."""


class Ranks:
    """The tensor-parallel group, and the GPU, that the isolated vLLM believes in; and how it pads hidden sizes."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.hidden_multiple = 1
        self.capability: tuple[int, int] | None = (9, 0)


class _QuantFP8:
    """Quantizes as vLLM's class does when it is asked for dynamic per-token scales."""

    def __init__(self, *, static: bool, group_shape: Any) -> None:  # noqa: ARG002
        assert not static

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_tokens(x)


class _Capability(tuple[int, int]):
    """As vLLM's `DeviceCapability`."""

    __slots__ = ()

    def to_int(self) -> int:
        return self[0] * 10 + self[1]


class _Scheme:
    """Keeps what a scheme of compressed-tensors is made of."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)

    @classmethod
    def get_min_capability(cls) -> int:
        return 75


class _Embedding(torch.nn.Module):
    """As vLLM's `VocabParallelEmbedding`, of which its `ParallelLMHead` is one."""


def _subclass(name: str, base: type) -> type:
    return type(name, (base,), {})


class _CutlassExperts:
    """Keeps what it is made of."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    @staticmethod
    def is_supported_config(cls: type, *args: Any) -> tuple[bool, str | None]:  # noqa: ARG004, PLW0211
        return True, None


class _Ops:
    """The CUDA ops, from what they take to what they mean."""

    @staticmethod
    def cutlass_w4a8_mm(
        *,
        a: torch.Tensor,
        b_q: torch.Tensor,
        b_group_scales: torch.Tensor,
        b_group_size: int,
        a_token_scales: torch.Tensor,
        b_channel_scales: torch.Tensor,
    ) -> torch.Tensor:
        # The op reads its arguments' memory as these dtypes without looking at what they are.
        assert (a.dtype, b_q.dtype, b_group_scales.dtype) == (torch.float8_e4m3fn, torch.int32, torch.float8_e4m3fn)
        assert (a_token_scales.dtype, b_channel_scales.dtype) == (torch.float32, torch.float32)
        k, n = a.shape[1], b_q.shape[1]
        assert (b_q.shape[0] * 8, b_group_size) == (k, 128)
        codes = restore(b_q.view(k // 32, 4 * n))
        layer = W4A8Linear(codes, Packing.PACK_QUANTIZED, None, b_group_scales.view(k // 128, n, 8), b_channel_scales)
        return (a_token_scales * (a.float() @ decode(layer).t())).bfloat16()

    @staticmethod
    def cutlass_encode_and_reorder_int4b_grouped(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, n, k = b.shape[0], b.shape[1], b.shape[2] * 8
        return b, torch.tensor([[n // 16, k // 32, 32 * n]], dtype=torch.int32).repeat(experts, 1)


@contextmanager
def isolated(version: str) -> Iterator[Ranks]:
    """Import vLLM's loading code of a version in isolation; on leaving, forget it and our modules that import it."""
    root = sources(version)
    ranks = Ranks()

    def divide(size: int, parts: int) -> int:
        assert size % parts == 0
        return size // parts

    device = types.SimpleNamespace(
        get_device_capability=lambda: None if ranks.capability is None else _Capability(ranks.capability),
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        use_sync_weight_loader=lambda: False,
        is_cpu=lambda: False,
        supported_quantization=[],
    )
    overrides: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version, "_custom_ops": _Ops},
        "vllm.distributed": {
            "divide": divide,
            "get_tensor_model_parallel_rank": lambda: ranks.rank,
            "get_tensor_model_parallel_world_size": lambda: ranks.size,
        },
        "vllm.platforms": {"current_platform": device},
        "vllm.distributed.eplb.eplb_state": {
            "EplbState": types.SimpleNamespace(
                build_initial_global_physical_to_logical_map=lambda experts, _redundant: list(range(experts))
            )
        },
        f"{_FUSED_MOE}.all2all_utils": {
            "maybe_roundup_layer_hidden_size": lambda hidden, *_: (
                -(-hidden // ranks.hidden_multiple) * ranks.hidden_multiple
            )
        },
        f"{_FUSED_MOE}.modular_kernel": {
            "FusedMoEKernel": lambda _prepare_finalize, experts: types.SimpleNamespace(experts=experts)
        },
        f"{_FUSED_MOE}.config": {"int4_w4afp8_moe_quant_config": types.SimpleNamespace},
        f"{_FUSED_MOE}.experts.cutlass_moe": {"CutlassExpertsW4A8Fp8": _CutlassExperts},
        f"{_QUANTIZATION}.input_quant_fp8": {"QuantFP8": _QuantFP8},
        f"{_CT}.schemes": {
            name: _subclass(name, _Scheme)
            for name in ("CompressedTensorsW4A8Fp8", "CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8")
        },
        f"{_CT}.transform.linear": {"get_linear_transform_schemes": lambda *_: ({}, {})},
        "vllm.model_executor.layers.vocab_parallel_embedding": {
            "VocabParallelEmbedding": _Embedding,
            "ParallelLMHead": _subclass("ParallelLMHead", _Embedding),
        },
    }
    finder = _Finder(root, overrides)

    def forget() -> None:
        ours = ("carried", "config", "linear", "moe")
        for name in list(sys.modules):
            if name.partition(".")[0] == "vllm" or name in {f"convert_w4a8.vllm_plugin.{part}" for part in ours}:
                del sys.modules[name]

    forget()
    sys.meta_path.insert(0, finder)
    try:
        _join_fused_moe()
        yield ranks
    finally:
        sys.meta_path.remove(finder)
        forget()


@contextmanager
def loading(version: str) -> Iterator[Ranks]:
    """Do as `isolated`, with the model's default dtype, as it is while vLLM makes, loads and processes layers."""
    with isolated(version) as ranks:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield ranks
        finally:
            torch.set_default_dtype(torch.float32)


def _join_fused_moe() -> None:
    """Let the stand-in for the package `fused_moe` export the real classes, as its `__init__` does."""
    base = importlib.import_module(f"{_FUSED_MOE}.fused_moe_method_base")
    package = importlib.import_module(_FUSED_MOE)
    unquantized = importlib.import_module(f"{_FUSED_MOE}.unquantized_fused_moe_method")
    vars(package)["FusedMoEMethodBase"] = base.FusedMoEMethodBase
    concrete = dict.fromkeys(base.FusedMoEMethodBase.__abstractmethods__)
    method = type("UnquantizedFusedMoEMethod", (base.FusedMoEMethodBase,), concrete)
    vars(package)["UnquantizedFusedMoEMethod"] = vars(unquantized)["UnquantizedFusedMoEMethod"] = method
    routed = importlib.import_module(f"{_FUSED_MOE}.routed_experts")
    for name in ("RoutedExperts", "FusedMoeWeightScaleSupported"):
        vars(package)[name] = getattr(routed, name)
