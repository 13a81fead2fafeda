"""The `quantization_config` block of a `w4a8_lut` checkpoint, as docs/reference/format.md specifies it. Needs no vLLM.

What the converter writes into it (`targets/lut.py`) is named here too, so that writer and reader cannot drift apart.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from convert_w4a8.errors import Problem
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.version import install_command

METHOD = "w4a8_lut"
"""`quant_method` in config.json."""


VERSION = 2
"""The newest version of the format, which is written only where it is needed: the one with patterns and `carried`."""

PATTERN = "re:"
"""What an entry of `ignore` begins with that is a regular expression, as in compressed-tensors."""


def version_for(ignore: Iterable[str], *, carried: bool) -> int:
    """Return the oldest version of the format that can hold these entries of `ignore`, and `carried` where it is."""
    return 2 if carried or any(entry.startswith(PATTERN) for entry in ignore) else 1


LAYOUT = "cutlass_sm90_16x32"
"""The one order of `weight_packed` that the kernel takes."""


class TableForm(StrEnum):
    """Which tensor holds a layer's FP8 tables."""

    SCALE = "scale"
    """`weight_scale` [K/128, N], expanded to eight entries per scale at load."""
    ENTRIES = "entries"
    """`weight_lut` [K/128, 8·N], the entries themselves."""


def refusal(subject: str, reason: str, remedy: str) -> ValueError:
    """Return the error for something that cannot be served, as one line.

    A ValueError, not a ConvertError: vLLM sends exceptions between its processes, and pydantic shows only these.
    """
    return ValueError(f"{METHOD}: {Problem(subject, reason, remedy)}")


def not_loaded(module: str) -> ValueError:
    """Return the error for a layer that the checkpoint names otherwise, or does not have."""
    return refusal(
        module,
        "the checkpoint has no weight_chan_scale for it, or under a name that vLLM does not look for",
        "convert the source again with the newest w4a8-convert",
    )


@dataclass(frozen=True)
class IgnoreList:
    """Modules that are not quantized: names, and patterns that begin with `re:` and match from the beginning of a name.

    They mean what they mean to vLLM's compressed-tensors (`should_ignore_layer`).

    Raises re.error for a pattern that is no regular expression.
    """

    entries: frozenset[str]

    def __post_init__(self) -> None:
        """Compile the patterns."""
        _ = self._patterns

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(
            re.compile(entry.removeprefix(PATTERN)) for entry in sorted(self.entries) if entry.startswith(PATTERN)
        )

    def __contains__(self, module: object) -> bool:
        """Whether an entry names a module, or matches its name."""
        return isinstance(module, str) and (
            module in self.entries or any(pattern.match(module) for pattern in self._patterns)
        )

    def count(self, module: str, parts: Sequence[str]) -> int:
        """Return how many parts of a fused module are ignored: all of them where the module itself is."""
        return len(parts) if module in self else sum(part in self for part in parts)

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> "IgnoreList":
        """Apply a renaming of tensors (`WeightsMapper.apply_list`) to the names; patterns are the model's already.

        Mappers are written for tensor names, and some of theirs end in a dot, so each module is renamed by way of its
        `.weight`. Modules that the mapper drops are dropped.
        """
        names = [entry for entry in self.entries if not entry.startswith(PATTERN)]
        tensors = rename([f"{name}.weight" for name in sorted(names)])
        return IgnoreList(self.entries - set(names) | {name.rpartition(".")[0] for name in tensors})


