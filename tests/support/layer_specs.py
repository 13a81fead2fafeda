"""What a checkpoint's format finds in it."""

from pathlib import Path

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.errors import Problem
from convert_w4a8.sources import LayerSpec, Source, find_source
from convert_w4a8.sources.carried import find_carried


def find_layers(path: Path) -> tuple[list[LayerSpec], list[Problem]]:
    """Return what the format of a checkpoint finds in it."""
    checkpoint = open_checkpoint(path)
    problems: list[Problem] = []
    source = find_source(checkpoint)
    specs = source.find_layers(checkpoint, problems)
    find_carried(source, checkpoint, problems)
    return specs, problems


def opened(path: Path) -> tuple[Checkpoint, Source, list[LayerSpec]]:
    """Open a checkpoint whose headers are in order; return its format and layers too."""
    checkpoint = open_checkpoint(path)
    source = find_source(checkpoint)
    problems: list[Problem] = []
    specs = source.find_layers(checkpoint, problems)
    assert not problems
    return checkpoint, source, specs
