"""Whether `ignore` of an output says to vLLM what its tensors are, whoever wrote it."""

import re
from collections.abc import Collection, Iterator

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import (
    find_stacked_mixtures,
    fusion_key,
    linear_modules,
)
from convert_w4a8.checkpoint.served_names import also_called, asked_names, expert_names, served_names
from convert_w4a8.checkpoint.vllm_models import VllmModel
from convert_w4a8.lut_format import PATTERN, IgnoreList


def find_contradictions(out: Checkpoint, converted: Collection[str], *, whole: bool) -> Iterator[str]:
    """Yield what `ignore` says of an output that its tensors do not.

    converted: the modules that are W4A8. whole: whether these are all that vLLM will ask for, not a sample.
    """
    entries = out.quantization_config.get("ignore")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        yield "is not a list of names"
        return
    try:
        ignored = IgnoreList(frozenset(entries))
    except (re.error, RecursionError, OverflowError) as error:
        yield f"holds what is not a regular expression ({error})"
        return
    plain = linear_modules(out.tensors.values()) - set(converted)
    if missing := next((module for module in sorted(plain) if module not in ignored), None):
        yield f"does not list the modules that are not quantized, such as {missing}"
    names = IgnoreList(frozenset(entry for entry in entries if not entry.startswith(PATTERN)))
    patterns = IgnoreList(ignored.entries - names.entries)
    called = {*converted, *also_called(VllmModel.of(out.config), converted)}
    asked = asked_names(called)
    wrong = next((name for name in sorted(asked) if name in names), None) or next(
        (name for name in sorted(served_names(called)) if name in patterns), None
    )
    if wrong:
        yield f"covers what is quantized, such as {wrong}"
    floats = (info for info in out.tensors.values() if info.dtype in ("BF16", "F32"))
    for mixture in find_stacked_mixtures(floats, out.config):
        experts = f"{mixture}.experts"
        if experts not in asked and not all(name in ignored for name in expert_names(experts)):
            yield f"does not list {experts}, which is not quantized"
    if whole:
        mixed = set(map(fusion_key, converted)) & set(map(fusion_key, plain))
        if mixed:
            yield f"has only a part of {min(mixed)}, which vLLM serves as one"
