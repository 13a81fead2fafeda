"""What the user can choose about `w4a8 quantize`. Imports nothing heavy: the command line starts with it."""

from dataclasses import dataclass
from enum import StrEnum

from convert_w4a8.options import Options, ScalesMode, Unsupported
from convert_w4a8.targets import W4A16


class Preset(StrEnum):
    """How much work goes into codes and tables, where there is calibration data."""

    FAST = "fast"
    """Tables and nearest codes, by the energies of the inputs."""
    FULL = "full"
    """Error feedback, then coordinate descent, by the second moments of the inputs; block by block."""


class TableKind(StrEnum):
    """What a group of 128 weights may multiply by."""

    FREE = "free"
    """Eight FP8 entries of its own."""
    SCALE = "scale"
    """One scale: the entries are its multiples."""


@dataclass(frozen=True)
class QuantizeOptions(Options):
    """What the user chose; see `w4a8 quantize --help`.

    format: also `targets.W4A16`, whose tables are always of scales.
    data: a digest of the calibration data, which is part of what an output depends on; empty without data.
    alpha: how far the target of a layer is moved from its own weights towards those that give the original model's
        outputs from the quantized model's inputs, 0 … 1.
    awq_scaling: whether input channels are scaled as AWQ does; None: where that was measured to help, which is with
        tables of scales and without error feedback.
    damping: added to the diagonal of second moments, as a part of its mean.
    """

    unsupported: Unsupported = Unsupported.DEQUANTIZE
    tables: TableKind = TableKind.FREE
    preset: Preset = Preset.FULL
    data: str = ""
    alpha: float = 0.5
    damping: float = 0.05
    awq_scaling: bool | None = None

    @property
    def is_w4a16(self) -> bool:
        """Whether activations stay in 16 bits."""
        return self.format == W4A16

    @property
    def scales_inputs(self) -> bool:
        """Whether input channels are scaled, where there is data."""
        if self.awq_scaling is not None:
            return self.awq_scaling
        return self.tables is TableKind.SCALE and self.preset is Preset.FAST

    def __post_init__(self) -> None:
        """Take the values of choices as strings too. Raises ValueError for a choice that there is not."""
        object.__setattr__(self, "tables", TableKind.SCALE if self.is_w4a16 else TableKind(self.tables))
        object.__setattr__(self, "preset", Preset(self.preset))
        is_free = self.tables is TableKind.FREE
        object.__setattr__(self, "scales", ScalesMode.DIRECT if is_free else ScalesMode.SEARCH)
        super().__post_init__()
