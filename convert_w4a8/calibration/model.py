"""A model of transformers of which only one decoder block's weights are in memory.

The model is made by transformers' own classes, with its parameters on the device `meta` and its buffers (rotary
frequencies) where they are used. Embeddings are loaded for the first hidden states, then one block after the other. No
code of the checkpoint is run, and nothing is unpickled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.attention import linear_memory
from convert_w4a8.calibration.names import find_tensor, is_stack, tensor_of
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CONFIG
from convert_w4a8.checkpoint.model_classes import transformers_for
from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Sample

_POSITIONS = frozenset({"embed_positions", "wpe", "position_embeddings", "pos_embed"})
"""What transformers calls tables of learned positions; beyond them there is none, where rotary ones go on."""
WITHOUT_DATA = "quantize it without --data"
_BESIDE = frozenset({
    *("attention_mask", "causal_mask", "position_embeddings", "position_ids", "cache_position"),
    *("position_embeddings_global", "position_embeddings_local"),
})  # fmt: skip
"""Tensors that a model hands to its blocks beside the hidden states, and that do not depend on the tokens."""


class _ReachedError(Exception):
    """Ends a forward pass at the first block."""


@dataclass(frozen=True)
class BlockCall:
    """What a model hands to one of its blocks beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Model:
    """A causal language model whose decoder blocks have no weights until they are loaded.

    above: what the blocks are in, in the checkpoint: `model.layers`. blocks: the modules.
    dtype: what it computes in. device: where.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._decoder = _decoder(_build(checkpoint, dtype))
        self.above = _above(checkpoint)
        self._list_name, self.blocks = _block_list(self._decoder, checkpoint)
        _move_buffers(self._decoder, device)
        self._load_outside()
        self._calls: tuple[tuple[int, int], list[BlockCall]] | None = None

    def check_length(self, sample: Sample) -> None:
        """Raise ConvertError where a sample has more tokens than the model has learned positions."""
        for name, module in self._decoder.named_modules():
            if isinstance(module, nn.Embedding) and _has_positions(name):
                most = module.num_embeddings - getattr(module, "offset", 0)
                if len(sample) > most:
                    reason = f"has {len(sample):,} tokens, and the model {most:,} positions"
                    raise ConvertError(sample.origin, reason, "cut it, or leave it out")

    def _load_outside(self) -> None:
        """Load what is not in a block: embeddings and norms."""
        parent = self.above.removesuffix(self._list_name)
        for name in [*self._decoder.state_dict()]:
            if not name.startswith(f"{self._list_name}."):
                info = self.checkpoint.tensors.get(f"{parent}{name}")
                if info is not None:
                    _set(self._decoder, name, read_tensor(info).to(self.device, self.dtype))

    def first_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [B, T, H] that the first block gets for tokens int64 [B, T]."""
        found: list[torch.Tensor] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _ReachedError

        with linear_memory(), _forward_of(self.blocks[:1], [catch]), suppress(_ReachedError):
            self._decoder(input_ids=tokens.to(self.device), use_cache=False)
        return found[0]

    def forget_embeddings(self) -> None:
        """Free the tables from which the first hidden states came, but positions, which are asked for again."""
        for name, module in self._decoder.named_modules():
            if isinstance(module, nn.Embedding) and not _has_positions(name):
                module.to("meta")

    def call(self, block: int, shape: tuple[int, int]) -> BlockCall:
        """Return how the model calls a block for (B, T) = shape tokens: masks and positions."""
        if self._calls is None or self._calls[0] != shape:
            self._calls = shape, self._capture(shape)
        return self._calls[1][block]

    def _capture(self, shape: tuple[int, int]) -> list[BlockCall]:
        calls: list[BlockCall] = []

        def catch(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs.pop("hidden_states")
            calls.append(BlockCall(args[1:], kwargs))
            return states

        config: Any = self._decoder.config
        states = torch.zeros(*shape, config.hidden_size, dtype=self.dtype, device=self.device)
        with linear_memory(), _forward_of(self.blocks, [catch] * len(self.blocks)):
            self._decoder(inputs_embeds=states, use_cache=False)
        if len(calls) != len(self.blocks):
            raise _not_walked(self.checkpoint, f"calls {len(calls)} of its {len(self.blocks)} blocks")
        for call in calls:
            odd = [name for name, value in call.kwargs.items() if _is_tensor(value) and name not in _BESIDE]
            if odd or any(map(_is_tensor, call.args)):
                raise _not_walked(self.checkpoint, f"hands more than hidden states to its blocks ({', '.join(odd)})")
        return calls

    def load_block(self, number: int) -> nn.Module:
        """Load the weights of a block and return it.

        Raises:
            ConvertError: the checkpoint has not all of them.

        """
        block = self.blocks[number]
        for name, stub in block.state_dict().items():
            found = find_tensor(self.checkpoint, f"{self.above}.{number}", name, tuple(stub.shape))
            if found is None:
                raise ConvertError(
                    f"{self.above}.{number}.{name}",
                    f"is a parameter of transformers' model {list(stub.shape)}, and not in the checkpoint",
                    WITHOUT_DATA,
                )
            self._put(block, name, found)
        return block.eval()

    def _put(self, block: nn.Module, name: str, found: torch.Tensor) -> None:
        """Set a parameter or buffer of a block: experts in one tensor, and what transformers keeps, in their dtype."""
        names = getattr(self._decoder, "_keep_in_fp32_modules_strict", None) or ()
        stays = found.dtype == torch.float32 and any(f".{part}." in f".{name}." for part in names)
        _set(block, name, found.to(self.device, found.dtype if stays or is_stack(name) else self.dtype))

    def load_again(self, number: int, checkpoint: Checkpoint) -> None:
        """Load what another checkpoint has of a block's parameters, under the same names and in the same shapes."""
        block = self.blocks[number]
        for name, stub in block.state_dict().items():
            if is_stack(name):  # None where the experts are quantized
                whole = find_tensor(checkpoint, f"{self.above}.{number}", name, tuple(stub.shape))
                if whole is not None:
                    self._put(block, name, whole)
                continue
            info = tensor_of(checkpoint, f"{self.above}.{number}", name)
            if info is not None and info.shape == tuple(stub.shape):
                self._put(block, name, read_tensor(info))

    def modules(self, number: int) -> set[str]:
        """Return all that has a weight in a block, by its name in the checkpoint; experts one by one."""
        names = (name for name in self.checkpoint.tensors if name.startswith(f"{self.above}.{number}."))
        return {name.removesuffix(".weight") for name in names}

    def free_block(self, number: int) -> None:
        """Free the weights of a block."""
        self.blocks[number].to("meta")


def hidden_states(output: Any) -> torch.Tensor:
    """Return the hidden states of what a block returns: of some models the first of several things."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _has_positions(name: str) -> bool:
    return name.rpartition(".")[2] in _POSITIONS


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _not_walked(checkpoint: Checkpoint, why: str) -> ConvertError:
    name = checkpoint.config.get("model_type")
    return ConvertError(f"{CONFIG}: model_type {name!r}", f"{why}, which calibration does not follow", WITHOUT_DATA)


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Make the model without weights."""
    with transformers_for(checkpoint, "--data", WITHOUT_DATA) as (transformers, config):
        names = config.architectures or []
        made = next((cls._from_config for name in names if (cls := getattr(transformers, name, None))), None)
        with _parameters_on_meta():
            build = made or transformers.AutoModelForCausalLM.from_config
            model: nn.Module = build(config, dtype=dtype, attn_implementation="sdpa")
        return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make modules with parameters on the device `meta`; buffers are real, as transformers computes them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _decoder(model: nn.Module) -> nn.Module:
    """Return the part of a model that takes tokens and has the blocks."""
    part: Any = model
    found = part.get_decoder() if hasattr(part, "get_decoder") else part.base_model
    assert isinstance(found, nn.Module)
    return found


def _above(checkpoint: Checkpoint) -> str:
    """Return what most decoder blocks of a checkpoint are in."""
    counts: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        if (found := block_of(name)) is not None:
            counts.setdefault(found[0], set()).add(found[1])
    if not counts:
        raise _not_walked(checkpoint, "has no decoder blocks with names that are known")
    return max(counts, key=lambda name: len(counts[name]))


def _block_list(decoder: nn.Module, checkpoint: Checkpoint) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks."""
    found = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and block_of(f"{name}.0.x") == (name, 0)
    ]
    if len(found) != 1:
        raise _not_walked(checkpoint, f"has {len(found)} lists of blocks")
    return found[0]


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():  # noqa: SLF001  (named_buffers leaves out shared ones)
            if buffer is not None and buffer.device.type != "meta":
                part._buffers[name] = buffer.to(device)  # noqa: SLF001


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or buffer of a module or one below it."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:  # noqa: SLF001
        owner._buffers[leaf] = value  # noqa: SLF001
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001


@contextmanager
def _forward_of(modules: Any, functions: list[Any]) -> Iterator[None]:
    """Let functions stand for the forward passes of modules."""
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module in modules:
            del module.forward
