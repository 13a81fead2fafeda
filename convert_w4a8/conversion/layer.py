"""One layer or one other tensor of a conversion: from what a reader reads to the tensors of the output.

Nothing here writes, locks or knows of files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from convert_w4a8.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES, Reader, TensorInfo
from convert_w4a8.checkpoint.values import not_finite
from convert_w4a8.conversion.plan import LayerPlan, TensorPlan
from convert_w4a8.encoding.dequantize import BLOCK_WEIGHTS, dequantize, output_blocks
from convert_w4a8.errors import ConvertError, DiskError
from convert_w4a8.linear import GROUP_SIZE, DenseLinear, ServedLinear, W4Linear
from convert_w4a8.options import Options
from convert_w4a8.quantization.layer import LayerStats, to_w4a8
from convert_w4a8.sources import source_named
from convert_w4a8.targets import target_named


@dataclass(frozen=True)
class Quantizer:
    """What makes W4A8 or W4A16 of a layer, instead of `to_w4a8` by the options' scales.

    quantize: the function, of a layer's name and weights. bytes_per_weight: memory that it takes beside the layer.
    """

    quantize: Callable[[str, W4Linear | DenseLinear], tuple[ServedLinear, LayerStats]]
    bytes_per_weight: int


CHUNK_BYTES = 8 << 20
"""Of a tensor that is copied, as much at a time."""
_DOWNLOAD_AGAIN = "the checkpoint is damaged: download it again"


def convert_layer(
    layer: LayerPlan, read: Reader, options: Options, device: torch.device, quantizer: Quantizer | None = None
) -> tuple[Mapping[str, Iterable[torch.Tensor]], LayerStats | None]:
    """Read one layer and return the tensors of the output that it becomes, and what that did to it.

    Tensors come in parts along their first dimension, some of which are made when they are asked for. The statistics
    are None where the layer is kept in BF16.

    Raises:
        ConvertError: the layer is damaged; DiskError: the GPU's free memory is too small for it.

    """
    w = source_named(layer.spec.source).read_layer(layer.spec, read)
    if isinstance(w, DenseLinear) and _is_not_finite(w.weight):
        raise ConvertError(layer.spec.name, "holds NaN or infinite weights", _DOWNLOAD_AGAIN)
    if layer.dequantize is not None:
        (spec,) = layer.specs
        return {spec.name: _in_bfloat16(w)}, None
    target = target_named(options.format)
    try:
        w = w if device.type == "cpu" else w.to(device)
        made: tuple[ServedLinear, LayerStats]
        if quantizer is None:
            made = to_w4a8(w, options.scales, stock=target.SCALES_AT_LOAD)
        else:
            made = quantizer.quantize(layer.module, w)
        served, stats = made
        tensors = target.encode(layer.module, served)
    except torch.OutOfMemoryError as error:
        raise _too_large(layer, device, quantizer) from error
    return {name: _explained(parts, layer, device, quantizer) for name, parts in tensors.items()}, stats


def _is_not_finite(weight: torch.Tensor) -> bool:
    return any(not_finite(weight.contiguous().view(-1).view(torch.uint8), DTYPE_NAMES[weight.dtype]))


def _explained(
    parts: Iterable[torch.Tensor], layer: LayerPlan, device: torch.device, quantizer: Quantizer | None
) -> Iterator[torch.Tensor]:
    """Yield parts, some of which are made only now."""
    try:
        yield from parts
    except torch.OutOfMemoryError as error:
        raise _too_large(layer, device, quantizer) from error


def _too_large(layer: LayerPlan, device: torch.device, quantizer: Quantizer | None) -> DiskError:
    """Return the error for a GPU whose memory is full: others work on it too, so what is finished is kept."""
    remedy = "use --device cpu" if quantizer is None else "free some, or begin again with --device cpu --overwrite"
    return DiskError(layer.module, f"does not fit into the free memory of {device}", remedy)


def layer_memory(layer: LayerPlan, quantizer: Quantizer | None = None) -> int:
    """Return the bytes that converting a layer takes at most, to some ten per cent (tests/conversion/test_memory.py).

    That is what is read, the new codes, and what a block of weights takes meanwhile. Where the configuration says that
    a layer is symmetric, it is believed here.
    """
    spec = layer.spec
    weights = spec.out_features * spec.in_features
    block = min(weights, BLOCK_WEIGHTS)
    if layer.dequantize is not None:
        return spec.nbytes + 8 * block  # float32, what it is made of, and bfloat16
    if quantizer is not None:
        return spec.nbytes + quantizer.bytes_per_weight * weights
    is_scattered = spec.dense or spec.act_order or spec.group_size % GROUP_SIZE > 0
    if is_scattered or not spec.symmetric:
        return spec.nbytes + weights + (22 if is_scattered else 3) * block  # by weight, or by the values of a group
    has_bytes = spec.nbytes >= weights  # a byte a code, which is packed first
    return spec.nbytes + weights // 2 + (3 * weights // 2 if has_bytes else 0)


def _in_bfloat16(w: W4Linear | DenseLinear) -> Iterator[torch.Tensor]:
    for start, stop in output_blocks(*w.shape_nk):
        yield dequantize(w.output_channels(start, stop)).bfloat16()


def copy_tensor(
    tensor: TensorPlan,
    read_into: Callable[[TensorInfo, torch.Tensor, int], None],
    note_infinities: Callable[[int], None] = lambda _count: None,
) -> Iterator[torch.Tensor]:
    """Yield a tensor of the output in flat parts, so that an embedding of gigabytes needs no gigabytes.

    note_infinities: called at the end with how many it holds, if there are any: a mask may.

    Raises:
        ConvertError: it holds NaN, or cannot be read.

    """
    info, infinities = tensor.info, 0
    for offset in range(0, info.nbytes, CHUNK_BYTES):
        piece = torch.empty(min(CHUNK_BYTES, info.nbytes - offset), dtype=torch.uint8)
        read_into(info, piece, offset)
        has_nan, found = not_finite(piece, info.dtype)
        if has_nan:
            raise ConvertError(info.name, "holds NaN", _DOWNLOAD_AGAIN)
        infinities += found
        values = piece.view(TORCH_DTYPES[info.dtype])
        yield values.bfloat16() if tensor.output.dtype != info.dtype else values  # FP16 → BF16, or as it is
    if infinities:
        note_infinities(infinities)
