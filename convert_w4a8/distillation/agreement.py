"""Whether the text of a training is text for its models: tokens that mean the same to both, no more than they take."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Sample

_TOKENIZER = "tokenizer.json"
_POSITIONS = ("max_position_embeddings", "n_positions")
_MOST = 1e6
"""Times, to which nobody stretches positions."""


def check_text(start: Checkpoint, teacher: Checkpoint, samples: Iterable[Sample]) -> None:
    """Check that two models can be compared on samples.

    Raises:
        ConvertError: a sample is longer than one of them takes, or their tokenizers give a token other numbers.

    """
    _check_tokenizers(start, teacher)
    longest = max(samples, key=len, default=None)
    for checkpoint in (teacher, start):
        limit = _positions(checkpoint)
        if limit is not None and longest is not None and len(longest) > limit:
            reason = f"has {len(longest):,} tokens, and {checkpoint.root.name} takes {limit:,}"
            raise ConvertError(longest.origin, reason, f"give --max-length {limit}, which cuts it, or leave it out")


def _positions(checkpoint: Checkpoint) -> int | None:
    """Return the most tokens that a model takes, as far as its configuration says it; None where it does not."""
    limit = next(filter(None, map(checkpoint.number, _POSITIONS)), None)
    return None if limit is None else max([limit, *_stretched(checkpoint.config, limit)])


def _stretched(config: Mapping[str, Any], limit: int) -> Iterator[int]:
    """Yield the limits that stretched rotary positions have, of which a model's own knows or does not."""
    factor, original = config.get("factor"), config.get("original_max_position_embeddings")
    if isinstance(factor, int | float) and not isinstance(factor, bool) and 1 <= factor < _MOST:
        yield int(factor * (original if isinstance(original, int) else limit))
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _stretched(value, limit)


def _check_tokenizers(start: Checkpoint, teacher: Checkpoint) -> None:
    files = [checkpoint.root / _TOKENIZER for checkpoint in (start, teacher)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = map(_numbers, files)
    if differs := next((token for token, number in ours.items() if theirs.get(token, number) != number), None):
        reason = f"has another tokenizer than OUT_W4A8: token {differs!r} is {theirs[differs]}, not {ours[differs]}"
        remedy = "give the model that OUT_W4A8 was made from as --teacher, or one with its tokenizer"
        raise ConvertError(str(teacher.root), reason, remedy)


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of the tokens that a tokenizer's file names, where it is of a kind that is known."""
    try:
        found = read_json(file)
    except ConvertError:
        return {}  # whoever needs it says so
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # of tokens with their scores
        pairs: Any = (
            (entry[0], number) for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry
        )
    else:
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    numbers = {str(token): number for token, number in pairs if isinstance(number, int)}
    added = found.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            numbers[str(token.get("content"))] = token["id"]
    return numbers
