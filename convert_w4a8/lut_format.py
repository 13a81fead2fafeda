"""The `quantization_config` block of a `w4a8_lut` checkpoint, as docs/reference/format.md specifies it. Needs no vLLM.

What the converter writes into it (`targets/lut.py`) is named here too, so that writer and reader cannot drift apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from convert_w4a8.errors import Problem
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.version import install_command

METHOD = "w4a8_lut"
"""`quant_method` in config.json."""


VERSION = 2
"""The newest version of the format that is read and written: the one with `carried`."""


PLAIN_VERSION = 1
"""The version that is written where nothing of a newer one is needed, so that older readers take it."""


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
class LutFormat:
    """What a reader needs to know of the block.

    ignore: full names of the linear modules that are not quantized.
    carried: a block of compressed-tensors whose config groups target the layers that vLLM serves by its own methods.
    Every other linear module is quantized.
    """

    tables: TableForm
    ignore: frozenset[str]
    carried: Mapping[str, Any] | None = None

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
        carried = block.get("carried")
        if carried is not None and not (
            isinstance(carried, Mapping) and isinstance(carried.get("config_groups"), dict)
        ):
            raise _refuse_field("carried", carried, "a block of compressed-tensors")
        return cls(TableForm(tables), frozenset(block.get("ignore") or ()), carried)

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> "LutFormat":
        """Apply a renaming of tensors (`WeightsMapper.apply_list`) to the module names.

        Mappers are written for tensor names, and some patterns end in a dot, so each module is renamed by way of its
        `.weight`. Modules that the mapper drops are dropped.
        """
        tensors = rename([f"{name}.weight" for name in sorted(self.ignore)])
        return replace(self, ignore=frozenset(name.rpartition(".")[0] for name in tensors))

    def is_ignored(self, module: str, fused: Mapping[str, Sequence[str]]) -> bool:
        """Return whether a linear module, perhaps a fused one, is not quantized.

        fused: vLLM's `packed_modules_mapping`, from the last part of a fused name to those of its shards.
        Raises ValueError where some shards of a fused module are quantized and others are not.
        """
        parent, _, leaf = module.rpartition(".")
        shards = [f"{parent}.{shard}" if parent else shard for shard in fused.get(leaf, [leaf])]
        return module in self.ignore or self._all_ignored(module, shards)

    def are_experts_ignored(self, module: str, experts: int, projections: Sequence[str]) -> bool:
        """Return whether the experts `MODULE.E.PROJECTION` of a MoE layer are not quantized; ValueError if mixed."""
        names = [f"{module}.{expert}.{projection}" for expert in range(experts) for projection in projections]
        return module in self.ignore or self._all_ignored(module, names)

    def _all_ignored(self, module: str, parts: Sequence[str]) -> bool:
        plain = [part for part in parts if part in self.ignore]
        if plain and len(plain) < len(parts):
            raise refusal(
                module,
                f"{len(plain)} of the {len(parts)} layers that vLLM fuses here are unquantized (first: {plain[0]})",
                "convert it again with all or none of them quantized",
            )
        return bool(plain)


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
