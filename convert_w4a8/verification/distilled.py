"""Proof of what `w4a8 distill` wrote, from it and the checkpoint that it was trained from.

What training chose cannot be proved from bytes: whether it is good is a matter of measuring predictions. What can be
wrong without showing is checked: layout and tables that are no numbers, codes that were to stay, tensors and settings
that no training changes, files.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CONFIG
from convert_w4a8.encoding.tables import count_clipped, decode
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import DenseLinear, W4A8Linear
from convert_w4a8.targets import find_target
from convert_w4a8.verification.accounting import account
from convert_w4a8.verification.files import check_copy, problem, same
from convert_w4a8.verification.layers import LayerCheck, check_layer, judge
from convert_w4a8.verification.proof import Verification
from convert_w4a8.verification.reading import LibraryReader

_REMEDY = "distill the checkpoint again"
_LARGEST_CHANGE = 0.5
"""Relative to the root mean square of the values of a norm, a bias or embeddings, the root mean square that training
may change them by: a trained model differs by a few hundredths."""
_LARGEST_OF_ROW = 1.0
"""Likewise of a row of embeddings, relative to all of them: the row of another token differs by 1.4, as a rule."""
_ROWS = 4096
"""Rows that are compared at a time."""


def is_distilled(out: Checkpoint) -> bool:
    """Whether a checkpoint says that `w4a8 distill` wrote it."""
    conversion = out.quantization_config.get("conversion")
    return isinstance(conversion, dict) and isinstance(conversion.get("distillation"), dict)


def verify_distilled(
    out: Checkpoint, start: Checkpoint, *, progress: Callable[[int], None] = lambda _nbytes: None
) -> Verification:
    """Compare a trained checkpoint with the one that it was trained from.

    Layers have the same shapes; their tables and channel scales are numbers; their weights have 6 dB of SQNR against
    those before, every output channel 3 dB; where the preset was `tables`, all codes are the same. Vectors in 16 bits
    (norms, biases), and embeddings that the output says were trained, of these every row, are finite and have not moved
    far; embeddings that are tied and stored twice still are the same. All else is the same, byte for byte; of
    config.json all but `quantization_config.conversion`.

    Raises:
        ConvertError: one of the two cannot be read.

    """
    target, read = find_target(out), LibraryReader()
    conversion = out.quantization_config["conversion"]["distillation"]
    keeps_codes = conversion.get("preset") != "weights"
    embeddings = conversion.get("embeddings")
    may_change = set(map(str, embeddings)) if isinstance(embeddings, list) else set()
    problems: list[Problem] = []
    checks: list[LayerCheck] = []
    try:
        names = set(find_target(start).find_layers(start))
    except ConvertError as error:
        reason = f"is not the W4A8 checkpoint that {out.root.name} was trained from"
        raise ConvertError(str(start.root), reason, "give that to --source") from error
    problems += [problem(name, "is not in the output") for name in sorted(start.tensors.keys() - out.tensors.keys())]
    problems += [
        problem(name, "is in the output, but not in what was trained")
        for name in sorted(out.tensors.keys() - start.tensors.keys())
    ]
    done: set[str] = set()
    for name in sorted(names):
        parts = {tensor for tensor in start.tensors if tensor.rpartition(".")[0] == name}
        done |= {tensor for tensor in parts if not tensor.endswith(".bias")}
        try:
            before, after = target.decode(start, name, read), target.decode(out, name, read)
        except (ConvertError, KeyError) as error:
            problems.append(error.problem if isinstance(error, ConvertError) else problem(name, "is not whole"))
            continue
        if not isinstance(before, W4A8Linear) or not isinstance(after, W4A8Linear):
            problems.append(problem(name, "is not W4A8"))
            continue
        if before.shape_nk != after.shape_nk:
            problems.append(problem(name, f"is {list(after.shape_nk)}, was {list(before.shape_nk)}"))
            continue
        problems += _numbers(name, after)
        if keeps_codes and not torch.equal(before.packed, after.packed):
            problems.append(problem(name, "has other INT4 codes than before, though only tables were trained"))
        check = check_layer(name, DenseLinear(decode(before)), after, calibrated=True)
        checks.append(check)
        problems += judge(check, source_keeps=False, min_sqnr_db=None)
        progress(sum(start.tensors[tensor].nbytes for tensor in parts))
    for name, info in start.tensors.items():
        if name in done or name not in out.tensors:
            continue
        if (len(info.shape) == 1 or name in may_change) and info.dtype == "BF16":
            problems += _vector(name, read(info), read(out.tensors[name]))
        else:
            problems += check_copy(info, out.tensors[name], name, read)
        progress(info.nbytes)
    problems += _tied(out, start, may_change, read)
    problems += _settings(out, start)
    accounts = account(out, start)
    return Verification(
        target.NAME,
        tuple(checks),
        tuple(replace(found, remedy=_REMEDY) for found in (*problems, *accounts.problems)),
        added=accounts.added,
        left_out=accounts.left_out,
        copied_weights=accounts.copied_weights,
    )


def _numbers(name: str, w: W4A8Linear) -> list[Problem]:
    """Check that a layer's tables and channel scales are numbers."""
    found = []
    if count_clipped(w):
        found.append(problem(name, "has table entries that are no numbers"))
    if not bool((w.channel_scale.isfinite() & (w.channel_scale > 0)).all()):
        found.append(problem(name, "has channel scales that are not positive numbers"))
    return found


