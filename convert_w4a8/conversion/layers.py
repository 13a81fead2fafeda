"""What becomes of each layer: it is converted, kept in BF16 and why, or refused."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import (
    fusion_key,
    is_embedding,
    is_expert,
    is_lm_head,
    is_router,
    linear_module,
    natural_key,
    output_name,
)
from convert_w4a8.checkpoint.safetensors_file import TensorSpec
from convert_w4a8.checkpoint.vllm_models import VllmModel
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.options import PATTERN, Options, Policy, Unsupported
from convert_w4a8.sources import LayerSpec
from convert_w4a8.targets.base import Target


class Codes(StrEnum):
    """What becomes of a layer's INT4 codes, as far as headers tell (`linear.kept_groups` says what kept means)."""

    KEPT = "kept"
    NEW = "new"
    UNDECIDED = "decided when read"


class Kept(StrEnum):
    """Kinds of reasons for which a quantized layer is kept in BF16."""

    ASKED = "kept by --keep"
    LM_HEAD = "the kernel does not serve lm_head"
    EMBEDDING = "the kernel does not serve embeddings"
    ROUTER = "vLLM does not quantize routers"
    UNQUANTIZED = "vLLM does not quantize it in this model"
    LOADER = "vLLM's model would load it wrongly"
    UNGATED = "vLLM's kernel needs experts with a gate"
    SIZE = "a size that the kernel cannot take"
    WIDTH = "a width that does not suit the kernel"
    TOGETHER = "served together with a layer that stays in 16 bits"


@dataclass(frozen=True)
class LayerPlan:
    """One layer and what becomes of it under its name in the output. Plain data, which can be pickled.

    dequantize: why the layer is kept in BF16, or None where it is converted; kept: what kind of reason that is.
    codes, why: what becomes of its codes, and why they are new or not decided yet.
    specs: the tensors of the output that it becomes.
    """

    spec: LayerSpec
    module: str
    dequantize: str | None
    codes: Codes
    why: str | None
    specs: tuple[TensorSpec, ...]
    kept: Kept | None = None


_Reasons = dict[str, tuple[Kept, str]]
"""Layer, by its name in the source → why it is kept in BF16."""


def plan_layers(
    checkpoint: Checkpoint,
    specs: Sequence[LayerSpec],
    carried: Collection[str],
    mixtures: Collection[str],
    target: Target,
    options: Options,
    problems: list[Problem],
) -> tuple[LayerPlan, ...]:
    """Return what becomes of each layer, in natural order; what is refused is appended to `problems`.

    carried: the layers that are carried over in FP8, by their names in the source. mixtures: the modules with experts.
    """
    reasons: _Reasons = {}
    _keep_asked(checkpoint, specs, carried, options.keep, reasons, problems)
    model = VllmModel.of(checkpoint.config)
    _keep_unserved(checkpoint, model, specs, mixtures, target, reasons, problems)
    groups: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        groups.setdefault(_group_of(model, spec.name), []).append(spec)
    _keep_ungated(groups, reasons)
    _keep_mixed(checkpoint, model, specs, groups, reasons)
    _keep_together(groups, reasons)
    _check_sizes(specs, target, options, reasons, problems)
    _keep_together(groups, reasons)
    _keep_widths(groups, target, reasons)
    _check_groups(specs, options, reasons, problems)
    _check_kept(model, reasons, problems)
    layers = []
    for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
        kept, reason = reasons.get(spec.name, (None, None))
        module = output_name(spec.name, checkpoint.config)
        n, k = spec.out_features, spec.in_features
        if kept is None and not target.unsupported_size(n, k):
            outputs = target.tensor_specs(module, n, k, options.scales)
        else:
            outputs = (TensorSpec(f"{module}.weight", "BF16", (n, k)),)
        layers.append(LayerPlan(spec, module, reason, *_codes(spec), outputs, kept))
    return tuple(layers)


