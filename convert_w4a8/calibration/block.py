"""One decoder block in two versions, the original and the quantized one: what their linear layers see.

A stage is a set of linear layers with one and the same input: q, k and v; o; gate and up; down. A block runs through
its own code up to a stage, where its inputs are taken. Inputs of layers that are quantized are rounded to FP8 by token,
as when they are served; for W4A16 they stay as they are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.attention import linear_memory
from convert_w4a8.calibration.experts import Rounding, Weights, check_experts, run_experts, stored_weights
from convert_w4a8.calibration.model import BlockCall, hidden_states
from convert_w4a8.calibration.moments import ROWS
from convert_w4a8.calibration.names import STACKS
from convert_w4a8.encoding.tables import decode
from convert_w4a8.experts import is_experts
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import ServedLinear


@dataclass(frozen=True)
class Stage:
    """Linear layers that share an input, by their names in the block; or the experts of a mixture, `is_experts`."""

    modules: tuple[str, ...]
    is_experts: bool = False


class _ReachedError(Exception):
    """Ends a pass at a stage."""


def round_tokens(x: torch.Tensor) -> torch.Tensor:
    """Round inputs [..., K] to FP8 by token as vLLM's kernel does, from BF16, `ROWS` at a time; the dtype stays."""
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    flat, result = x.flatten(0, -2), found.view(-1, x.shape[-1])
    for start in range(0, len(flat), ROWS):
        tokens, scale = quantize_tokens(flat[start : start + ROWS].bfloat16())
        result[start : start + ROWS] = tokens.float() * scale
    return found


def as_is(x: torch.Tensor) -> torch.Tensor:
    """Return inputs as they are, for layers with activations in 16 bits."""
    return x


class Block:
    """A loaded block, its original weights in place.

    label: what the checkpoint calls it. names: the modules that are to be quantized; projections of experts by the
        module that holds all of them.
    rounding: what quantized layers do to their inputs.
    quantized: the weights of those that are so far, in the dtype that is computed in. experts: the same of experts.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        dtype: torch.dtype,
        *,
        label: str,
        rounding: Rounding = round_tokens,
    ) -> None:
        self.module = module
        self.label = label
        self.dtype = dtype
        self.rounding = rounding
        self.quantized: dict[str, torch.Tensor] = {}
        self.experts: dict[str, Weights] = {}
        self._names = tuple(names)
        self._is_quantized = False
        self._stop: Stage | None = None
        self._seen: list[tuple[str, tuple[Any, ...]]] | None = None
        self._caught: tuple[torch.Tensor, ...] = ()
        self._hooks = []
        for name in self._names:
            part = module.get_submodule(name)
            self._hooks.append(part.register_forward_pre_hook(self._hook(name)))
            if is_experts(part):
                check_experts(f"{label}.{name}", part)
                part.forward = self._experts_forward(name, part)

    def take(self, layers: Mapping[str, ServedLinear]) -> None:
        """Take the weights of layers that are quantized already, by their names."""
        for name in self._names:
            part = self.module.get_submodule(name)
            if not is_experts(part):
                self.quantized[name] = decode(layers[name]).to(part.get_parameter("weight").device, self.dtype)
                continue
            stacks = self.stacks(name)
            for expert in range(len(stacks["down_proj"])):
                for stack, leaves in STACKS.items():
                    rows = stacks[stack][expert].chunk(len(leaves))
                    for leaf, row in zip(leaves, rows, strict=True):
                        row.copy_(decode(layers[f"{name}.{expert}.{leaf}"]))
            self.take_experts(name, stacks)

    def stacks(self, name: str) -> dict[str, torch.Tensor]:
        """Return tensors for the quantized weights of all experts of a module, bfloat16 [E, N, K] by parameter."""
        module = self.module.get_submodule(name)
        return {leaf: torch.empty_like(module.get_parameter(leaf), dtype=torch.bfloat16) for leaf in STACKS}

    def take_experts(self, name: str, stacks: Mapping[str, torch.Tensor]) -> None:
        """Take the quantized weights of all experts of a module, in `stacks`."""
        self.experts[name] = lambda expert: (
            stacks["gate_up_proj"][expert].to(self.dtype),
            stacks["down_proj"][expert].to(self.dtype),
        )

    def release(self) -> None:
        """Leave the module as it was made, but for its weights."""
        for hook in self._hooks:
            hook.remove()
        for name in self._names:
            vars(self.module.get_submodule(name)).pop("forward", None)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._seen is not None:
                self._seen.append((name, args))
            if self._stop is not None and name in self._stop.modules:
                self._caught = args
                raise _ReachedError
            if self._is_quantized and name in self.quantized:
                return (self.rounding(args[0]), *args[1:])
            return None

        return hook

    def _experts_forward(self, name: str, part: nn.Module) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, index: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
            weights = self.experts.get(name) if self._is_quantized else None
            if weights is not None:
                return run_experts(part, x, index, factors, weights, self.rounding)
            return run_experts(part, x, index, factors, stored_weights(part, self.dtype), as_is)

        return forward

    def stages(self, states: torch.Tensor, call: BlockCall) -> list[Stage]:
        """Return the stages in the order in which a pass comes to them; layers that it never calls are in none."""
        self._seen = []
        self._run(states, call, {})
        groups: dict[Any, list[str]] = {}
        for name, args in self._seen:  # whose tensors live until now, so that no two have the same place
            experts = is_experts(self.module.get_submodule(name))
            key = name if experts else (args[0].data_ptr(), args[0].numel())
            groups.setdefault(key, []).append(name)
        self._seen = None
        return [
            Stage(tuple(dict.fromkeys(names)), is_experts(self.module.get_submodule(names[0])))
            for names in groups.values()
        ]

    def inputs(
        self, states: torch.Tensor, call: BlockCall, stage: Stage, *, quantized: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return what the layers of a stage get, of experts also the router's choices, from the block's inputs."""
        self._stop, self._is_quantized = stage, quantized
        try:
            self._run(states, call, self.quantized if quantized else {})
        except _ReachedError:
            return self._caught
        finally:
            self._stop, self._is_quantized = None, False
        raise AssertionError(f"never came to {stage.modules[0]}")

    def all_inputs(self, states: torch.Tensor, call: BlockCall) -> dict[str, tuple[torch.Tensor, ...]]:
        """Return what every layer of the original block gets."""
        self._seen = []
        self._run(states, call, {})
        seen, self._seen = self._seen, None
        return dict(seen)

    def output(self, states: torch.Tensor, call: BlockCall, *, quantized: bool) -> torch.Tensor:
        """Return the block's output, bfloat16 or what is computed in, [B, T, H]."""
        self._is_quantized = quantized
        try:
            return self._run(states, call, self.quantized if quantized else {})
        finally:
            self._is_quantized = False

    def _run(self, states: torch.Tensor, call: BlockCall, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        with torch.inference_mode(), linear_memory():
            found = torch.func.functional_call(self.module, named, (states, *call.args), dict(call.kwargs))
        return hidden_states(found)