def _vector(name: str, before: torch.Tensor, after: torch.Tensor) -> list[Problem]:
    """Check a vector, or embeddings, that may have been trained."""
    if after.dtype != before.dtype or after.shape != before.shape:
        return [problem(name, f"is {after.dtype} {list(after.shape)}, was {before.dtype} {list(before.shape)}")]
    if not bool(after.isfinite().all()):
        return [problem(name, "is not finite")]
    if before.dim() > 1:
        return _rows(name, before, after)
    change = (after.double() - before.double()).square().mean().sqrt()
    if change > _LARGEST_CHANGE * before.double().square().mean().sqrt() + 2.0**-7:
        return [problem(name, f"has changed by {float(change):.3g}, more than a training does")]
    return []


def _rows(name: str, before: torch.Tensor, after: torch.Tensor) -> list[Problem]:
    """Check embeddings: all of them, and the row of each token, which may not be another token's."""
    parts = list(zip(torch.split(before, _ROWS), torch.split(after, _ROWS), strict=True))
    size = torch.cat([was.double().square().mean(1) for was, _ in parts]).mean().sqrt()
    changes = torch.cat([(now.double() - was.double()).square().mean(1) for was, now in parts])
    change, (largest, row), unit = changes.mean().sqrt(), changes.sqrt().max(0), max(float(size), 2.0**-7)
    if change > _LARGEST_CHANGE * unit:
        return [problem(name, f"has changed by {float(change):.3g}, more than a training does")]
    if largest > _LARGEST_OF_ROW * unit:
        return [problem(name, f"has changed by {float(largest):.3g} in row {int(row)}, more than a training does")]
    return []


def _tied(out: Checkpoint, start: Checkpoint, trained: AbstractSet[str], read: LibraryReader) -> Iterator[Problem]:
    """Check that embeddings that are tied, and that the checkpoint has twice, are the same after the training, too."""
    if start.config.get("tie_word_embeddings") is not True:
        return
    for name in sorted(trained & start.tensors.keys() & out.tensors.keys()):
        info = start.tensors[name]
        for other, found in start.tensors.items():
            if other == name or other not in out.tensors or (found.shape, found.dtype) != (info.shape, info.dtype):
                continue
            was, now = ((read(from_.tensors[name]), read(from_.tensors[other])) for from_ in (start, out))
            if torch.equal(*was) and not torch.equal(*now):
                yield problem(other, f"is no longer what {name} is, though config.json ties them")


def _settings(out: Checkpoint, start: Checkpoint) -> list[Problem]:
    """Check that config.json says what it did, but for how the checkpoint was made."""

    def parts(checkpoint: Checkpoint) -> dict[str, object]:
        block = {key: value for key, value in checkpoint.quantization_config.items() if key != "conversion"}
        return {**checkpoint.config, "quantization_config": block}

    ours, theirs = parts(out), parts(start)
    return [
        problem(f"{CONFIG}: {key}", "is not what it was before the training")
        for key in sorted(ours.keys() | theirs.keys())
        if not (key in ours and key in theirs and same(ours[key], theirs[key]))
    ]
