"""FP8 layers beside INT4 ones: carried over byte for byte, and served by vLLM's own FP8 methods.

`weight` float8_e4m3fn [N, K], and `weight_scale`: [N/rows, K/columns] for blocks, [N, 1] for output channels, [1] for
the tensor; `input_scale` [1] where activations are static. That is what vLLM's compressed-tensors reads
(`CompressedTensorsW8A8Fp8`, `CompressedTensorsW8A16Fp8`). DeepSeek calls the scales of blocks of 128×128
`weight_scale_inv`, by which weights are multiplied too; such layers are known by their tensors alone, beside INT4 of
whatever format. Other kinds of layers that are not INT4 are refused, in one line a kind.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.mixture import ConfigGroup
from convert_w4a8.checkpoint.names import is_expert, natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import TensorInfo
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.sources.base import Source
from convert_w4a8.sources.checks import check_rank_two, check_tensor, collect_parts, setting
from convert_w4a8.sources.config_groups import group_of

_SCALES = ("F16", "BF16", "F32")
_LOOKED_UP = re.compile(r"embed|wte|wpe")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_REQUANTIZE = "quantize it to 4 bits or to FP8, or leave it in 16"
_LEAVE = "leave it in 16 bits"
_OF_EXPERTS = {"tensor": "tensor", "channel": "token"}
"""Strategy of FP8 experts' weights → that of their activations (vLLM's `CompressedTensorsW8A8Fp8MoEMethod`)."""
INVERSE = "weight_scale_inv"
"""DeepSeek's name for the scales of blocks."""
_UNKNOWN = f"is FP8, and neither quantization_config nor a {INVERSE} says by what it is to be multiplied"
FP8_BLOCKS: Mapping[str, Any] = {
    "format": "float-quantized",
    "weights": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [128, 128],
        "dynamic": False,
    },
    "input_activations": {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": True,
    },
    "output_activations": None,
}
"""Layers of DeepSeek's kind as a config group of compressed-tensors."""


