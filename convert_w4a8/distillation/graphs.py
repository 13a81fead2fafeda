"""A model's passes as CUDA graphs: thousands of small kernels, launched at once.

The kernels are those that would be launched one by one, so results are the same. Large models, whose kernels take
longer than launching them, are left as they are, and so are mixtures of experts, where the host looks at what the
router chose, and models that are spread over processes, which wait for each other.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from convert_w4a8.distillation.experts import LutExperts
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.distillation.student import logits_of
from convert_w4a8.experts import is_experts

MOST_WEIGHTS = 1 << 30
"""Of a model whose passes are captured."""
MOST_SHAPES = 4
"""That are captured; each keeps its logits and gradients."""
_OFTEN = 2
"""How often a shape of batches comes before it is captured."""
_WARM = 2
"""Passes before one is captured: kernels are compiled, and libraries allocate what they keep."""
_log = logging.getLogger(__name__)


class Passes:
    """The forward and backward passes of a model on one device, replayed where that is possible.

    parameters: those that get gradients; none for a model that is not trained.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[torch.Tensor], device: torch.device) -> None:
        self._model, self._parameters = model, parameters
        small = _weights(model) <= MOST_WEIGHTS
        has_experts = any(isinstance(module, LutExperts) or is_experts(module) for module in model.modules())
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
        self._most = MOST_SHAPES if small and device.type == "cuda" and not (has_experts or is_sharded) else 0
        self._seen: Counter[torch.Size] = Counter()
        self._captured: dict[torch.Size, _Captured] = {}
        self._pool: Any = None
        self._last: _Captured | None = None

    def forward(self, ids: torch.Tensor, *, counts: bool = True) -> torch.Tensor:
        """Return the logits bfloat16 [B, T, V] of token ids [B, T]. The next call may overwrite them.

        counts: whether the shape of ids comes as often as it is passed here; else it comes again for another reason.
        """
        self._last = self._find(ids) if counts else self._captured.get(ids.shape)
        if self._last is None:
            return logits_of(self._model, ids)
        return self._last.forward(ids)

    def backward(self) -> None:
        """Carry the gradient of the logits that `forward` returned on to the parameters, where autograd has not."""
        if self._last is not None:
            for parameter, gradient in zip(self._parameters, self._last.backward(), strict=True):
                parameter.grad = gradient

    def _find(self, ids: torch.Tensor) -> "_Captured | None":
        shape = ids.shape
        self._seen[shape] += 1
        if shape not in self._captured and self._seen[shape] >= _OFTEN and len(self._captured) < self._most:
            try:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._captured[shape] = _Captured(self._model, self._parameters, ids, self._pool)
            except RuntimeError as error:
                self._most, self._pool = 0, None
                self._captured.clear()  # what graphs keep may be what the steps lack now
                _log.warning("no CUDA graphs, so steps take longer: %s", str(error).partition("\n")[0])
        return self._captured.get(shape)


def _weights(model: nn.Module) -> int:
    """Return how many weights a model has. Those of a layer without latent ones are its codes, no parameter."""
    layers = [module for module in model.modules() if isinstance(module, LutLinear)]
    codes = sum(layer.codes.numel() for layer in layers if layer.weight is None)
    return codes + sum(parameter.numel() for parameter in model.parameters())


class _Captured:
    def __init__(self, model: nn.Module, parameters: Sequence[torch.Tensor], ids: torch.Tensor, pool: Any) -> None:
        self._ids = ids.clone()
        self._gradients: tuple[torch.Tensor | None, ...] = ()
        stream = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM):
                logits = logits_of(model, self._ids)
                if parameters:
                    torch.autograd.grad(logits, parameters, torch.zeros_like(logits), allow_unused=True)
                del logits
        torch.cuda.current_stream(ids.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, as NCCL's, which looks at what is sent, may ask the device for what they like meanwhile.
        captured = partial(torch.cuda.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with captured(self._forward):
            logits = logits_of(model, self._ids)
        self._logits = logits.detach().requires_grad_(bool(parameters))
        if parameters:
            self._upstream = torch.zeros_like(logits)
            with captured(self._backward):
                self._gradients = torch.autograd.grad(logits, parameters, self._upstream, allow_unused=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self._ids.copy_(ids, non_blocking=True)
        self._logits.grad = None
        self._forward.replay()
        return self._logits

    def backward(self) -> tuple[torch.Tensor | None, ...]:
        assert self._logits.grad is not None
        self._upstream.copy_(self._logits.grad)
        self._logits.grad = None
        self._backward.replay()
        return self._gradients