def _keep_asked(
    checkpoint: Checkpoint,
    specs: Sequence[LayerSpec],
    carried: Collection[str],
    patterns: Sequence[str],
    reasons: _Reasons,
    problems: list[Problem],
) -> None:
    """Keep what --keep names, in the source's names, the output's, or vLLM's for what it merges."""
    for pattern in patterns:
        matches = _matcher(pattern)
        found = False
        for spec in specs:
            names = (spec.name, output_name(spec.name, checkpoint.config))
            if any(map(matches, (*names, *map(fusion_key, names)))):
                reasons.setdefault(spec.name, (Kept.ASKED, f"kept by --keep {pattern}"))
                found = True
        if eight_bit := next((name for name in sorted(carried) if matches(name)), None):
            reason = f"matches {eight_bit}, which is in FP8 and carried over as it is"
            problems.append(Problem(f"--keep {pattern}", reason, "name INT4 layers only"))
        elif not found and not any(matches(name.rpartition(".")[0]) for name in checkpoint.tensors):
            problems.append(
                Problem(
                    f"--keep {pattern}",
                    "matches no layer of the checkpoint",
                    f"give a layer's full name, or {PATTERN} and a regular expression that matches from its beginning",
                )
            )


def _matcher(pattern: str) -> Callable[[str], object]:
    if not pattern.startswith(PATTERN):
        return pattern.__eq__
    try:
        return re.compile(pattern.removeprefix(PATTERN)).match
    except (re.error, RecursionError, OverflowError) as error:
        raise ConvertError(f"--keep {pattern}", f"is not a regular expression ({error})", "correct it") from error


def _group_of(model: VllmModel, module: str) -> str:
    """Return the name of all that vLLM's model serves together with a layer."""
    return (None if is_expert(module) else model.merged_in(module)) or fusion_key(module)


def _keep_unserved(
    checkpoint: Checkpoint,
    model: VllmModel,
    specs: Iterable[LayerSpec],
    mixtures: Collection[str],
    target: Target,
    reasons: _Reasons,
    problems: list[Problem],
) -> None:
    """Keep what vLLM serves in 16 bits only, by what the layer is, and what its model would spoil in this format."""
    for spec in specs:
        if is_lm_head(spec.name):
            kept: tuple[Kept, str] | None = (Kept.LM_HEAD, str(Kept.LM_HEAD))
        elif is_embedding(spec.name):
            kept = (Kept.EMBEDDING, str(Kept.EMBEDDING))
        elif is_router(spec.name, mixtures):
            kept = (Kept.ROUTER, str(Kept.ROUTER))
        elif model.always_in_16_bits(spec.name):
            kept = (Kept.UNQUANTIZED, str(Kept.UNQUANTIZED))
        else:
            row = model.loader_row(output_name(spec.name, checkpoint.config), target.NAME)
            kept = (Kept.LOADER, row.reason) if row and row.remedy else None
            if row and not row.remedy:
                problems.append(Problem(spec.name, row.reason, "serve the source as it is"))
        if kept is not None:
            reasons.setdefault(spec.name, kept)


def _keep_ungated(groups: Mapping[str, Sequence[LayerSpec]], reasons: _Reasons) -> None:
    """Keep experts that have no gate: vLLM's CutlassExpertsW4A8Fp8 needs one (`_supports_no_act_and_mul`)."""
    for specs in groups.values():
        if is_expert(specs[0].name) and {spec.name.rpartition(".")[2] for spec in specs} <= {"up_proj", "down_proj"}:
            for spec in specs:
                reasons.setdefault(spec.name, (Kept.UNGATED, f"{Kept.UNGATED}, and this has none"))


def _check_kept(model: VllmModel, reasons: _Reasons, problems: list[Problem]) -> None:
    """Refuse what vLLM's model would load wrongly in 16 bits."""
    for name, (_, why_kept) in reasons.items():
        if wrong := model.kept_wrongly(name):
            problems.append(
                Problem(name, f"has to be kept in BF16 ({why_kept}), but {wrong}", "serve the source as it is")
            )


def _keep_mixed(
    checkpoint: Checkpoint,
    model: VllmModel,
    specs: Iterable[LayerSpec],
    groups: Mapping[str, Sequence[LayerSpec]],
    reasons: _Reasons,
) -> None:
    """Keep layers of which something that vLLM serves together with them is not quantized in the source."""
    ours = {spec.name for spec in specs}
    plain: dict[str, str] = {}
    for tensor in checkpoint.tensors.values():
        module = linear_module(tensor) if tensor.dtype in ("BF16", "F16", "F32") else None
        if module is not None and module not in ours and (key := _group_of(model, module)) in groups:
            plain.setdefault(key, module)
    for key, module in plain.items():
        reason = f"served together with {module}, which is not quantized in the source"
        for spec in groups[key]:
            reasons.setdefault(spec.name, (Kept.TOGETHER, reason))


