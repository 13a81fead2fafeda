"""Where a training may write."""

from pathlib import Path

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.disk import check_destination, real_path
from convert_w4a8.checkpoint.places import check_name
from convert_w4a8.conversion.destination import check_replaceable
from convert_w4a8.distillation.state import StateDirectory
from convert_w4a8.errors import ConvertError


def check_paths(
    start: Checkpoint,
    teacher: Checkpoint,
    out: Path,
    *,
    overwrite: bool,
    resume: bool,
    teacher_logits: Path | None = None,
) -> None:
    """Check that the output can be written at `out`, without touching anything.

    Raises:
        ConvertError: `out` or `teacher_logits` overlaps an input or the working directory, or `out` is taken.

    """
    targets = {path: _resolved(path) for path in (out, teacher_logits) if path is not None}
    for path, target in targets.items():
        for checkpoint in (start, teacher):
            check_name(checkpoint.root.absolute())
            source = checkpoint.root.resolve()
            if source == target or source in target.parents or target in source.parents:
                raise ConvertError(str(path), f"overlaps {checkpoint.root}", "choose another path for it")
        check_name(path.absolute())
        if target == Path.cwd() or target in Path.cwd().parents:
            raise ConvertError(str(path), "is the working directory or above it", "choose another path for it")
    target = targets[out]
    if teacher_logits is not None:
        other = targets[teacher_logits]
        if other == target or target in other.parents or other in target.parents:
            raise ConvertError(str(teacher_logits), f"overlaps {out}", "choose another path for it")
    check_destination(out, overwrite=overwrite or resume)
    if overwrite:
        check_replaceable(out, start)
    StateDirectory(target).check(resume=resume, overwrite=overwrite)


def _resolved(path: Path) -> Path:
    try:
        return real_path(path)
    except OSError as error:
        raise ConvertError(str(path), "is or lies behind a link that leads nowhere", "choose another path") from error
