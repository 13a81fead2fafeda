"""Quantizing a decoder block: stage by stage, so that each layer sees what its quantized predecessors give it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert_w4a8.calibration.block import Block, Stage, as_is, round_tokens
from convert_w4a8.calibration.matrix import inputs_of, quantize_parameter
from convert_w4a8.calibration.mixture import quantize_experts
from convert_w4a8.calibration.model import Model
from convert_w4a8.calibration.moments import Moments
from convert_w4a8.calibration.options import Preset, QuantizeOptions
from convert_w4a8.calibration.scaling import Scaling, scale_block
from convert_w4a8.calibration.spread import Spread, one_by_one
from convert_w4a8.calibration.states import BATCH_TOKENS, Batch, States
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import in_transformers
from convert_w4a8.conversion.plan import LayerPlan, TensorPlan
from convert_w4a8.encoding.tables import decode
from convert_w4a8.experts import is_experts
from convert_w4a8.linear import ServedLinear
from convert_w4a8.quantization.layer import LayerStats


@dataclass(frozen=True)
class Quantized:
    """A layer that is done. notes: what calibration has to say of it, as JSON."""

    layer: LayerPlan
    w4a8: ServedLinear
    stats: LayerStats
    notes: Mapping[str, Any]


class Walk:
    """Goes through the blocks of a model with the hidden states of two models: the original and the quantized one.

    The fast preset needs the original's alone. scaling: what was done to the block that is being quantized.
    directory, limit: where hidden states lie that are beyond so many bytes. spread: what quantizes matrices.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        options: QuantizeOptions,
        directory: Path,
        limit: int,
        spread: Spread = one_by_one,
    ) -> None:
        self._model, self._batches, self._options, self._spread = model, batches, options, spread
        self._is_full = options.preset is Preset.FULL
        self.scaling = Scaling()
        self._rounding = as_is if options.is_w4a16 else round_tokens
        share = limit // 4  # of the two models, and of the inputs of experts of the two
        self._original = States(directory, "original", share)
        self._quantized = States(directory, "quantized", share)
        self._of_experts = (States(directory, "experts-original", share), States(directory, "experts-quantized", share))
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
        inputs = self._energies(number, block, stages) if self._options.scales_inputs or not self._is_full else {}
        self.scaling = self._scale(number, block, inputs) if self._options.scales_inputs else Scaling()
        for stage in stages:
            if stage.is_experts:
                (name,) = stage.modules
                yield from self._experts(number, block, stage, named)
            else:
                seen = self._moments(number, block, stage) if self._is_full else inputs[stage]
                ready = inputs_of(named[stage.modules[0]].module, seen, self._options)
                calls = (
                    (named[name].module, block.module.get_parameter(f"{name}.weight").detach(), ready, self._options)
                    for name in stage.modules
                )
                found = self._spread(quantize_parameter, calls)
                for name, (w4a8, stats, db) in zip(stage.modules, found, strict=True):
                    if self._is_full:
                        block.quantized[name] = decode(w4a8).to(self._model.dtype)
                    notes = {"tokens": seen.tokens, "output_sqnr_db": db, **self._scaled(name)}
                    yield Quantized(named[name], w4a8, stats, notes)
        if not is_last:
            self._pass(number, block, versions=(False, True) if self._is_full else (False,))
        self._free(number, block)

    def pass_by(self, number: int, layers: Mapping[str, ServedLinear], written: Checkpoint) -> None:
        """Go through a block that is quantized already, into these layers by their names in the checkpoint.

        written: all that is written of it.
        """
        named = {self._inside(number, name): w4a8 for name, w4a8 in layers.items()}
        block = self._load(number, named)
        self._pass(number, block, versions=(False,))
        if self._is_full:
            self._model.load_again(number, written)
            block.take(named)
            self._pass(number, block, versions=(True,))
        self._free(number, block)

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
        return Block(module, names, self._model.dtype, label=f"{self._model.above}.{number}", rounding=self._rounding)

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
            moments.add(seen.flatten(0, -2), original, kept=kept, rounding=self._rounding)
        return moments

    def _energies(self, number: int, block: Block, stages: Sequence[Stage]) -> dict[Stage, Moments]:
        """Return the energies of all inputs in the original model, from one pass."""
        wanted = [stage for stage in stages if self._options.scales_inputs or not stage.is_experts]
        found = {stage: Moments(energies=True) for stage in wanted}
        for i, batch in enumerate(self._batches):
            kept = batch.kept.flatten().to(self._model.device)
            states = self._states(self._original, i)
            seen = block.all_inputs(states, self._model.call(number, batch.shape))
            for stage, moments in found.items():
                moments.add(seen[stage.modules[0]][0].flatten(0, -2), kept=kept, rounding=self._rounding)
        return found

    def _scale(self, number: int, block: Block, energies: Mapping[Stage, Moments]) -> Scaling:
        """Scale input channels of a block. What is scaled is tried with the beginning of the longest sample."""
        modules = {self._inside(number, name) for name in self._model.modules(number)}
        longest = max(range(len(self._batches)), key=lambda i: self._batches[i].shape[1])
        count, length = self._batches[longest].shape
        tried = self._states(self._original, longest)[:, :BATCH_TOKENS]
        call = self._model.call(number, (count, min(length, BATCH_TOKENS)))
        return scale_block(block, modules, energies, tried, call, self._options)

    def _scaled(self, name: str) -> dict[str, Any]:
        """Return what is noted of the scaling of a layer's inputs."""
        return {"awq_exponent": self.scaling.exponents.get(name)} if self._options.scales_inputs else {}

    def scaled(
        self, number: int, name: str, tensors: Mapping[str, Iterable[torch.Tensor]]
    ) -> Mapping[str, Iterable[torch.Tensor]]:
        """Return the weight of a linear layer of the source that stays in 16 bits as the scaled block has it."""
        parameter = f"{self._inside(number, name)}.weight"
        if not self.scaling.has(parameter):
            return tensors
        return {key: [self.scaling.apply(parameter, torch.cat(list(parts)))] for key, parts in tensors.items()}

    def scaled_copy(self, number: int, tensor: TensorPlan, parts: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Return a tensor that is copied, in flat parts, as the scaled block has it."""
        parameter = self._inside(number, tensor.info.name)
        if not self.scaling.has(parameter):
            return parts
        whole = torch.cat(list(parts)).view(tensor.output.shape)
        return [self.scaling.apply(parameter, whole).flatten()]

    def _experts(self, number: int, block: Block, stage: Stage, named: Mapping[str, LayerPlan]) -> Iterator[Quantized]:
        """Quantize the experts of a mixture."""
        (name,) = stage.modules
        original, seen = self._of_experts
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
            block, name, choices, self._of_experts, self._options, self._model.device, self._spread
        ):
            shared = self._scaled(name) if leaf != "down_proj" else {}
            yield Quantized(named[f"{name}.{expert}.{leaf}"], w4a8, stats, {**notes, **shared})

    def _pass(self, number: int, block: Block, *, versions: Sequence[bool]) -> None:
        """Go through the block to the next one. versions: of the original model, False, and of the quantized one."""
        for i, batch in enumerate(self._batches):
            call = self._model.call(number, batch.shape)
            for quantized in versions:
                states = self._quantized if quantized else self._original
                states.put(i, block.output(self._states(states, i), call, quantized=quantized))

    def _free(self, number: int, block: Block) -> None:
        block.release()
        self._model.free_block(number)
