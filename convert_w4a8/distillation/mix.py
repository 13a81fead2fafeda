"""Which samples are trained and measured on: more of those domains that quantization hurt more.

The domain of a sample, its tag, is the name of its file without endings.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.distillation.data import Batch, in_batches, make_batch, rows_of
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.overlap import conversations, last_calls, overlapping
from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.sample import Joined, Sample

DROP, UNIFORM = "drop", "uniform"
"""Mixes that have names."""
FLOOR = 0.25
"""The part of all tokens that is shared evenly, so that no domain is forgotten."""
_ENOUGH = 8
"""So many samples of a domain show how sure a gain is, …"""
_EVERY = (4, 16)
"""… so one of 16 is held out where that is enough, and of fewer than 128 more, up to one of 4, …"""
_HELD_OUT_TOKENS = 32_768
"""… while these are no more tokens."""
_REMEDY = "name one number for each file of --data, by its name without endings"


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on and to measure on. drops: of each domain, for the mix; None: those that are measured.

    uniform: as much of each domain, whatever the drops.
    """

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    drops: Mapping[str, float] | None = None
    uniform: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Be sent to other processes in few arrays, which takes a third of the time of as many samples."""
        return _together, (Joined.of(self.samples), Joined.of(self.held_out), self.drops, self.uniform)

    def digest(self) -> str:
        """Return a SHA-256 of all that a training can depend on."""
        found = hashlib.sha256(repr((self.uniform, self.drops and sorted(self.drops.items()))).encode())
        for sample in (*self.samples, *self.held_out):
            found.update(repr((len(sample), tag_of(sample))).encode())
            found.update(sample.tokens.astype("<i4").tobytes())
            found.update(sample.kept.tobytes())
        return found.hexdigest()


def _together(samples: Joined, held_out: Joined, drops: Mapping[str, float] | None, uniform: bool) -> TrainingData:
    return TrainingData(samples.samples(), held_out.samples(), drops, uniform)


def training_data(
    samples: Sequence[Sample], held_out: Sequence[Sample] | None, mix: str | PathLike[str] | Mapping[str, float]
) -> TrainingData:
    """Return the data of a training: of the samples, those in which a prediction counts.

    held_out: samples to measure on, of which those that are the beginning of another one of their domain are left out;
    None: some of each domain. mix: `DROP`, `UNIFORM`, the drop of each domain, or the JSON file that has them.

    Raises:
        ConvertError: too few samples are left to train or to measure on, or a domain has no drop.

    """
    samples = _with_predictions(samples, "--data")
    if held_out is not None:
        held_out = _with_predictions(held_out, "--held-out")
    else:
        samples, held_out = hold_out(samples)
    held_out = _once(held_out)
    samples = apart(samples, held_out)
    tags = list(by_tag(samples))
    drops, uniform = None, mix == UNIFORM
    if isinstance(mix, Mapping):
        drops = _drops_of(mix, tags, "the drops")
    elif mix not in (DROP, UNIFORM):
        drops = read_drops(Path(mix), tags)
    elif mix == DROP:
        measured = by_tag(held_out)
        missing = [tag for tag in tags if tag not in measured]
        uniform = missing == tags and len(tags) == 1  # all is of one domain, whatever its drop is
        if missing and not uniform:
            reason = "is a domain of --data, and none of --held-out: its drop is not known"
            raise ConvertError(missing[0], reason, "hold some of it out too, or name the drops with --mix FILE")
    return TrainingData(tuple(samples), tuple(held_out), drops, uniform=uniform)


def _with_predictions(samples: Sequence[Sample], subject: str) -> list[Sample]:
    """Return the samples in which a prediction counts. A sample of one token has none, and a mask may leave none."""
    found = [sample for sample in samples if rows_of(sample)]
    if not found:
        reason = "has no sample in which the prediction of a token counts"
        raise ConvertError(subject, reason, "give samples of two tokens or more, of which --mask leaves some")
    return found


def tag_of(sample: Sample) -> str:
    """Return the domain of a sample. `Sample.origin` is FILE line N, or FILE document N."""
    return _domain(sample.origin.rsplit(" ", 2)[0])


@cache
def _domain(path: str) -> str:
    """Return the domain of a file; many samples come of each."""
    name = Path(path).name
    return name.partition(".")[0] or name


def by_tag(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the numbers of the samples of each domain, in order."""
    found: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        found.setdefault(tag_of(sample), []).append(number)
    return found


