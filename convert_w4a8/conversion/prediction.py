"""What new codes will cost, before anything is written: some layers of a plan, quantized in part as a conversion does.

Layers are taken by kind, a kind being the end of a name (self_attn.q_proj, experts.down_proj) with sizes and settings:
32 layers over all kinds, and at least one a kind. The golden ratio spreads them over a kind, so that no step of the
sample falls in with the number of experts. Of each the tensors are read whole, 256 MiB in all at most, and output
channels with a quarter of a million weights, spread over the layer, get codes and scales by the conversion's own
function: what is measured is what the conversion of these channels reports.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from statistics import fmean

import torch

from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.conversion.plan import Codes, LayerPlan, Plan
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import DenseLinear, W4Linear, kept_zeros
from convert_w4a8.quantization.layer import to_w4a8
from convert_w4a8.threads import one_thread_each

LAYERS = 32
"""Layers that are read at most, of all kinds together; one of each kind if there are more kinds."""
LAYER_WEIGHTS = 1 << 18
"""Weights of one layer that get codes."""
NBYTES = 256 << 20
"""What is read together at most. A layer that is larger by itself is not read."""
_CHANNELS = 8
"""Output channels that lie in one word, and stay together."""
_GOLDEN = (5**0.5 - 1) / 2
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class KindPrediction:
    """What becomes of the layers of one kind.

    kind: the end of their names. layers: how many there are that may get new codes. read: how many of them were read;
    new: how many of these get new codes. mean_db, worst_db: SQNR of those, in dB. worst: the module of the worst.
    """

    kind: str
    layers: int
    read: int
    new: int
    mean_db: float
    worst_db: float
    worst: str


@dataclass(frozen=True)
class Prediction:
    """What the layers of a plan that get new codes will lose, by kind; kinds of which none gets any are left out."""

    kinds: tuple[KindPrediction, ...]

    @property
    def layers(self) -> int:
        """How many layers will get new codes, by their share of those that were read."""
        return round(sum(kind.layers * kind.new / kind.read for kind in self.kinds))

    @property
    def read(self) -> int:
        """How many layers were read and get new codes."""
        return sum(kind.new for kind in self.kinds)

    @property
    def mean_db(self) -> float:
        """Mean SQNR over the layers that will get new codes, in dB."""
        weights = [kind.layers * kind.new / kind.read for kind in self.kinds]
        return sum(kind.mean_db * weight for kind, weight in zip(self.kinds, weights, strict=True)) / sum(weights)

    @property
    def worst(self) -> KindPrediction:
        """The kind with the worst layer that was read."""
        return min(self.kinds, key=lambda kind: kind.worst_db)


def predict(plan: Plan) -> Prediction | None:
    """Predict the error of a plan's layers with new codes; None where there are none, or none that can be read.

    Takes a second or two, whatever the size of the checkpoint; always the same for the same checkpoint and options.
    What is damaged is left to the conversion, which reads all of it.
    """
    kinds = _kinds(plan)
    found: dict[Hashable, list[tuple[LayerPlan, float | None]]] = {kind: [] for kind in kinds}
    with one_thread_each():  # as in a conversion; threads that wait for each other cost more than they gain
        for layer in _chosen(kinds):
            try:
                found[_kind(layer)].append((layer, _sqnr_db(plan, layer)))
            except ConvertError:
                continue
    predictions = [_of_kind(kinds[kind], read) for kind, read in found.items()]
    present = tuple(prediction for prediction in predictions if prediction is not None)
    return Prediction(present) if present else None


def sample(plan: Plan) -> list[LayerPlan]:
    """Return the layers that are read for a prediction."""
    return _chosen(_kinds(plan))


def _chosen(kinds: Mapping[Hashable, Sequence[LayerPlan]]) -> list[LayerPlan]:
    """Return one layer of each kind, then another one of each, and so on, while they fit."""
    rows = zip_longest(*(_spread(layers, max(1, LAYERS // len(kinds))) for layers in kinds.values()))
    chosen, left = [], NBYTES
    for layer in chain.from_iterable(rows):
        if layer is not None and layer.spec.nbytes <= left:
            left -= layer.spec.nbytes
            chosen.append(layer)
    return chosen


def _kinds(plan: Plan) -> dict[Hashable, list[LayerPlan]]:
    """Return the layers that may get new codes, by kind."""
    kinds: dict[Hashable, list[LayerPlan]] = {}
    for layer in plan.converted:
        if layer.codes is not Codes.KEPT:
            kinds.setdefault(_kind(layer), []).append(layer)
    return kinds


def kind_name(module: str) -> str:
    """Return the end of a module's name that its like have in common: self_attn.q_proj, experts.down_proj."""
    return ".".join(_NUMBER.sub("", f".{module}").split(".")[-2:]).lstrip(".")


