"""Quantizing a decoder block: stage by stage, so that each layer sees what its quantized predecessors give it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.block import Block, Stage, round_tokens
from convert_w4a8.calibration.experts import is_experts
from convert_w4a8.calibration.matrix import inputs_of, quantize_weight
from convert_w4a8.calibration.mixture import quantize_experts
from convert_w4a8.calibration.model import Model
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.names import in_transformers
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.states import Batch, States
from convert_w4a8.conversion.plan import LayerPlan
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.quantization.layer import LayerStats


@dataclass(frozen=True)
class Quantized:
    """A layer that is done. notes: what calibration has to say of it, as JSON."""

    layer: LayerPlan
    w4a8: W4A8Linear
    stats: LayerStats
    notes: Mapping[str, Any]


class Walk:
    """Goes through the blocks of a model with the hidden states of two models: the original and the quantized one.

    The fast preset needs the original's alone. directory, limit: where hidden states lie that are beyond so many bytes.
    """

    def __init__(
        self, model: Model, batches: Sequence[Batch], options: QuantizeOptions, directory: Path, limit: int
    ) -> None:
        self._model, self._batches, self._options = model, batches, options
        self._is_full = options.preset is Preset.FULL
        self._directory, self._limit = directory, limit
        share = limit // 4  # of the two models, and of the inputs of experts of the two
        self._original = States(directory, "original", share)
        self._quantized = States(directory, "quantized", share)
        for number, batch in enumerate(batches):
            states = model.first_states(batch.tokens)
            self._original.put(number, states)
            if self._is_full:
                self._quantized.put(number, states)
        model.forget_embeddings()

    def quantize(self, number: int, layers: Sequence[LayerPlan], *, is_last: bool = False) -> Iterator[Quantized]:
        """Quantize some layers of a block, and go through it. Layers that the block never calls are left out.

        is_last: no block comes after it.
        """
        named = {self._inside(number, layer.spec.name): layer for layer in layers}
        block = self._load(number, named)
        stages = block.stages(self._states(self._original, 0), self._model.call(number, self._batches[0].shape))
        inputs = None if self._is_full else self._energies(number, block, stages)
        for stage in stages:
            if stage.is_experts:
                (name,) = stage.modules
                yield from self._experts(number, block, stage, named)
            else:
                seen = self._moments(number, block, stage) if inputs is None else inputs[stage]
                ready = inputs_of(named[stage.modules[0]].module, seen, self._options)
                for name in stage.modules:
                    weight = block.module.get_parameter(f"{name}.weight").detach().float()
                    w4a8, stats, db = quantize_weight(named[name].module, weight, ready, self._options)
                    if self._is_full:
                        block.quantized[name] = decode(w4a8).to(self._model.dtype)
                    notes = {"tokens": seen.tokens, "output_sqnr_db": db}
                    yield Quantized(named[name], w4a8, stats, notes)
        self._pass(number, block, is_last=is_last)

    def pass_by(self, number: int, layers: Mapping[str, W4A8Linear]) -> None:
        """Go through a block that is quantized already, into these layers by their names in the checkpoint."""
        named = {self._inside(number, name): w4a8 for name, w4a8 in layers.items()}
        block = self._load(number, named)
        if self._is_full:
            block.take(named)
        self._pass(number, block)

    def _inside(self, number: int, name: str) -> str:
        """Return the name of a layer within the block, as transformers calls it."""
        return in_transformers(name.removeprefix(f"{self._model.above}.{number}."))

    def _load(self, number: int, named: Collection[str]) -> Block:
        module = self._model.load_block(number)
        names: dict[str, None] = {}
        for name, part in module.named_modules():
            experts = is_experts(part) and f"{name}.0.down_proj" in named
            if experts or (name in named and isinstance(part, nn.Linear)):
                names[name] = None
        return Block(module, names, self._model.dtype, label=f"{self._model.above}.{number}")

    def _states(self, states: States, number: int) -> torch.Tensor:
        return states.get(number).to(self._model.device, self._model.dtype)

    def _moments(self, number: int, block: Block, stage: Stage) -> Moments:
        """Return the moments of a stage's inputs in the quantized model, and with those in the original one."""
        moments = Moments()
        for i, batch in enumerate(self._batches):
            call, kept = self._model.call(number, batch.shape), batch.kept.flatten().to(self._model.device)
            (seen, *_) = block.inputs(self._states(self._quantized, i), call, stage, quantized=True)
            original = None
            if self._options.alpha:
                (original, *_) = block.inputs(self._states(self._original, i), call, stage, quantized=False)
                original = original.flatten(0, -2)
            moments.add(seen.flatten(0, -2), original, kept=kept, rounding=round_tokens)
        return moments

    def _energies(self, number: int, block: Block, stages: Sequence[Stage]) -> dict[Stage, Moments]:
        """Return the energies of all inputs in the original model, from one pass."""
        found = {stage: Moments(energies=True) for stage in stages if not stage.is_experts}
        for i, batch in enumerate(self._batches):
            kept = batch.kept.flatten().to(self._model.device)
            states = self._states(self._original, i)
            seen = block.all_inputs(states, self._model.call(number, batch.shape))
            for stage, moments in found.items():
                moments.add(seen[stage.modules[0]][0].flatten(0, -2), kept=kept, rounding=round_tokens)
        return found

    def _experts(self, number: int, block: Block, stage: Stage, named: Mapping[str, LayerPlan]) -> Iterator[Quantized]:
        """Quantize the experts of a mixture."""
        (name,) = stage.modules
        original = States(self._directory, "experts-original", self._limit // 4)
        seen = States(self._directory, "experts-quantized", self._limit // 4) if self._is_full else original
        choices = []
        for i, batch in enumerate(self._batches):
            call, kept = self._model.call(number, batch.shape), batch.kept.flatten().to(self._model.device)
            x, index, *_ = block.inputs(self._states(self._original, i), call, stage, quantized=False)
            original.put(i, x[kept])
            if self._is_full:
                x, index, *_ = block.inputs(self._states(self._quantized, i), call, stage, quantized=True)
                seen.put(i, x[kept])
            choices.append(index[kept].cpu())
        for expert, leaf, w4a8, stats, notes in quantize_experts(
            block, name, choices, (original, seen), self._options, self._model.device
        ):
            yield Quantized(named[f"{name}.{expert}.{leaf}"], w4a8, stats, notes)

    def _pass(self, number: int, block: Block, *, is_last: bool = False) -> None:
        """Go through the block to the next one, and free it."""
        for i, batch in enumerate(self._batches if not is_last else ()):
            call = self._model.call(number, batch.shape)
            self._original.put(i, block.output(self._states(self._original, i), call, quantized=False))
            if self._is_full:
                self._quantized.put(i, block.output(self._states(self._quantized, i), call, quantized=True))
        block.release()
        self._model.free_block(number)
