"""Powers of two that a calibrated output moved from one layer into another, told from the bytes of both checkpoints.

A norm says by itself which inputs were scaled by what, and every layer that gets them has to agree. Of a quantized
layer the weights say it: those of an output channel are the source's times a power of two, and the layer behind has to
have the other part.
"""

import math
from collections.abc import Mapping
from functools import cache

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.folds import LEAST, MOST, Fold, find_folds, origin_channels, powers_of_two
from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import DenseLinear
from convert_w4a8.sources import LayerSpec, Source, unquantized_source
from convert_w4a8.targets.base import Target


class Scaling:
    """What a tensor of the output is of the source's. Modules are called as in the output.

    specs: the linear layers of the source. copies: its other tensors. Both by their names in the output.
    """

    def __init__(
        self,
        out: Checkpoint,
        reader: Source,
        target: Target,
        read: Reader,
        specs: Mapping[str, LayerSpec],
        copies: Mapping[str, TensorInfo],
    ) -> None:
        self._out, self._reader, self._target, self._read = out, reader, target, read
        self._specs, self._copies, self._converted = specs, copies, set(target.find_layers(out))
        self._inputs: dict[str, Fold] = {}
        self._outputs: dict[str, Fold] = {}
        modules = {*specs} | {name.removesuffix(".weight") for name in copies if name.endswith(".weight")}
        blocks: dict[str, set[str]] = {}
        for module in modules:
            if (place := block_of(module)) is not None:
                blocks.setdefault(f"{place[0]}.{place[1]}.", set()).add(module)
        for block, ours in blocks.items():
            for fold in find_folds(block, ours):
                self._inputs |= dict.fromkeys(fold.consumers, fold)
                self._outputs[fold.origin] = fold
        self._rows = cache(self._find_rows)

    def inputs(self, module: str) -> torch.Tensor | None:
        """Return what the input channels of a module's weights were multiplied by, float32 [K]; None for nothing."""
        fold = self._inputs.get(module)
        rows = None if fold is None else self._rows(fold.origin)
        if fold is None or rows is None:
            return None
        scales = 1 / rows
        if fold.is_norm:
            return scales
        channels = self._channels(fold)
        return None if channels is None else scales[channels]

    def outputs(self, module: str) -> torch.Tensor | None:
        """Return what the output channels of a module were multiplied by, float32 [N]; None for nothing."""
        return self._rows(module) if module in self._outputs else None

    def scaled(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of the source, [N, K] or [K], or a bias, as the output has to have it, in its own dtype."""
        rows, columns = self.outputs(module), self.inputs(module) if weight.dim() == 2 else None
        if rows is not None and len(rows) == len(weight):
            weight = weight * rows.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)
        if columns is not None and len(columns) == weight.shape[-1]:
            weight = weight * columns.to(weight.dtype)
        return weight

    def layer(self, module: str, w: DenseLinear) -> DenseLinear:
        """Return a layer of the source as the output has to have it; the same one where nothing was scaled."""
        if self.outputs(module) is None and self.inputs(module) is None:
            return w
        return DenseLinear(self.scaled(module, w.weight.float()))

    def touches(self, name: str) -> bool:
        """Whether a copied tensor was scaled."""
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return False
        return self.outputs(module) is not None or (leaf == "weight" and self.inputs(module) is not None)

    def _channels(self, fold: Fold) -> torch.Tensor | None:
        (consumer,) = fold.consumers
        origin, behind = self._shape(fold.origin), self._shape(consumer)
        if origin is None or behind is None:
            return None
        return origin_channels(origin[0], behind[1], _head_dim(self._out.config))

    def _shape(self, module: str) -> tuple[int, ...] | None:
        """Return (N, K) of a linear layer of the source."""
        if module in self._specs:
            return self._specs[module].out_features, self._specs[module].in_features
        info = self._copies.get(f"{module}.weight")
        return info.shape if info is not None and len(info.shape) == 2 else None

    def _before(self, module: str) -> torch.Tensor:
        """Return the weights of a linear layer in the source, float32 [N, K]."""
        if module in self._specs:
            return dequantize(self._reader.read_layer(self._specs[module], self._read))
        return self._read(self._copies[f"{module}.weight"]).float()

    def _after(self, module: str) -> torch.Tensor | None:
        """Return the same in the output; None where it is not as it should be, which is found elsewhere."""
        if module not in self._converted:
            info = self._out.tensors.get(f"{module}.weight")
            return None if info is None else self._read(info).float()
        try:
            return decode(self._target.decode(self._out, module, self._read))
        except ConvertError:
            return None

    def _find_rows(self, module: str) -> torch.Tensor | None:
        fold = self._outputs[module]
        found = self._of_norm(module) if fold.is_norm else self._of_layer(fold)
        return None if found is None or bool((found == 1).all()) else found

    def _of_norm(self, module: str) -> torch.Tensor | None:
        name = f"{module}.weight"
        info, copy = self._copies.get(name), self._out.tensors.get(name)
        if info is None or copy is None or copy.shape != info.shape or len(info.shape) != 1:
            return None
        theirs, ours = self._read(info).float(), self._read(copy).float()
        ratio = torch.where((theirs == 0) & (ours == 0), 1.0, ours / theirs)
        return ratio if powers_of_two(ratio) else None

    def _of_layer(self, fold: Fold) -> torch.Tensor | None:
        if self._channels(fold) is None:
            return None
        theirs, ours = self._before(fold.origin), self._after(fold.origin)
        if ours is None or theirs.shape != ours.shape:
            return None
        columns = self.inputs(fold.origin)
        if columns is not None and len(columns) == theirs.shape[1]:
            theirs = theirs * columns
        gain = (theirs * ours).sum(1) / theirs.square().sum(1)
        rows = torch.where(torch.isfinite(gain) & (gain > 0), gain, 1.0).log2().round().exp2()
        return torch.where((rows >= LEAST) & (rows <= MOST), rows, 1.0)


def find_scaling(
    out: Checkpoint,
    reader: Source,
    target: Target,
    read: Reader,
    specs: Mapping[str, LayerSpec],
    copies: Mapping[str, TensorInfo],
) -> Scaling | None:
    """Return what a tensor of the output is of the source's; None where all are what they were.

    Only calibration scales, and an output of the format `lut` says whether it did. What it says saves reading weights
    twice, and is not trusted: what is scaled all the same then differs from the source.
    """
    conversion = out.quantization_config.get("conversion")
    made = conversion if isinstance(conversion, Mapping) else {}
    calibration = made.get("calibration", {})
    is_unscaled = calibration is None or (isinstance(calibration, Mapping) and calibration.get("awq_scaling") is False)
    if reader.NAME != unquantized_source().NAME or is_unscaled:
        return None
    return Scaling(out, reader, target, read, specs, copies)


def _head_dim(config: Mapping[str, object]) -> int | None:
    """Return the channels of a head, as the language model's configuration has them."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        dim, hidden, heads = (part.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
        if isinstance(dim, int) and dim > 0:
            return dim
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            return math.floor(hidden / heads)
    return None