def _kind(layer: LayerPlan) -> Hashable:
    spec = layer.spec
    sizes = (spec.out_features, spec.in_features, spec.group_size)
    return kind_name(layer.module), sizes, spec.symmetric, spec.act_order, spec.dense


def _spread(layers: Sequence[LayerPlan], count: int) -> list[LayerPlan]:
    """Return so many of some layers, or all."""
    if len(layers) <= count:
        return list(layers)
    chosen: dict[int, LayerPlan] = {}
    position = 0.5
    while len(chosen) < count:
        index = int(position * len(layers))
        chosen[index] = layers[index]
        position = (position + _GOLDEN) % 1
    return list(chosen.values())


def _sqnr_db(plan: Plan, layer: LayerPlan) -> float | None:
    """Return the SQNR of some output channels of a layer in dB; None where its codes are kept.

    Raises:
        ConvertError: the layer is damaged.

    """
    spec, source = layer.spec, plan.source
    if layer.codes is not Codes.NEW and source.read_g_idx(spec, read_tensor) is None:
        zeros = source.read_zeros(spec, read_tensor)
        if zeros is None or bool(kept_zeros(zeros).all()):
            return None
    w = _some_channels(source.read_layer(spec, read_tensor))
    _, stats = to_w4a8(w, plan.options.scales, stock=plan.target.SCALES_AT_LOAD)
    return None if stats.codes_kept else stats.sqnr_db


def _some_channels(w: W4Linear | DenseLinear) -> W4Linear | DenseLinear:
    """Return output channels with LAYER_WEIGHTS weights together, spread over a layer, or all."""
    n, k = w.shape_nk
    blocks = n // _CHANNELS
    count = max(1, LAYER_WEIGHTS // (_CHANNELS * k))
    if count >= blocks:
        return w
    starts = [(2 * i + 1) * blocks // (2 * count) * _CHANNELS for i in range(count)]

    def joined(part: Callable[[int, int], torch.Tensor], dim: int) -> torch.Tensor:
        return torch.cat([part(start, start + _CHANNELS) for start in starts], dim=dim)

    if isinstance(w, DenseLinear):
        return DenseLinear(joined(lambda start, stop: w.weight[start:stop], 0))
    zeros = w.zeros
    return replace(
        w,
        packed=joined(lambda start, stop: w.packing.slice_outputs(w.packed, start, stop), w.packing.axes.index("n")),
        scales=joined(lambda start, stop: w.scales[:, start:stop], 1),
        zeros=None if zeros is None else joined(lambda start, stop: zeros[:, start:stop], 1),
    )


def _of_kind(layers: Sequence[LayerPlan], read: Iterable[tuple[LayerPlan, float | None]]) -> KindPrediction | None:
    """Return what those layers of a kind that were read tell of all; None where none of them gets new codes."""
    read = list(read)
    new = [(sqnr_db, layer.module) for layer, sqnr_db in read if sqnr_db is not None]
    if not new:
        return None
    worst_db, worst = min(new)
    mean_db = fmean(sqnr_db for sqnr_db, _ in new)
    return KindPrediction(kind_name(layers[0].module), len(layers), len(read), len(new), mean_db, worst_db, worst)
