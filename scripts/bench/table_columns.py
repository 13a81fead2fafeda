"""The columns of all tables of the documents, of which tables.py fills the cells: columns/ has a module by document."""

from types import ModuleType

from columns import (
    Columns,
    architectures,
    calibration,
    cluster,
    conversion,
    distillation,
    evaluate,
    quality,
    serving,
)
from columns.conversion import COPY

__all__ = ["COLUMNS", "COPY", "DOCUMENTS", "Columns"]

DOCUMENTS: tuple[ModuleType, ...] = (
    architectures,
    calibration,
    cluster,
    conversion,
    distillation,
    evaluate,
    quality,
    serving,
)
COLUMNS: dict[str, Columns] = {name: found for each in DOCUMENTS for name, found in each.COLUMNS.items()}
