"""Calibration data from files to samples with masks."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.encode import encode
from convert_w4a8.samples.lines import Record, read_records
from convert_w4a8.samples.masks import NO_MASK, MaskOptions, Which, mask_kinds
from convert_w4a8.samples.repeats import repeated
from convert_w4a8.samples.sample import REASONS, Sample, SampleSet, TokenKind, count
from convert_w4a8.samples.tokenizer import Tokenizer


def read_samples(
    paths: Iterable[Path],
    tokenizer: Tokenizer,
    masks: MaskOptions = NO_MASK,
    *,
    max_tokens: int | None = None,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> SampleSet:
    """Read calibration data, in the order of the files and lines.

    tokenizer: as `open_tokenizer` returns it. max_tokens: of all samples together, masked or not; the last one is cut.
    max_length: of one sample; longer ones lose their end. vocab_size: rows of the model's embedding; by default as many
    as the tokenizer has tokens.

    Raises:
        ConvertError: a file or line is not as it should be, or no token is left that counts.

    """
    paths = list(paths)
    samples: list[Sample] = []
    cut, room = 0, max_tokens
    records = read_records(paths)
    while (room is None or room > 0) and (record := next(records, None)) is not None:
        limit = min((n for n in (room, max_length) if n is not None), default=None)
        sample, whole = _sample(tokenizer, record, masks, limit, vocab_size or len(tokenizer))
        samples.append(sample)
        cut += not whole
        room = None if room is None else room - len(sample)
    if not samples:
        names = ", ".join(map(str, paths)) or "--data"
        raise ConvertError(names, "holds no samples", "name files of JSON lines with messages, text or input_ids")
    _mask_repeated(samples, masks)
    used = tuple(sample for sample in samples if sample.kept.any())
    if not used:
        seen = sum(map(len, samples))
        raise ConvertError("calibration data", f"all of its {seen:,} tokens are masked", "mask less, or add other data")
    return SampleSet(used, count(samples), wholly_masked=len(samples) - len(used), cut=cut)


def _sample(
    tokenizer: Tokenizer, record: Record, masks: MaskOptions, limit: int | None, vocab_size: int
) -> tuple[Sample, bool]:
    """Return a record as a sample, and whether it is whole."""
    tokens, kinds = encode(tokenizer, record, vocab_size)
    if kinds is None:
        if masks.need_kinds:
            reason = f"the chat template hides what comes from where; {', '.join(masks.need_kinds)} cannot be masked"
            raise ConvertError(record.origin, reason, "mask with repeated, or with a column loss_mask")
        kinds = np.full(len(tokens), TokenKind.TEXT, np.uint8)
    masked_by = np.zeros(len(tokens), np.uint8)
    if record.loss_mask is not None:
        if len(record.loss_mask) != len(tokens):
            reason = f"loss_mask has {len(record.loss_mask):,} entries for {len(tokens):,} tokens"
            raise ConvertError(record.origin, reason, "give one for each token; input_ids say which these are")
        masked_by[np.array(record.loss_mask) == 0] = 1 + REASONS.index("loss_mask")
    mask_kinds(kinds, masked_by, masks)
    whole = limit is None or len(tokens) <= limit
    return Sample(tokens[:limit], kinds[:limit], masked_by[:limit], record.origin), whole


def _mask_repeated(samples: list[Sample], masks: MaskOptions) -> None:
    """Mask repeated spans in place, but tokens that are masked already."""
    if masks.repeated is Which.NONE:
        return
    keep_first = masks.repeated is Which.LATER
    tokens = [sample.tokens for sample in samples]
    kept = [sample.kept for sample in samples]
    found = repeated(tokens, ngram=masks.ngram, min_samples=masks.samples, keep_first=keep_first, kept=kept)
    for sample, spans in zip(samples, found, strict=True):
        sample.masked_by[spans & (sample.masked_by == 0)] = 1 + REASONS.index("repeated")
