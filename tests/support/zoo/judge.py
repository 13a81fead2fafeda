"""What vLLM holds of a converted checkpoint, against what it holds of the BF16 twin."""

import re
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

from convert_w4a8 import api
from convert_w4a8.errors import W4A8Error
from convert_w4a8.options import Options
from zoo import engine
from zoo.engine import Rank
from zoo.holdings import Weight, holdings
from zoo.rows import FAILS, MODES, REFUSED, RIGHT, UNLOADABLE, WRONG, Row

RANKS = (Rank(), Rank(2, 1))
_SIZES = re.compile("multiples? of|divisible by|repeats output channels")
"""In the errors for a rank's part of a layer that the kernels cannot take."""
_REMEDY = re.compile(r"pass --([a-z-]+) (dequantize|requantize)\b")
_MIN_KEPT = 25.0, 18.0
"""Decibels of a whole weight whose codes are the source's, and of its worst output channel, so that one strange row
among many shows: FP8's steps of scales leave 30 dB or so, a weight in the wrong place leaves −3."""
_MIN_NEW = 15.0, 10.0
"""The same where codes are new: INT4's steps leave 20 dB or so."""
_MIN_EXACT_DB = 45.0
"""Of what is not INT4: at most rounding to BF16 lies between."""


def convert(source: Path, out: Path, output_format: str, scales: str) -> tuple[str, bool]:
    """Convert a source, with the options that a refusal names; return those, and whether any codes are new."""
    chosen: dict[str, str] = {}
    while True:
        options = Options(format=output_format, scales=scales, **chosen)  # type: ignore[arg-type]
        try:
            result = api.convert(source, out, options, device="cpu")
        except W4A8Error as error:
            remedies = {name.replace("-", "_"): value for name, value in _REMEDY.findall(str(error))}
            if remedies.keys() <= chosen.keys():
                raise
            chosen |= remedies
        else:
            used = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
            return used, not all(stats.codes_kept for _, stats in result.converted)


def judge(name: str, source: Path, twin: Path, work: Path) -> list[Row]:
    """Convert a source in every way and compare each output at every rank with the twin."""
    references = held_by(twin)
    rows = []
    layers = count_layers(source)
    for output_format, scales in MODES:
        out = work / f"{output_format}-{scales}"
        try:
            used, are_new = convert(source, out, output_format, scales)
        except W4A8Error as error:
            reason = " ".join(str(error).split())
            rows += [Row(name, output_format, scales, rank.size, REFUSED, reason, layers) for rank in RANKS]
            continue
        for rank in RANKS:
            status, reason, weights, int4 = compare(out, rank, references[rank.size], are_new=are_new)
            rows.append(Row(name, output_format, scales, rank.size, status, reason, layers, weights, int4, used))
    return rows


def held_by(twin: Path) -> dict[int, dict[str, Weight] | str]:
    """Return tensor-parallel size → what vLLM holds of a checkpoint in BF16, or why it does not."""
    references: dict[int, dict[str, Weight] | str] = {}
    for rank in RANKS:
        try:
            model = engine.load(twin, rank)
            lacking = engine.unfilled(model)
            references[rank.size] = {key: copy(weight) for key, weight in holdings(model).items()}
            if lacking:
                references[rank.size] = f"the BF16 twin is not loaded whole: {lacking[0]}"
        except Exception as error:  # noqa: BLE001 (whatever vLLM raises is its answer)
            references[rank.size] = brief(error)
    return references


def judge_output(name: str, out: Path, model: Path) -> list[Row]:
    """Compare an output that was quantized from a model in BF16 with it, at every rank."""
    references = held_by(model)
    found = [(rank, compare(out, rank, references[rank.size], are_new=True)) for rank in RANKS]
    return [Row(name, "", "", rank.size, status, why, 0, n, int4) for rank, (status, why, n, int4) in found]


def count_layers(source: Path) -> int:
    """Return how many INT4 layers a checkpoint has, by the names of their codes."""
    count = 0
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(name.endswith((".weight_packed", ".qweight")) for name in tensors.keys())  # noqa: SIM118
    return count


def compare(out: Path, rank: Rank, reference: dict[str, Weight] | str, *, are_new: bool) -> tuple[str, str, int, int]:
    """Return status, reason, and how many weights there are, and how many of them in INT4.

    are_new: whether some codes are not the source's.
    """
    if isinstance(reference, str):
        return UNLOADABLE, reference, 0, 0
    try:
        model = engine.load(out, rank)
    except Exception as error:  # noqa: BLE001
        reason = brief(error)
        return (REFUSED if rank.size > 1 and _SIZES.search(reason) else FAILS), reason, 0, 0
    lacking = engine.unfilled(model)
    found = holdings(model)
    faults = [*lacking, *differences(reference, found, _MIN_NEW if are_new else _MIN_KEPT)]
    int4 = sum(weight.kind != "16" for weight in found.values())
    if not faults:
        return RIGHT, "" if int4 else "nothing of it is INT4", len(found), int4
    reason = "; ".join([*faults[:3], *([f"{len(faults) - 3} more"] if len(faults) > 3 else [])])
    return (FAILS if _plugin_notices(model) else WRONG), reason, len(found), int4


def _plugin_notices(model: torch.nn.Module) -> bool:
    """Whether our plugin raises an error once the weights are loaded: it does where channel scales are not."""
    parameters = (pair for module in model.modules() if engine.is_ours(module) for pair in module.named_parameters())
    return any(bool(value.isnan().any()) for name, value in parameters if name.endswith("weight_chan_scale"))


def differences(reference: dict[str, Weight], found: dict[str, Weight], floor: tuple[float, float]) -> list[str]:
    """Return what of the reference is not found as it should be.

    floor: the signal-to-error ratio of INT4 weights in dB, of a whole weight and of its worst row.
    """
    faults = [f"{name}: is not there" for name in reference if name not in found]
    for name, weight in found.items():
        if name not in reference:
            faults.append(f"{name}: the BF16 model has none")
            continue
        want, got = reference[name].values.float(), weight.values.float()
        if want.shape != got.shape:
            faults.append(f"{name}: {list(got.shape)}, not {list(want.shape)}")
        elif weight.kind == "16":
            if (db := decibels(want, got)) < _MIN_EXACT_DB:
                faults.append(f"{name}: {db:.1f} dB")
        else:
            whole, row = decibels(want, got), decibels_of_rows(want, got)
            if whole < floor[0] or row < floor[1]:
                faults.append(f"{name}: {whole:.1f} dB, its worst row {row:.1f} dB")
    return faults


def decibels(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return the signal-to-error ratio; infinite where equal."""
    error = (want - got).square().sum()
    return float("inf") if error == 0 else float(10 * (want.square().sum() / error).log10().nan_to_num(-99))


def decibels_of_rows(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return the smallest ratio of any row."""
    error, signal = (want - got).square().sum(-1), want.square().sum(-1)
    return float(10 * (signal / error.clamp(min=1e-30)).log10().nan_to_num(-99).min())


def copy(weight: Weight) -> Weight:
    """Return a weight that outlives its model."""
    return Weight(weight.kind, weight.values.clone())


def brief(error: BaseException) -> str:
    """Return an error in one line, with where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/vllm" in frame.filename] or frames
    where = f" [{Path(ours[-1].filename).name}:{ours[-1].lineno}]" if ours else ""
    return text + where