@dataclass(frozen=True)
class CarriedLayer:
    """One FP8 layer.

    scheme: its config group of compressed-tensors without targets, as the output has it.
    parts: role in the output → where that tensor lies.
    """

    name: str
    out_features: int
    in_features: int
    scheme: Mapping[str, Any]
    parts: Mapping[str, TensorInfo]

    @property
    def kind(self) -> str:
        """Say for people what is alike in layers of one scheme."""
        weights, activations = self.scheme["weights"], self.scheme.get("input_activations")
        strategy = weights["strategy"]
        scales = "block of " + "×".join(map(str, weights["block_structure"])) if strategy == "block" else strategy
        said = "16-bit" if not activations else "dynamic FP8" if activations.get("dynamic") else "static FP8"
        return f"FP8, a scale per {scales}, {said} activations"

    def outputs(self, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
        """Return the name of each of its tensors in the output, and what becomes it."""
        module = output_name(self.name, config)
        return {f"{module}.{role}": info for role, info in self.parts.items()}


def find_carried(source: Source, checkpoint: Checkpoint, problems: list[Problem]) -> tuple[CarriedLayer, ...]:
    """Return the layers of a checkpoint to be carried over; what can be neither converted nor carried is a problem.

    A source whose configuration describes such layers finds them by a function of this name that takes the rest. One
    with `DEQUANTIZES_FP8` carries none: it reads them.
    """
    if getattr(source, "DEQUANTIZES_FP8", False):
        return ()
    finder = getattr(source, "find_carried", None)
    found = [] if finder is None else list(finder(checkpoint, problems))
    refused: dict[tuple[str, str], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        module, _, role = name.rpartition(".")
        if not info.dtype.startswith("F8_") or len(info.shape) < 2:
            continue
        if role == "weight" and f"{module}.{INVERSE}" in checkpoint.tensors:
            try:
                found.append(describe(checkpoint, module, FP8_BLOCKS, (INVERSE,)))
            except ConvertError as error:
                refused.setdefault((error.problem.reason, error.problem.remedy), []).append(error.problem.subject)
        elif finder is None or f"{module}.weight_scale" not in checkpoint.tensors:
            refused.setdefault((_UNKNOWN, _REQUANTIZE), []).append(name)
    problems.extend(one_a_kind(refused))
    return tuple(found)


def carried_groups(layers: Iterable[CarriedLayer], config: Mapping[str, Any]) -> tuple[ConfigGroup, ...]:
    """Gather layers by scheme, in natural order, under their names in the output of a model with this config."""
    found: list[tuple[Mapping[str, Any], list[str]]] = []
    for layer in sorted(layers, key=lambda layer: natural_key(layer.name)):
        modules = next((modules for scheme, modules in found if scheme == layer.scheme), None)
        if modules is None:
            found.append((layer.scheme, modules := []))
        modules.append(output_name(layer.name, config))
    return tuple(ConfigGroup(scheme, tuple(modules)) for scheme, modules in found)


def find_by_groups(
    checkpoint: Checkpoint, config: Mapping[str, Any], problems: list[Problem]
) -> Iterable[CarriedLayer]:
    """Yield the layers that the config groups of a compressed-tensors block make FP8."""
    groups = config.get("config_groups")
    has_weights = [
        group
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(group.get("weights"), dict)
    ]
    if all(map(is_int4, has_weights)):
        return
    refused: dict[tuple[str, str], list[str]] = {}
    for module in checkpoint.modules_with("weight_scale"):
        with suppress(ConvertError):  # found again by those who look for INT4
            group = group_of(config, module)
            if is_int4(group):
                continue
            try:
                yield describe(checkpoint, module, _scheme(module, group, config.get("format")), ("weight_scale",))
            except ConvertError as error:
                problem = error.problem
                if problem.subject != module:
                    problems.append(problem)
                else:
                    refused.setdefault((problem.reason, problem.remedy), []).append(module)
    problems.extend(one_a_kind(refused))


def is_int4(group: Mapping[str, Any]) -> bool:
    """Whether the layers of a config group are to be read as INT4, be they or not."""
    weights = group["weights"]
    is_float = weights.get("type", "int") == "float"
    return weights.get("num_bits") not in (4, 8) or (weights.get("num_bits") == 4 and not is_float)


def one_a_kind(refused: Mapping[tuple[str, str], list[str]]) -> Iterable[Problem]:
    """Yield a problem for each (reason, remedy), which names the first of its layers and counts the others."""
    for (reason, remedy), names in refused.items():
        first = min(names, key=natural_key)
        yield Problem(first + (f" and {len(names) - 1} more" if len(names) > 1 else ""), reason, remedy)


def describe(checkpoint: Checkpoint, module: str, scheme: Mapping[str, Any], scales: tuple[str, ...]) -> CarriedLayer:
    """Check the tensors of one FP8 layer against its scheme, from headers alone.

    scales: what the source may call the scales of the weights.

    Raises:
        ConvertError: they are not those of the scheme, or vLLM does not serve such a layer in FP8.

    """
    leaf = module.rpartition(".")[2]
    if _LOOKED_UP.search(leaf):
        raise ConvertError(module, "vLLM does not serve embeddings in FP8", _LEAVE)
    if leaf in _ROUTERS:
        raise ConvertError(module, "vLLM does not serve routers in FP8", _LEAVE)
    if is_expert(module) and not scheme.get("input_activations"):
        raise ConvertError(module, "vLLM does not serve FP8 experts with 16-bit activations", _REQUANTIZE)
    if is_expert(module):
        _check_experts(module, scheme)
    found = collect_parts(checkpoint, module, ("weight", *scales, "input_scale"))
    if "weight" not in found:
        raise ConvertError(f"{module}.weight", "is missing", "download or write the checkpoint again")
    n, k = check_rank_two(found["weight"], "F8_E4M3")
    parts = {"weight": found["weight"]}
    scale = next(name for name in scales if name in found)
    parts["weight_scale"] = found[scale]
    match scheme["weights"]["strategy"]:
        case "block":
            rows, columns = scheme["weights"]["block_structure"]
            check_tensor(module, found, scale, _SCALES, (-(-n // rows), -(-k // columns)), "a scale for each block")
        case "channel":
            check_tensor(module, found, scale, _SCALES, (n, 1), "[N, 1]")
        case _:
            _check_one(found[scale])
    activations = scheme.get("input_activations")
    if activations and not activations.get("dynamic"):
        if "input_scale" not in found:
            raise ConvertError(f"{module}.input_scale", "is missing", "download or write the checkpoint again")
        _check_one(found["input_scale"])
    if "input_scale" in found:
        parts["input_scale"] = found["input_scale"]
    return CarriedLayer(module, n, k, scheme, parts)


def _check_experts(module: str, scheme: Mapping[str, Any]) -> None:
    strategy, activations = scheme["weights"]["strategy"], scheme["input_activations"].get("strategy") or "tensor"
    if activations != _OF_EXPERTS.get(strategy, activations):
        reason = f"vLLM does not serve FP8 experts with a scale per {strategy}, and activations per {activations}"
        raise ConvertError(module, reason, "quantize the experts of this layer to 4 bits, or with a scale per block")


def _check_one(info: TensorInfo) -> None:
    if info.dtype not in _SCALES or info.shape not in ((), (1,)):
        raise ConvertError(
            info.name,
            f"is {info.dtype} {list(info.shape)}, not {' or '.join(_SCALES)} [1]",
            "check that the configuration belongs to this checkpoint",
        )


def _scheme(module: str, group: Mapping[str, Any], form: object) -> dict[str, Any]:
    """Return a config group without its targets.

    Raises:
        ConvertError: vLLM serves no FP8 layers of such a group, or they are not FP8.

    """
    weights = group["weights"]
    name = f"{'FP' if weights.get('type') == 'float' else 'INT'}{weights.get('num_bits')}"
    if name != "FP8":
        raise ConvertError(module, f"{name} weights are neither converted nor carried over", _REQUANTIZE)
    activations = setting(group, "input_activations", dict, None, "config_groups")
    strategy = weights.get("strategy") or ("block" if weights.get("block_structure") else "tensor")
    blocks = weights.get("block_structure")
    if strategy not in ("block", "channel", "tensor"):
        raise ConvertError(module, f"FP8 weights of strategy {strategy!r} are not carried over", _REQUANTIZE)
    if strategy == "block" and not (
        isinstance(blocks, list) and len(blocks) == 2 and all(type(size) is int and size > 0 for size in blocks)
    ):
        raise ConvertError(module, f"block_structure {blocks!r} is not two sizes", "repair config_groups")
    if not weights.get("symmetric", True) or weights.get("dynamic"):
        raise ConvertError(module, "vLLM serves no FP8 weights that are asymmetric or dynamic", _REQUANTIZE)
    if activations and not _is_served(activations, strategy):
        raise ConvertError(
            module, "vLLM does not serve FP8 weights with these input_activations", "repair config_groups"
        )
    own = group.get("format")
    if own is None:
        own = form if form not in (None, "mixed-precision", "pack-quantized") else "float-quantized"
    if own not in ("float-quantized", "naive-quantized"):
        raise ConvertError(module, f"FP8 weights of format {own!r} are not carried over", _REQUANTIZE)
    rest = {key: value for key, value in group.items() if key != "targets"}
    return rest | {"format": own, "weights": {**weights, "strategy": strategy}}


def _is_served(activations: Mapping[str, Any], strategy: str) -> bool:
    """As vLLM's `_is_fp8_w8a8` and `CompressedTensorsW8A8Fp8` have it."""
    if activations.get("type") != "float" or activations.get("num_bits", 8) != 8:
        return False
    if activations.get("dynamic"):
        return True
    is_tensor = (activations.get("strategy") or "tensor") == "tensor"
    return strategy != "block" and is_tensor and bool(activations.get("symmetric", True))