def _once(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that are the beginning of no other one of their domain: a text is to count once."""
    kept: set[int] = set()
    for numbers in by_tag(samples).values():
        kept.update(numbers[last] for last in last_calls([samples[number] for number in numbers]))
    return [sample for number, sample in enumerate(samples) if number in kept]


def hold_out(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to train on and those to measure on: of each domain some, evenly spread.

    Where samples are the beginning of others, the last ones of some conversations are held out (`conversations`).

    Raises:
        ConvertError: a domain has one sample only, or those of one conversation.

    """
    held: set[int] = set()
    for tag, all_numbers in by_tag(samples).items():
        numbers = [all_numbers[last] for last in conversations([samples[number] for number in all_numbers])]
        if len(numbers) < 2:
            reason = "has one sample, or beginnings of one, and some have to be held out to measure on"
            raise ConvertError(tag, reason, "add samples, or name others with --held-out")
        room = _HELD_OUT_TOKENS
        least, most = _EVERY
        every = min(max(len(numbers) // _ENOUGH, least), most)
        for mine, number in enumerate(numbers[every // 2 :: every] or numbers[-1:]):
            if mine and len(samples[number]) > room:
                break
            room -= len(samples[number])
            held.add(number)
    return (
        [sample for number, sample in enumerate(samples) if number not in held],
        [samples[number] for number in sorted(held)],
    )


def apart(samples: Sequence[Sample], held_out: Sequence[Sample]) -> list[Sample]:
    """Return the samples that are not among those to measure on, nor the beginning of one, nor go on from one.

    Raises:
        ConvertError: none is left, or one sample to measure on, which shows no error.

    """
    if len(held_out) < 2:
        reason = "is one sample, which shows no standard error"
        raise ConvertError("the text to measure on", reason, "add samples, or name more of them with --held-out")
    held = overlapping(samples, held_out)
    left = [sample for number, sample in enumerate(samples) if number not in held]
    if not left:
        raise ConvertError("--held-out", "has all samples of --data", "name other text to measure on")
    return left


def check_domains(files: Sequence[Path]) -> None:
    """Raise ConvertError where two files are of one name, and so of one domain."""
    names = [_domain(str(path)) for path in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConvertError(twice, "is the domain of two files of --data", "rename one of them")


def read_drops(path: Path, tags: Sequence[str]) -> dict[str, float]:
    """Return how much quantization cost each domain, from a JSON object of numbers, or one with it under `drops`.

    Raises:
        ConvertError: a domain is missing, or has no such number.

    """
    if not path.exists():
        raise ConvertError(f"--mix {path}", "is no file", f"give {DROP}, {UNIFORM}, or a JSON file of drops")
    found: Any = read_json(path)
    return _drops_of(found.get("drops", found), tags, str(path))


def _drops_of(found: Any, tags: Sequence[str], subject: str) -> dict[str, float]:
    drops = {}
    for tag in tags:
        value = found.get(tag) if isinstance(found, Mapping) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConvertError(f"{subject}: {tag}", "is absent, or not a number", _REMEDY)
        drops[tag] = float(value)
    return drops


def shares(drops: Mapping[str, float], floor: float = FLOOR) -> dict[str, float]:
    """Return the share of the tokens of each domain: `floor` evenly, the rest as the drops are, none for gains."""
    least = {tag: max(0.0, drop) for tag, drop in drops.items()}
    total = sum(least.values())
    if not total:
        return dict.fromkeys(drops, 1 / len(drops))
    return {tag: floor / len(drops) + (1 - floor) * drop / total for tag, drop in least.items()}


def mixed(samples: Sequence[Sample], parts: Mapping[str, float], options: DistillOptions) -> Callable[[int], Batch]:
    """Return the batch of each step. All samples of a domain come once in a random order, then again in another."""
    order = _order(samples, parts, options.seed)
    plan = list(islice(in_batches(samples, order, options.batch_tokens), options.steps))
    return lambda step: make_batch(samples, plan[step])


def _order(samples: Sequence[Sample], parts: Mapping[str, float], seed: int) -> Iterator[int]:
    """Yield numbers of samples without end: next is always the domain that is furthest behind its share."""
    numbers = by_tag(samples)
    streams = {tag: _endless(numbers[tag], seed, place) for place, tag in enumerate(sorted(numbers))}
    served = dict.fromkeys(streams, 0.0)
    while True:
        tag = min(streams, key=lambda each: (served[each], each))
        number = next(streams[tag])
        served[tag] += len(samples[number]) / parts[tag]
        yield number


def _endless(numbers: Sequence[int], seed: int, place: int) -> Iterator[int]:
    epoch = 0
    while True:
        generator = np.random.default_rng((seed, place, epoch))
        yield from (numbers[i] for i in generator.permutation(len(numbers)).tolist())
        epoch += 1
