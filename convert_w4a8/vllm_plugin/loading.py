"""Which shards of a parameter vLLM's weight loader has filled: noted on the host, where asking costs nothing.

Only what is noted is known to be there. Parameters may also be filled without their weight loader (`--load-format
dummy`, a sharded state); only their contents show that, and to look at those is to wait for the device.

vLLM unbinds the bound methods of layers that it keeps for reloading (model_loader/reload/sanitize.py), lest they keep
the layers alive. So a loader that notes is a bound method of the layer too; another kind of loader is left alone.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

import torch

_NOTES = "w4a8_filled"
_WHOLE = None
"""What is noted where a loader is given no shard: it fills all of them."""


def noting_shards(loader: Callable[..., None]) -> Callable[..., None]:
    """Return a linear layer's weight loader that notes which shards (q, k, v; 0, 1, …) it has filled."""
    if not isinstance(loader, MethodType):
        return loader
    load = loader.__func__

    @wraps(load)
    def load_and_note(layer: object, param: Any, loaded_weight: torch.Tensor, *shard: Any, **named_shard: Any) -> None:
        load(layer, param, loaded_weight, *shard, **named_shard)
        (ids,) = (*shard, *named_shard.values()) or (_WHOLE,)
        _note(param, *(ids if isinstance(ids, tuple) else (ids,)))

    return MethodType(load_and_note, loader.__self__)


def noting_experts(loader: Callable[..., bool | None]) -> Callable[..., bool | None]:
    """Return a MoE layer's weight loader that notes which projections of which experts it has filled."""
    if not isinstance(loader, MethodType):
        return loader
    load = loader.__func__

    @wraps(load)
    def load_and_note(
        layer: object,
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        is_local = bool(load(layer, param, loaded_weight, weight_name, shard_id, expert_id, return_success=True))
        if is_local:  # not an expert of another rank
            _note(param, (shard_id, expert_id))
        return is_local if return_success else None

    return MethodType(load_and_note, loader.__self__)


def is_filled(param: Any, shards: int) -> bool:
    """Return whether weight loaders are known to have filled all shards of a parameter."""
    notes = getattr(param, _NOTES, ())
    return _WHOLE in notes or len(notes) == shards


def _note(param: Any, *shards: object) -> None:
    # vLLM reloads by way of parameters on the meta device, which it keeps: a note there would outlive that loading.
    if not param.is_meta:
        param.__dict__.setdefault(_NOTES, set()).update(shards)