@dataclass(frozen=True)
class LutFormat:
    """What a reader needs to know of the block.

    ignore: the linear modules that are not quantized, by full names and by patterns.
    carried: a block of compressed-tensors whose config groups target the layers that vLLM serves by its own methods.
    Every other linear module is quantized.
    """

    tables: TableForm
    ignore: frozenset[str]
    carried: Mapping[str, Any] | None = None

    @cached_property
    def _ignored(self) -> IgnoreList:
        return IgnoreList(self.ignore)

    @classmethod
    def parse(cls, block: Mapping[str, Any]) -> "LutFormat":
        """Read the block; ValueError, in one line, where this version of the plugin cannot serve it."""
        version = block.get("version")
        if not isinstance(version, int) or version < 1:
            raise _refuse_field("version", version, f"an integer from 1 to {VERSION}")
        if version > VERSION:
            raise refusal(
                "quantization_config.version",
                f"the checkpoint has format version {version}, this plugin reads up to {VERSION}",
                f"upgrade it: {install_command()}",
            )
        for field, known in (("layout", LAYOUT), ("bits", 4), ("group_size", GROUP_SIZE)):
            if block.get(field) != known:
                raise _refuse_field(field, block.get(field), repr(known))
        tables = block.get("tables")
        if tables not in tuple(TableForm):
            raise _refuse_field("tables", tables, " or ".join(repr(str(known)) for known in TableForm))
        ignore = block.get("ignore") or []
        if not isinstance(ignore, list | tuple) or not all(isinstance(entry, str) for entry in ignore):
            raise _refuse_field("ignore", ignore, "a list of strings")
        carried = block.get("carried")
        if carried is not None and not (
            isinstance(carried, Mapping) and isinstance(carried.get("config_groups"), dict)
        ):
            raise _refuse_field("carried", carried, "a block of compressed-tensors")
        found = cls(TableForm(tables), frozenset(ignore), carried)
        try:
            _ = found._ignored
        except (re.error, RecursionError, OverflowError) as error:
            raise _refuse_field("ignore", str(error), "a regular expression") from error
        return found

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> "LutFormat":
        """Apply a renaming of tensors (`WeightsMapper.apply_list`) to `ignore`."""
        return replace(self, ignore=self._ignored.renamed(rename).entries)

    def is_ignored(self, module: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a linear module, perhaps a fused one, is not quantized.

        fused: vLLM's `packed_modules_mapping`, from the last part of a fused name to those of its shards.
        Raises ValueError where some shards of a fused module are quantized and others are not.
        """
        parent, _, leaf = module.rpartition(".")
        shards = [f"{parent}.{shard}" if parent else shard for shard in fused.get(leaf, [leaf])]
        return self._all_ignored(module, shards)

    def are_experts_ignored(self, module: str, experts: int, projections: Sequence[str]) -> bool:
        """Return whether the experts `MODULE.E.PROJECTION` of a MoE layer are not quantized; ValueError if mixed."""
        return self._all_ignored(
            module, [f"{module}.{expert}.{projection}" for expert in range(experts) for projection in projections]
        )

    def _all_ignored(self, module: str, parts: Sequence[str]) -> bool:
        count = self._ignored.count(module, parts)
        if 0 < count < len(parts):
            first = next(part for part in parts if part in self._ignored)
            raise refusal(
                module,
                f"{count} of the {len(parts)} layers that vLLM fuses here are unquantized (first: {first})",
                "convert it again with all or none of them quantized",
            )
        return count > 0


def _refuse_field(field: str, value: object, known: str) -> ValueError:
    return refusal(
        f"quantization_config.{field}",
        f"{value!r} is not {known}",
        f"convert the source checkpoint again, or upgrade the plugin: {install_command()}",
    )


TILE_N = 16
"""Output channels of one tile of the reordered layout (encoding/lut_layout.py)."""


TILE_K = 32
"""Input channels of one tile of it."""


def reordered_shape(n: int, k: int) -> tuple[int, int]:
    """Return the int32 shape (K/32, 4·N) of an [N, K] layer's reordered codes; ValueError where tiles do not fit."""
    for name, size, tile in (("N", n, TILE_N), ("K", k, TILE_K)):
        if size <= 0 or size % tile:
            raise ValueError(f"{name} = {size} is not a multiple of {tile}")
    return k // TILE_K, 4 * n


TABLE_BYTES = 8
"""The kernel's memory for one group's scale: a table of eight FP8 entries."""
