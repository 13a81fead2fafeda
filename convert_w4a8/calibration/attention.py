"""Attention whose memory is linear in the length of a sample, in the place of what transformers calls `sdpa`.

Plain causal attention is torch's fused kernel, which holds no scores. Of everything else (sliding windows, chunks, soft
caps, values that are not as wide as keys) transformers would make a mask of T × T first, and torch scores of as many
for every head. Here masks stay functions until attention runs, some rows of queries at a time, and where a row looks
no farther back than a window, over the keys of that window alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

SCORES = 1 << 24
"""Scores, of all heads, that are made at a time."""
_ROWS = 1024
"""Rows of queries at a time, at most."""
_MORE = ("s_aux", "position_bias")
"""What some models hand to their attention besides; these are computed by transformers."""


@dataclass(frozen=True, eq=False)
class RowMask:
    """A mask bool [B, 1, T, S] that is made some rows at a time.

    A model that does something else with it than `attend` does gets all of it, as transformers would make it.

    function: whether a query sees a key, of the numbers (sample, head, query, key), as transformers makes it.
    local: how far back a query looks at most, itself included; None for all keys.
    is_indexed: the function takes tensors of numbers; otherwise single numbers.
    """

    function: Callable[..., torch.Tensor]
    batch: int
    queries: int
    keys: int
    local: int | None
    is_indexed: bool
    device: torch.device

    def rows(self, start: int, end: int) -> tuple[int, torch.Tensor]:
        """Return of the rows [start, end) the first key, and which keys they see from there: [B, 1, rows, keys]."""
        first = 0 if self.local is None else max(0, start - self.local + 1)
        return first, self._part(range(start, end), range(first, self.keys if self.local is None else end))

    def whole(self) -> torch.Tensor:
        """Return all of it."""
        return self._part(range(self.queries), range(self.keys))

    def _part(self, queries: range, keys: range) -> torch.Tensor:
        numbers = (range(self.batch), range(1), queries, keys)
        sample, head, query, key = (torch.arange(r.start, r.stop, device=self.device) for r in numbers)
        if self.is_indexed:
            seen: torch.Tensor = self.function(sample[:, None, None, None], head[:, None, None], query[:, None], key)
            return seen.expand(self.batch, 1, len(queries), len(keys))
        function: Callable[..., Any] = self.function
        for place in (3, 2, 1, 0):
            function = torch.vmap(function, in_dims=tuple(0 if n == place else None for n in range(4)))
        found: torch.Tensor = function(sample, head, query, key)
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give all of the mask to an operation of torch."""
        named = {name: _whole(value) for name, value in (kwargs or {}).items()}
        return func(*map(_whole, args), **named)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of all of the mask."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Any:
        """Return a part of it."""
        return self.whole()[index]

    def __invert__(self) -> torch.Tensor:
        """Return which keys are not seen."""
        return ~self.whole()

    def __and__(self, other: Any) -> torch.Tensor:
        """Combine it with another mask."""
        found: torch.Tensor = self.whole() & _whole(other)
        return found

    def __or__(self, other: Any) -> torch.Tensor:
        """Combine it with another mask."""
        found: torch.Tensor = self.whole() | _whole(other)
        return found


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, RowMask) else value


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_others: Any,
) -> RowMask | None:
    """Return a mask as transformers asks for it, None where it is plain causal.

    Queries and keys are the tokens of the same samples: there are neither padding nor a cache in calibration.
    """
    assert attention_mask is None
    assert q_length == kv_length
    if allow_is_causal_skip and (local_size is None or kv_length <= local_size):
        return None
    local = local_size if allow_is_causal_skip else None
    return RowMask(mask_function, batch_size, q_length, kv_length, local, not use_vmap, torch.device(device))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: RowMask | torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return what queries [B, heads, T, D] take from keys [B, groups, S, D] and values [B, groups, S, E].

    The result is [B, T, heads, E]. The arguments are those of transformers' attention functions.
    """
    if any(others.get(name) is not None for name in _MORE):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: PLC0415

        whole = _whole(attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, whole, scaling=scaling, is_causal=is_causal, softcap=softcap, **others
        )
    heads, length = query.shape[1:3]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x for x in (key, value))
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None and softcap is None and query.shape == key.shape == value.shape:
        found = scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=bool(causal) and length > 1)
        return found.transpose(1, 2).contiguous(), None
    found = query.new_empty(*query.shape[:3], value.shape[-1])
    keys = key.shape[2]
    local = attention_mask.local if isinstance(attention_mask, RowMask) else None
    width = keys if local is None else min(keys, 2 * local)
    step = length
    if query.shape[0] * heads * length * keys > SCORES:
        step = max(1, min(_ROWS, width, SCORES // (query.shape[0] * heads * width)))
    for start in range(0, length, step):
        end = min(start + step, length)
        first, seen = _seen(attention_mask, start, end, keys, causal=bool(causal), device=query.device)
        last = keys if seen is None else first + seen.shape[-1]
        part = query[:, :, start:end], key[:, :, first:last], value[:, :, first:last]
        found[:, :, start:end] = _weighted(*part, seen, scaling, softcap)
    return found.transpose(1, 2).contiguous(), None


def _seen(
    mask: RowMask | torch.Tensor | None, start: int, end: int, keys: int, *, causal: bool, device: torch.device
) -> tuple[int, torch.Tensor | None]:
    """Return the first key that the rows [start, end) may see, and from there a mask; None where they see all."""
    if isinstance(mask, RowMask):
        return mask.rows(start, end)
    if mask is not None:
        return 0, mask[:, :, start:end, :keys]
    if not causal:
        return 0, None
    return 0, torch.arange(end, device=device) <= torch.arange(start, end, device=device)[:, None]


def _weighted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return the values of keys, weighted for some rows. seen: bool, or what is added to scores."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if seen is not None and seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, float("-inf"))
    elif seen is not None:
        scores = scores + seen
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


@contextmanager
def linear_memory() -> Iterator[None]:
    """Let models of transformers with `attn_implementation="sdpa"` compute their attention here."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: PLC0415  (it takes seconds)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415

    ours: tuple[tuple[Any, Any], ...] = ((ALL_ATTENTION_FUNCTIONS, attend), (ALL_MASK_ATTENTION_FUNCTIONS, make_mask))
    before = [interface["sdpa"] for interface, _ in ours]
    for interface, function in ours:
        interface["sdpa"] = function
    try:
        yield
    finally:
        for (interface, _), function in zip(ours, before, strict=True):
            interface["sdpa"] = function
