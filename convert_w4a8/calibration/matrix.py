"""One weight matrix: its codes, and its tables or scales, by the room `codebooks`, and what that did to the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import Preset, QuantizeOptions, TableKind
from convert_w4a8.codebooks import (
    FAST,
    FULL,
    NO_DATA,
    Curvature,
    Method,
    Tables,
    curvature,
    mixed_target,
    quantize_matrices,
    quantize_matrix,
    w4a16,
)
from convert_w4a8.conversion.layer import Quantizer
from convert_w4a8.encoding.tables import decode
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import DenseLinear, ServedLinear, W4A8Linear, W4Linear
from convert_w4a8.quantization.layer import LayerStats
from convert_w4a8.targets import target_named

BYTES_PER_WEIGHT = 24
"""Memory that quantizing a matrix takes at most: weights, targets and results in float32, codes and tables."""


@dataclass(frozen=True)
class Inputs:
    """Moments of what a layer sees.

    second: the second moment, factored, or energies float32 [K]. cross: E[x x̂ᵀ] float32 [K, K], x being the original
        model's inputs.
    """

    second: Curvature | torch.Tensor
    cross: torch.Tensor | None = None


def inputs_of(name: str, moments: Moments, options: QuantizeOptions) -> Inputs:
    """Return moments as layers need them; a factorization serves all that share an input.

    Raises:
        ConvertError: the inputs are not finite.

    """
    second, cross = moments.mean()
    if not bool(torch.isfinite(second.sum(dtype=torch.float64))):
        raise ConvertError(
            name, "gets inputs that are not finite from this data", "check the weights of the blocks before it"
        )
    return Inputs(second if moments.energies else curvature(second, options.damping), cross)


def method_of(options: QuantizeOptions, *, data: bool) -> Method:
    """Return how codes and tables are chosen."""
    method = (FULL if options.preset is Preset.FULL else FAST) if data else NO_DATA
    tables = Tables.FREE if options.tables is TableKind.FREE else Tables.SCALE
    return replace(method, tables=tables, damping=options.damping)


def quantize_weight(
    name: str, weight: torch.Tensor, inputs: Inputs | None, options: QuantizeOptions
) -> tuple[ServedLinear, LayerStats, float]:
    """Quantize a weight float32 [N, K] for what the layer sees; also return its outputs' SQNR in dB.

    Raises:
        ConvertError: the weight is not finite.

    """
    target = _target(name, weight, inputs, options)
    method = method_of(options, data=inputs is not None)
    moment = None if inputs is None else inputs.second
    stock = target_named(options.format).SCALES_AT_LOAD
    served: ServedLinear
    if options.is_w4a16:
        served, found = w4a16(weight, moment, method, target)
    else:
        served, found = quantize_matrix(weight, moment, method, target, stock=stock)
    return served, _stats(weight, served), found.sqnr_db


def quantize_parameter(
    name: str, weight: torch.Tensor, inputs: Inputs | None, options: QuantizeOptions
) -> tuple[ServedLinear, LayerStats, float]:
    """Do what `quantize_weight` does to a weight in the dtype that it is stored in."""
    return quantize_weight(name, weight.float(), inputs, options)


def quantize_weights(
    names: Sequence[str], weights: Sequence[torch.Tensor], inputs: Sequence[Inputs], options: QuantizeOptions
) -> list[tuple[ServedLinear, LayerStats, float]]:
    """Do what `quantize_weight` does to weights of one shape, side by side."""
    if options.is_w4a16:
        return [quantize_weight(*job, options) for job in zip(names, weights, inputs, strict=True)]
    targets = [_target(*job, options) for job in zip(names, weights, inputs, strict=True)]
    method, stock = method_of(options, data=True), target_named(options.format).SCALES_AT_LOAD
    found = quantize_matrices(weights, [each.second for each in inputs], method, targets, stock=stock)
    return [(w4a8, _stats(weight, w4a8), stats.sqnr_db) for weight, (w4a8, stats) in zip(weights, found, strict=True)]


def _target(name: str, weight: torch.Tensor, inputs: Inputs | None, options: QuantizeOptions) -> torch.Tensor | None:
    """Return what to approximate, if that is not the weight itself, which is checked."""
    if not bool(torch.isfinite(weight.sum(dtype=torch.float64))):
        raise ConvertError(name, "holds NaN or infinite weights", "the checkpoint is damaged: download it again")
    if inputs is None or inputs.cross is None or not options.alpha:
        return None
    return mixed_target(weight, inputs.second, inputs.cross, options.alpha, options.damping)


def _stats(weight: torch.Tensor, served: ServedLinear) -> LayerStats:
    noise = decode(served).to(weight.device).sub_(weight).square_()
    scales = served.group_scale if isinstance(served, W4A8Linear) else None
    distinct = None if scales is None else len(torch.unique(scales.view(torch.uint8) & 0x7F))
    signal = float(weight.square().sum(dtype=torch.float64))
    return LayerStats(False, signal, float(noise.sum(dtype=torch.float64)), distinct)


def quantizer(options: QuantizeOptions) -> Quantizer:
    """Return what quantizes layers from their weights alone."""

    def quantize(name: str, w: W4Linear | DenseLinear) -> tuple[ServedLinear, LayerStats]:
        assert isinstance(w, DenseLinear)
        return quantize_weight(name, w.weight.float(), None, options)[:2]

    return Quantizer(quantize, BYTES_PER_WEIGHT)
