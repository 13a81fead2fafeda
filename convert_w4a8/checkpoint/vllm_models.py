"""What vLLM's model code does with a layer of a model: asked by a config.json and a module's name.

The tables are in `vllm_loaders.py` and `vllm_layers.py`; docs/reference/vllm-models.md shows them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from convert_w4a8.checkpoint.vllm_layers import MERGED, UNQUANTIZED
from convert_w4a8.checkpoint.vllm_loaders import KEPT, TOUCHED, Touched

_DEPTH = 4
"""Configurations lie in one another: thinker_config.text_config. Deeper ones are nobody's."""
_SETTINGS = frozenset(key for row in TOUCHED for key in row.settings)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class VllmModel:
    """What of a config.json tells how vLLM's code treats the model.

    names: all `architectures` and `model_type`, of the configurations in it too.
    ones: the settings with the value 1 that a row of the table asks for.
    hybrid_layers: how many layers Zamba2 counts before all others.
    """

    names: frozenset[str]
    ones: frozenset[str]
    hybrid_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "VllmModel":
        """Read a configuration; what is damaged in it tells nothing."""
        parts = list(_parts(config, _DEPTH))
        names = {name for part in parts for name in _names(part)}
        ones = frozenset(key for part in parts for key in _SETTINGS if part.get(key) == 1)
        hybrids = config.get("hybrid_layer_ids")
        return cls(frozenset(names), ones, len(hybrids) if isinstance(hybrids, list) else 0)

    def loader_row(self, module: str, target: str, *, split: bool = False) -> Touched | None:
        """Return the row of the table that says what vLLM's code does to a converted layer, the worst first.

        module: its name in the checkpoint. target: the name of an output format.
        split: ask for what is only wrong at tensor-parallel sizes above 1, instead.
        """
        return _loader_row(self, _shape(module), target, split)

    def kept_wrongly(self, module: str) -> str | None:
        """Return why a layer must not be written in BF16 as [N, K], or None where it may be."""
        return _kept_wrongly(self, _shape(module))

    def always_in_16_bits(self, module: str) -> bool:
        """Whether vLLM makes a layer without a quantization method, so that it can be served in BF16 only."""
        return _always_in_16_bits(self, _shape(module))

    @property
    def merged_with(self) -> Mapping[str, str]:
        """What vLLM merges beyond `names.merged_name`: end of a module's name → end of the merged one.

        Ends are parts of a dotted name; where several fit a module, the longest counts.
        """
        return _merged_with(self)

    def merged_in(self, module: str) -> str | None:
        """Return the name of the layer into which vLLM merges a module by `merged_with`; None where it does not."""
        end = _merged_end(self, _shape(module))
        return None if end is None else module.removesuffix(end) + self.merged_with[end]


def _parts(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those in it."""
    yield config
    if depth > 1:
        for value in config.values():
            if isinstance(value, Mapping):
                yield from _parts(value, depth - 1)


def _names(config: Mapping[str, Any]) -> Iterator[str]:
    architectures = config.get("architectures")
    if isinstance(architectures, list):
        yield from (name for name in architectures if isinstance(name, str))
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]


def _shape(module: str) -> str:
    """Return a module's name with the numbers of layers and experts replaced: what is told of one is told of all."""
    return _NUMBER.sub("0", module)


@lru_cache(maxsize=4096)
def _loader_row(model: VllmModel, module: str, target: str, split: bool) -> Touched | None:
    for row in TOUCHED:
        if row.models and not model.names.intersection(row.models):
            continue
        if row.settings and not model.ones.intersection(row.settings):
            continue
        if row.split is split and row.holds(module, target):
            return row
    return None


@lru_cache(maxsize=4096)
def _kept_wrongly(model: VllmModel, module: str) -> str | None:
    rows = (row for row in KEPT if model.names.intersection(row.models))
    return next((row.reason for row in rows if re.search(row.modules, module)), None)


@lru_cache(maxsize=4096)
def _always_in_16_bits(model: VllmModel, module: str) -> bool:
    rows = (row for row in UNQUANTIZED if not row.models or model.names.intersection(row.models))
    return any(re.search(row.modules, module) for row in rows)


@lru_cache(maxsize=64)
def _merged_with(model: VllmModel) -> Mapping[str, str]:
    ends: dict[str, str] = {}
    for row in MERGED:
        if not row.models or model.names.intersection(row.models):
            ends |= dict.fromkeys(row.shards, row.name)
    return ends


@lru_cache(maxsize=4096)
def _merged_end(model: VllmModel, module: str) -> str | None:
    parts = module.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in _merged_with(model)), None)
