"""Small checkpoints in every input format, with known weights, written without the package under test."""

from factories.cases import CASES, SEVENS, Case
from factories.checkpoints import Checkpoint, Options, write

__all__ = ["CASES", "SEVENS", "Case", "Checkpoint", "Options", "write"]
