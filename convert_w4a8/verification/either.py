"""Proof of a checkpoint, whichever command of this package wrote it."""

from collections.abc import Callable

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.verification import proof
from convert_w4a8.verification.distilled import is_distilled, verify_distilled


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
