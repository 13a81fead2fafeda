"""transformers' own models with the weights of any checkpoint, computed on any machine as vLLM's kernels would.

The weights of layers that can be quantized are in float32: exactly those that the checkpoint stands for, or, of a W4A8
checkpoint, those that the tensor core sees. Their products are summed in float32 and rounded to the model's dtype, as
the kernels write them. Where a layer's activations are FP8, its inputs are quantized per token first, as vLLM does.
Everything else is as transformers computes it, in the model's dtype.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from divergence import kind_of
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
from windows import load_windows

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import DenseLinear, W4Linear
from convert_w4a8.sources import find_source
from convert_w4a8.sources.carried import find_carried
from convert_w4a8.targets import find_target

Scheme = Callable[[W4Linear | DenseLinear], torch.Tensor]
"""The weights float32 [N, K] that a layer of a W4A16 checkpoint is to multiply by."""
_ROLES = ("weight_packed", "weight_scale", "weight_shape", "weight_lut", "weight_chan_scale")
"""What the tensors of a layer of our outputs are called."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    kind: as `divergence.kind_of` says.
    layers: module → weights float32 [N, K] of the quantized layers. rest: all other tensors, as they are stored.
    """

    config: Any
    kind: str
    layers: Mapping[str, torch.Tensor]
    rest: Mapping[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model is to be computed in: float16 where the configuration says so, else bfloat16."""
        return torch.float16 if self.config.dtype == torch.float16 else torch.bfloat16


def read_contents(directory: Path, scheme: Scheme = dequantize) -> Contents:
    """Read a checkpoint of any kind.

    Raises:
        ConvertError: it is of none that is known, or damaged.
        ValueError: it holds layers in FP8, which are not emulated.

    """
    checkpoint = open_checkpoint(directory)
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = kind_of(checkpoint.quantization_config)
    layers: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    if kind.startswith("W4A8"):
        target = find_target(checkpoint)
        layers = {name: decode(target.decode(checkpoint, name, read_tensor)) for name in target.find_layers(checkpoint)}
        used = {f"{name}.{role}" for name in layers for role in _ROLES}
    elif kind == "W4A16":
        source = find_source(checkpoint)
        if find_carried(source, checkpoint, []):
            raise ValueError(f"{directory}: layers in FP8 are not emulated")
        specs = source.find_layers(checkpoint, [])
        layers = {spec.name: scheme(source.read_layer(spec, read_tensor)) for spec in specs}
        used = {(part.whole or part).name for spec in specs for part in spec.parts.values()}
    rest = {name: read_tensor(info) for name, info in checkpoint.tensors.items() if name not in used}
    return Contents(config, kind, layers, rest)


def build_model(contents: Contents, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Return the model in `dtype`, with the layers that `Emulation` is for in float32.

    transformers loads it, and so puts the experts of a block together where its models hold them so.

    Raises:
        ValueError: tensors are missing, or transformers has no place for them.

    """
    contents.config._experts_implementation = "eager"  # noqa: SLF001  (the one that multiplies by F.linear)
    rounded = {name: tensor.to(dtype).float() for name, tensor in contents.rest.items()}
    weights = {f"{name}.weight": weight for name, weight in contents.layers.items()}
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(contents.config)]
    model, info = architecture.from_pretrained(
        None, config=contents.config, state_dict=rounded | weights, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(f"does not fit transformers' {type(model).__name__}: {wrong}")
    emulated = {id(weight) for weight in emulated_weights(model)}
    for parameter in model.parameters():
        if id(parameter) not in emulated:
            parameter.data = parameter.data.to(dtype)  # loses nothing: the values are of this dtype
    result: nn.Module = model.eval().to(device)
    return result


def emulated_weights(model: nn.Module) -> Iterable[torch.Tensor]:
    """Yield the weights of the layers that a conversion quantizes: linear layers of blocks and experts, not routers."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and "layers" in name.split(".") and leaf not in {"gate", "router"}:
            yield module.weight
        elif leaf == "experts":
            yield from (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3)


class Emulation(TorchFunctionMode):
    """While it is entered, linear layers of a model compute as this module's docstring says.

    fp8: whether the layers of `emulated_weights` quantize their inputs.
    """

    def __init__(self, model: nn.Module, *, fp8: bool) -> None:
        super().__init__()
        self._storages = {weight.untyped_storage().data_ptr() for weight in emulated_weights(model)} if fp8 else set()
        self._last: tuple[torch.Tensor, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `nn.functional.linear`; everything else is as it is."""
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        return self._linear(*args, **(kwargs or {}))

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.dtype == x.dtype:
            return nn.functional.linear(x, weight, bias)
        if weight.untyped_storage().data_ptr() in self._storages:
            tokens, scale = self._quantized(x)
            y = ((tokens @ weight.t()) * scale).view(*x.shape[:-1], -1).to(x.dtype)
        else:
            y = (x.float() @ weight.t()).to(x.dtype)
        return y if bias is None else y + bias

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E4M3 values in float32 [M, K] and token scales [M, 1]; layers in a row often have the same input."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:  # noqa: SLF001
            tokens, scale = quantize_tokens(x.flatten(0, -2))
            self._last = x, x._version, (tokens.float(), scale)  # noqa: SLF001
        return self._last[2]


def read_windows(directory: Path, text: Path, tokens: int, window: int) -> torch.Tensor:
    """Tokenize the beginning of a text (documents separated by NUL) into windows, int64 [W, window].

    text: or a .npy of windows of tokens, uint16 [n, T], of which the beginning is taken.
    """
    if text.suffix == ".npy":
        return torch.from_numpy(load_windows(text, window)[: max(1, tokens // window), :window].astype(np.int64))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = []
    for document in text.read_text().split("\0"):
        ids += tokenizer(document, add_special_tokens=False).input_ids
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // window
    return torch.tensor(ids[: count * window]).view(count, window)