def _keep_together(groups: Mapping[str, Sequence[LayerSpec]], reasons: _Reasons) -> None:
    """Keep what vLLM serves together with something that is kept: merged layers, the experts of a layer."""
    for specs in groups.values():
        first = next((spec.name for spec in specs if spec.name in reasons), None)
        if first is not None:
            for spec in specs:
                reasons.setdefault(spec.name, (Kept.TOGETHER, f"served together with {first}"))


def _check_sizes(
    specs: Iterable[LayerSpec], target: Target, options: Options, reasons: _Reasons, problems: list[Problem]
) -> None:
    """Keep or refuse, as the options say, what has a size that the format cannot hold."""
    for spec in specs:
        reason = None if spec.name in reasons else target.unsupported_size(spec.out_features, spec.in_features)
        if reason is None:
            continue
        if options.unsupported is Unsupported.DEQUANTIZE:
            reasons[spec.name] = (Kept.SIZE, reason)
        else:
            problems.append(Problem(spec.name, reason, "pass --unsupported dequantize to keep it in BF16"))


def _keep_widths(groups: Mapping[str, Sequence[LayerSpec]], target: Target, reasons: _Reasons) -> None:
    """Keep what is served in this format on no number of GPUs: sizes of merged layers and of experts."""
    for key, specs in groups.items():
        if specs[0].name in reasons:
            continue
        if is_expert(specs[0].name):
            multiple = target.EXPERT_MULTIPLE
            odd = next((s for s in specs if s.out_features % multiple or s.in_features % multiple), None)
            if odd is None:
                continue
            size = f"{odd.name} is {odd.out_features} × {odd.in_features}"
            reason = f"a size that is no multiple of {multiple}, which vLLM's kernel needs: {size}"
        else:
            widths = _merged_widths(specs)
            problem = target.unserved_width(widths)
            if problem is None:
                continue
            reason = f"{problem}: {key} has N = {sum(widths.values())}"
        reasons.update({spec.name: (Kept.WIDTH, reason) for spec in specs})


def _merged_widths(specs: Sequence[LayerSpec]) -> dict[str, int]:
    """Return each N in a merged layer. Where there are only q_proj and k_proj, vLLM loads k_proj as v_proj, too."""
    widths = {spec.name.rpartition(".")[2]: spec.out_features for spec in specs}
    return widths | ({"v_proj": widths["k_proj"]} if widths.keys() == {"q_proj", "k_proj"} else {})


def _check_groups(specs: Iterable[LayerSpec], options: Options, reasons: _Reasons, problems: list[Problem]) -> None:
    """Refuse groups that are not the kernel's, unless the options allow new codes."""
    if options.group_size is not Policy.ERROR:
        return
    problems.extend(
        Problem(
            spec.name,
            f"group_size {spec.group_size} is not a multiple of the kernel's {GROUP_SIZE}",
            "pass --group-size requantize to choose new codes (with a loss that is reported)",
        )
        for spec in specs
        if spec.group_size % GROUP_SIZE and spec.name not in reasons
    )


def _codes(spec: LayerSpec) -> tuple[Codes, str | None]:
    """Return what headers tell about a layer's codes, and why they are not kept for sure."""
    if spec.dense:
        return Codes.NEW, "not quantized in the source"
    if spec.group_size % GROUP_SIZE:
        return Codes.NEW, f"group size {spec.group_size}"
    if spec.act_order:
        return Codes.UNDECIDED, "activation order: new, unless g_idx is trivial"
    if not spec.symmetric:
        return Codes.UNDECIDED, "zero-points: kept where all are 8 or 7"
    if spec.has_zeros or spec.has_g_idx:
        return Codes.UNDECIDED, "kept, if the layer is symmetric as the configuration says"
    return Codes.KEPT, None
