"""How an output's numbers were chosen, in words: for its config.json, its card and the command line."""

from typing import Any

from convert_w4a8.calibration.options import Preset, QuantizeOptions, TableKind
from convert_w4a8.conversion.result import Recipe
from convert_w4a8.samples.sample import SampleSet
from convert_w4a8.text import counted

_TABLES = {
    TableKind.FREE: "free: every group of 128 weights has eight FP8 entries of its own",
    TableKind.SCALE: "one FP8 scale for every group of 128 weights",
}

_SCALES = "BF16, one for every group of 128 weights; symmetric"


def recipe(options: QuantizeOptions, samples: SampleSet | None) -> Recipe:
    """Return how a quantization with these options and samples is to be called."""
    record: dict[str, Any] = {"tables_chosen": str(options.tables), "calibration": None}
    rows = [("scales", _SCALES) if options.is_w4a16 else ("FP8 tables", _TABLES[options.tables])]
    if samples is None:
        name = "no data"
        sentence = "no calibration data was used."
        rows.append(("calibration", "none: codes and tables from the weights alone"))
    else:
        is_full = options.preset is Preset.FULL
        name = f"preset {options.preset}, {samples.kept:,} tokens"
        sentence = f"calibrated on {counted(len(samples.samples), 'sample')} with {samples.kept:,} tokens that count."
        how = "error feedback and coordinate descent, block by block" if is_full else "by the energies of the inputs"
        rows.append(("calibration", f"{how}; {samples.kept:,} of {samples.tokens:,} tokens count"))
        if options.scales_inputs:
            rows.append(
                ("AWQ scaling", "of input channels by powers of two; LoRA adapters made for the model do not fit")
            )
        rows.append(("calibration data", f"SHA-256 {samples.digest}"))
        record["calibration"] = {
            "preset": str(options.preset),
            "alpha": options.alpha,
            "damping": options.damping,
            "awq_scaling": options.scales_inputs,
            "samples": len(samples.samples),
            "tokens": samples.tokens,
            "tokens_kept": samples.kept,
            "sha256": samples.digest,
        }
    return Recipe(name, sentence, tuple(rows), "w4a8 quantize MODEL OUT", record)
