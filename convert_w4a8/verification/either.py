"""Proof of a checkpoint, whichever command of this package wrote it."""

from collections.abc import Callable

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.verification import proof
from convert_w4a8.verification.distilled import is_distilled, verify_distilled


def check_choices(out: Checkpoint, *, min_sqnr_db: float | None, ray: str | None) -> None:
    """Raise ValueError where something was chosen that would have no effect: for a distilled checkpoint."""
    chosen = {"--min-sqnr-db": min_sqnr_db, "--ray": ray}
    option = next((name for name, value in chosen.items() if value is not None), None)
    if option is not None and is_distilled(out):
        raise ValueError(f"{option} is not for what w4a8 distill wrote")


def verify(
    out: Checkpoint,
    source: Checkpoint,
    *,
    min_sqnr_db: float | None = None,
    progress: Callable[[int], None] = lambda _nbytes: None,
    check: proof.CheckUnits | None = None,
) -> proof.Verification:
    """Compare a checkpoint with what it was converted from, or, if it was distilled, with the one that was trained.

    min_sqnr_db, check: as for `proof.verify`; a distilled checkpoint has bounds of its own, and is checked here.

    Raises:
        ConvertError: one of the two cannot be read.

    """
    if is_distilled(out):
        return verify_distilled(out, source, progress=progress)
    return proof.verify(out, source, min_sqnr_db=min_sqnr_db, progress=progress, check=check)
