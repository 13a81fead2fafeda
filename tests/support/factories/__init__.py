"""Small checkpoints in every input format, with known weights, written without the package under test."""

from factories.cases import CASES, Case
from factories.checkpoints import Checkpoint, Options, write

__all__ = ["CASES", "Case", "Checkpoint", "Options", "write"]
