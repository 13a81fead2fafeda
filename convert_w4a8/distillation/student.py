"""The two models: the teacher as transformers computes it in BF16, and the student, whose layers are `LutLinear`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.model_classes import transformers_for
from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.distillation.embeddings import EMBEDDINGS, embedding_parameters
from convert_w4a8.distillation.experts import place_experts
from convert_w4a8.distillation.fused import fuse, rotations
from convert_w4a8.distillation.hidden import check_blocks
from convert_w4a8.distillation.linear import LutLinear, Preset
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4A8Linear
from convert_w4a8.targets import find_target

_ROLES = ("weight_packed", "weight_scale", "weight_lut", "weight_chan_scale")
"""What the tensors of a quantized layer are called."""
_ANOTHER = "distill a model that it has"
_SMALL = 1 << 22
"""The most numbers of a tensor that may be kept in float32: a router's matrix has fewer."""


@dataclass(frozen=True)
class Student:
    """A model to be trained.

    layers: the quantized ones by their names in the checkpoint. others: its other trained parameters, in BF16, by
    names likewise: norms and biases, and perhaps embeddings. again: those of them that the checkpoint has a second
    time, by that name: lm_head, where it is tied and stored.
    """

    model: nn.Module
    layers: dict[str, LutLinear]
    others: dict[str, nn.Parameter]
    again: dict[str, nn.Parameter]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter that is trained, in a fixed order, with a name."""
        for name, layer in self.layers.items():
            for leaf in ("entries", "scale", "weight"):
                parameter = getattr(layer, leaf)
                if parameter is not None:
                    yield f"{name}.{leaf}", parameter
        yield from self.others.items()


def check_models(start: Checkpoint, teacher: Checkpoint, *, blocks: bool = False) -> None:
    """Check by headers and configurations that two checkpoints can be a student and a teacher.

    blocks: whether their blocks are to be compared. What a configuration does not say is checked when models are there.

    Raises:
        ConvertError: the teacher is quantized, the student is not, or not of the format `lut` with stored tables, or
            the two are of other vocabulary or blocks.

    """
    if not start.quantization_config:
        raise ConvertError(str(start.root), "is not quantized", "quantize it first, with w4a8 quantize")
    if teacher.quantization_config:
        raise ConvertError(str(teacher.root), "is quantized", "give the model in 16 bits as --teacher")
    names = find_target(start).find_layers(start)
    if any(f"{name}.weight_lut" not in start.tensors for name in names):
        raise ConvertError(
            str(start.root), "has no tables of its own to train", "make it with w4a8 quantize --tables free"
        )
    (ours, *our_blocks), (theirs, *their_blocks) = (
        [each.number(key) for key in ("vocab_size", "num_hidden_layers", "hidden_size")] for each in (start, teacher)
    )
    if ours is not None and theirs is not None:
        check_vocabulary(teacher, ours, theirs)
    if blocks and None not in (*our_blocks, *their_blocks):
        check_blocks(our_blocks, their_blocks)


def check_vocabulary(teacher: Checkpoint, ours: int, theirs: int) -> None:
    """Raise ConvertError where the student predicts other tokens than the teacher."""
    if ours != theirs:
        reason = f"predicts {theirs} tokens, and OUT_W4A8 {ours}"
        raise ConvertError(str(teacher.root), reason, "give a teacher of the same vocabulary")


def load_teacher(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """Return a model in BF16 with the weights of a checkpoint that is not quantized.

    Raises:
        ConvertError: transformers has no place for its tensors.

    """
    state = {name: _in_bfloat16(read_tensor(info)) for name, info in checkpoint.tensors.items()}
    model = _build(checkpoint, state).to(device).requires_grad_(requires_grad=False)
    fuse(model, device)
    return model


def load_student(
    checkpoint: Checkpoint,
    teacher: Checkpoint,
    preset: Preset,
    device: torch.device,
    towards: float = 0.0,
    *,
    embeddings: bool = False,
) -> Student:
    """Return the model of a W4A8 checkpoint with trained layers. towards: see `LutLinear`. embeddings: train them too.

    Raises:
        ConvertError: transformers has no place for its tensors, embeddings are not to be trained, or the teacher has no
            weights to begin towards.

    """
    check_models(checkpoint, teacher)
    target = find_target(checkpoint)
    names = target.find_layers(checkpoint)
    used = {f"{name}.{role}" for name in names for role in _ROLES}
    state = {name: _in_bfloat16(read_tensor(info)) for name, info in checkpoint.tensors.items() if name not in used}
    layers: dict[str, LutLinear] = {}
    with torch.device("cpu"):
        for name in names:
            w = target.decode(checkpoint, name, read_tensor)
            assert isinstance(w, W4A8Linear)  # it has tables
            n, k = w.shape_nk
            state[f"{name}.weight"] = torch.empty(1, dtype=torch.bfloat16).expand(n, k)
            original = teacher.tensors.get(f"{name}.weight") if towards else None
            if towards and (original is None or original.shape != (n, k)):
                reason = f"has no weights of {n} × {k} for {name}, towards which its own are to begin"
                raise ConvertError(str(teacher.root), reason, "leave out towards, or give a teacher of the same shape")
            weight = None if original is None else read_tensor(original)
            layers[name] = LutLinear(w, state.get(f"{name}.bias"), preset, weight, towards)
    model = _build(checkpoint, state).requires_grad_(requires_grad=False)
    ours, theirs = _decoders(model, names)
    places = {_moved(name, ours, theirs): name for name in names}
    experts = place_experts(model, {place: layers[name] for place, name in places.items()})
    for place, name in places.items():
        if place in experts:
            continue
        if not isinstance(_find(model, place), nn.Linear):
            reason = f"is no linear layer of transformers' {type(model).__name__}"
            raise ConvertError(name, reason, "leave this model as it is")
        above, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(above), leaf, layers[name])
    more = embedding_parameters(model) if embeddings else []
    if len({id(one) for one in more}) > 1 and checkpoint.config.get("tie_word_embeddings") is True:
        reason = "ties embeddings and lm_head by its config.json, and has others in lm_head, which vLLM does not read"
        raise ConvertError(str(checkpoint.root), reason, f"remove that, or leave out {EMBEDDINGS}")
    others: dict[str, nn.Parameter] = {}
    again: dict[str, nn.Parameter] = {}
    stay: list[nn.Parameter] = []
    for place, parameter in model.named_parameters(remove_duplicate=False):
        name = _moved(place, theirs, ours)
        info = checkpoint.tensors.get(name)
        if info is None or info.dtype != "BF16" or parameter.dtype != torch.bfloat16:
            stay += [one for one in more if one is parameter and info is not None]
            continue  # it is written as it is
        owner = name.rpartition(".")[0]
        is_bias = owner in layers and name == f"{owner}.bias"
        is_embedding = any(parameter is one for one in more)
        if is_bias or is_embedding or (owner not in layers and parameter.dim() == 1):
            is_there = any(parameter is one for one in others.values())
            parameter.requires_grad_()
            (again if is_there else others)[name] = parameter
    if any(one.requires_grad for one in stay):
        reason = "has one of the embeddings and lm_head, which are tied, in other types than BF16"
        raise ConvertError(str(checkpoint.root), reason, f"leave out {EMBEDDINGS}")
    if embeddings and not any(one.requires_grad for one in more):
        reason = "has no embeddings in BF16 to train"
        raise ConvertError(str(checkpoint.root), reason, f"leave out {EMBEDDINGS}")
    model.to(device)
    fuse(model, device)
    return Student(model, layers, others, again)


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits bfloat16 [B, T, V] of token ids [B, T], padded on the right where samples are shorter."""
    with _one_sample_a_row(), rotations(model):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _one_sample_a_row() -> Iterator[None]:
    """Keep transformers from making masks where causal attention needs none.

    It looks for several samples in a row by their positions, for which the host waits for the device; while a CUDA
    graph is captured it cannot look, and makes masks, with which attention takes the slow way.
    """
    import transformers.masking_utils as masks  # noqa: PLC0415

    answers = {"find_packed_sequence_indices": None, "is_tracing": False}
    before = {name: getattr(masks, name) for name in answers if hasattr(masks, name)}
    for name in before:
        setattr(masks, name, partial(_answer, answers[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masks, name, function)


def _answer(answer: bool | None, *_arguments: Any, **_options: Any) -> bool | None:
    return answer


def vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model predicts."""
    size: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return size


def _decoders(model: nn.Module, layers: Sequence[str]) -> tuple[str, str]:
    """Return where the decoder is in a checkpoint of so named layers, and where in transformers' model; "" if as there.

    In models that see too it is `language_model.model` in many checkpoints, and `model.language_model` there.
    """
    if any(_find(model, name) is not None for name in layers):
        return "", ""
    above = Counter(found[0] for name in layers if (found := block_of(name)) is not None)
    part: Any = model
    decoder = part.get_decoder() if hasattr(model, "get_decoder") else None
    theirs = next((name for name, module in model.named_modules() if module is decoder), "")
    ours = max(above, key=above.__getitem__, default="").rpartition(".")[0]
    return (ours, theirs) if ours and theirs else ("", "")


def _moved(name: str, before: str, after: str) -> str:
    return f"{after}{name.removeprefix(before)}" if before and name.startswith(f"{before}.") else name


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """Round a matrix, for its memory. Small tensors are left to transformers, which keeps some in float32."""
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.numel() > _SMALL else tensor


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Keep transformers from showing progress of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _build(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> nn.Module:
    """Make transformers' model of a checkpoint's configuration, in BF16, with these tensors."""
    with transformers_for(checkpoint, "w4a8 distill", _ANOTHER) as (transformers, config):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        automatic: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        with _without_bars(transformers.utils.logging):
            model, info = automatic[type(config)].from_pretrained(
                None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
            )
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in sorted(info[key])]
    if wrong:
        raise ConvertError(
            str(checkpoint.root),
            f"has tensors other than those of transformers' {type(model).__name__} (first: {wrong[0]})",
            f"install another transformers, or {_ANOTHER}",
        )
    found: nn.Module = model
    return found.eval()
