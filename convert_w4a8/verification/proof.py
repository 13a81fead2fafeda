"""Proof of a conversion from the two directories alone: every layer decoded from its bytes and compared."""

import filecmp
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import linear_modules, natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding import tables
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.encoding.tables import count_clipped
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO, DenseLinear, W4A8Linear, W4Linear, keeps_codes
from convert_w4a8.quantization.baselines import round_to_nearest
from convert_w4a8.quantization.error import energy, sqnr_db
from convert_w4a8.sources import LayerSpec, find_source
from convert_w4a8.targets import find_target
from convert_w4a8.targets.base import Target
from convert_w4a8.verification.reading import LibraryReader

MIN_SQNR_DB_KEPT = 25.0
"""Layers whose codes are kept lose only the rounding of scales and tables: 29 dB and more are usual. A wrong nibble
order or zero-point rule leaves less than 10 dB."""
MAX_LOSS_DB_NEW = 2.0
"""New codes may lose this much against round to nearest of the source (`baselines.round_to_nearest`): they are better
than it, and lose less than 1 dB to the rounding of scales and tables. Codes that are not the source's at all,
such as those of an ignored g_idx, lose 4 dB and more."""
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the output against the dequantized source layer.

    codes_kept: all codes of the source keep their values (`linear.kept_groups`).
    sqnr_db: signal-to-noise ratio of the weights that the tensor core sees. max_error: largest absolute difference.
    clipped: table entries that are NaN, or that saturate.
    distinct_scales: different FP8 group scales; None where the tables are stored.
    expected_sqnr_db: the least SQNR of a right conversion.
    """

    module: str
    out_features: int
    in_features: int
    codes_kept: bool
    sqnr_db: float
    max_error: float
    clipped: int
    distinct_scales: int | None
    expected_sqnr_db: float


@dataclass(frozen=True)
class Verification:
    """The checks of all layers, and every problem found; without problems the conversion is right."""

    target: str
    layers: tuple[LayerCheck, ...]
    problems: tuple[Problem, ...]


def verify(
    out: Checkpoint,
    source: Checkpoint,
    *,
    min_sqnr_db: float | None = None,
    progress: Callable[[int], None] = lambda _nbytes: None,
) -> Verification:
    """Compare a converted checkpoint with its source.

    min_sqnr_db: least SQNR of a layer; by default 25 dB where codes are kept, and where they are new, 2 dB less than
        plain round-to-nearest of the source has.
    progress: called with the number of source bytes compared since the last call.

    Raises:
        ConvertError: one of the two cannot be read.

    """
    target, reader, read = find_target(out), find_source(source), LibraryReader()
    problems: list[Problem] = []
    specs = {output_name(spec.name, source.config): spec for spec in reader.find_layers(source, problems)}
    converted = set(target.find_layers(out))
    expected: set[str] = set()
    checks = []
    for module, spec in sorted(specs.items(), key=lambda item: natural_key(item[0])):
        w = reader.read_layer(spec, read)
        if module in converted:
            w4a8 = _decode(target, out, module, read, w.shape_nk, problems)
            if w4a8 is None:
                expected.update(name for name in out.tensors if name.rpartition(".")[0] == module)
            else:
                for mode in target.MODES:
                    expected.update(part.name for part in target.tensor_specs(module, *w4a8.shape_nk, mode))
                check = _check_layer(module, spec, w, w4a8)
                checks.append(check)
                problems.extend(_judge(check, min_sqnr_db))
        else:
            expected.add(f"{module}.weight")
            problems.extend(_check_dequantized(out, f"{module}.weight", read, w))
        progress(spec.nbytes)
    consumed = {part.name for spec in specs.values() for part in spec.parts.values()}
    for info in source.tensors.values():
        if info.name not in consumed:
            name = output_name(info.name, source.config)
            expected.add(name)
            problems.extend(_check_copy(info, out.tensors.get(name), name, read))
            progress(info.nbytes)
    problems.extend(
        _problem(name, "is in the output, but not in the source") for name in out.tensors if name not in expected
    )
    problems.extend(_check_config(out, source, target, converted))
    problems.extend(_check_side_files(out, source))
    return Verification(target.NAME, tuple(checks), tuple(problems))


def _problem(subject: str, reason: str) -> Problem:
    return Problem(subject, reason, "convert the checkpoint again")


def _decode(
    target: Target,
    out: Checkpoint,
    module: str,
    read: Reader,
    shape_nk: tuple[int, int],
    problems: list[Problem],
) -> W4A8Linear | None:
    """Read a layer of the output; None, and a problem, where it is not of the format or the source's shape."""
    try:
        w4a8 = target.decode(out, module, read)
    except ConvertError as error:
        problems.append(error.problem)
        return None
    if w4a8.shape_nk != shape_nk:
        problems.append(_problem(module, f"is {list(w4a8.shape_nk)}, the source is {list(shape_nk)}"))
        return None
    return w4a8


def _check_layer(module: str, spec: LayerSpec, w: W4Linear | DenseLinear, w4a8: W4A8Linear) -> LayerCheck:
    n, k = w.shape_nk
    kept = keeps_codes(w)
    signal = noise = plain_noise = max_error = 0.0
    clipped = 0
    for start, stop in output_blocks(n, k):
        source = dequantize(w.output_channels(start, stop))
        result = tables.decode(w4a8.output_channels(start, stop))
        signal += energy(source)
        noise += energy(result - source)
        max_error = max(max_error, float((result - source).abs().max()))
        clipped += count_clipped(w4a8.output_channels(start, stop))
        if not kept:
            codes, scales = round_to_nearest(source)
            plain = (codes.view(-1, k // GROUP_SIZE, GROUP_SIZE).float() - SYMMETRIC_ZERO) * scales.t()[..., None]
            plain_noise += energy(plain.flatten(1) - source)
    return LayerCheck(
        module=module,
        out_features=spec.out_features,
        in_features=spec.in_features,
        codes_kept=kept,
        sqnr_db=sqnr_db(signal, noise) if math.isfinite(noise) else -math.inf,
        max_error=max_error,
        clipped=clipped,
        distinct_scales=None if w4a8.group_scale is None else len(torch.unique(w4a8.group_scale.view(torch.uint8))),
        expected_sqnr_db=MIN_SQNR_DB_KEPT if kept else sqnr_db(signal, plain_noise) - MAX_LOSS_DB_NEW,
    )


def _judge(check: LayerCheck, min_sqnr_db: float | None) -> list[Problem]:
    found = []
    least = check.expected_sqnr_db if min_sqnr_db is None else min_sqnr_db
    if not check.sqnr_db >= least:
        found.append(_problem(check.module, f"SQNR is {check.sqnr_db:.1f} dB, under {least:.4g} dB"))
    if check.clipped:
        found.append(_problem(check.module, f"{check.clipped} table entries clip"))
    return found


def _check_dequantized(out: Checkpoint, name: str, read: Reader, w: W4Linear | DenseLinear) -> list[Problem]:
    info = out.tensors.get(name)
    n, k = w.shape_nk
    if info is None or (info.dtype, info.shape) != ("BF16", (n, k)):
        return [_problem(name, f"is not in the output as BF16 {[n, k]}")]
    stored = read(info)
    for start, stop in output_blocks(n, k):
        if not torch.equal(stored[start:stop], dequantize(w.output_channels(start, stop)).bfloat16()):
            return [_problem(name, "is not the dequantized weight of the source")]
    return []


def _check_copy(source: TensorInfo, copy: TensorInfo | None, name: str, read: LibraryReader) -> list[Problem]:
    if copy is None:
        return [_problem(name, "is not in the output")]
    dtype = "BF16" if source.dtype == "F16" else source.dtype
    if (copy.dtype, copy.shape) != (dtype, source.shape):
        return [_problem(name, f"is {copy.dtype} {list(copy.shape)}, not {dtype} {list(source.shape)}")]
    ours, theirs = read.flat_bytes(copy), read.flat_bytes(source)
    for start in range(0, source.nbytes, _CHUNK_BYTES):
        part = theirs[start : start + _CHUNK_BYTES]
        if source.dtype == "F16":
            part = part.view(torch.float16).bfloat16().view(torch.uint8)
        if not torch.equal(ours[start : start + _CHUNK_BYTES], part):
            return [_problem(name, "differs from the source")]
    return []


def _check_config(out: Checkpoint, source: Checkpoint, target: Target, converted: set[str]) -> list[Problem]:
    """Check what config.json tells vLLM: bfloat16, the block of the format, and which modules are not quantized."""
    found = []
    dtypes = {out.config[key] for key in ("dtype", "torch_dtype") if key in out.config}
    if dtypes != {"bfloat16"}:
        found.append(
            _problem("config.json: dtype", f"is {', '.join(sorted(map(str, dtypes))) or 'absent'}, not bfloat16")
        )
    ignore = out.quantization_config.get("ignore")
    modules = linear_modules(out.tensors.values()) - converted
    expected = target.quantization_config(
        source.quantization_config, sorted(modules, key=natural_key), target.stored_mode(out), {}
    )
    if not isinstance(ignore, list) or not modules <= set(map(str, ignore)) or converted & set(map(str, ignore)):
        found.append(_problem("quantization_config: ignore", "does not list the modules that are not quantized"))
    for key, value in expected.items():
        if key not in ("ignore", "conversion") and out.quantization_config.get(key) != value:
            found.append(
                _problem(f"quantization_config: {key}", f"is {out.quantization_config.get(key)!r}, not {value!r}")
            )
    return found


def _check_side_files(out: Checkpoint, source: Checkpoint) -> list[Problem]:
    found = []
    for relative in source.side_files:
        copy = out.root / relative
        if not copy.is_file():
            found.append(_problem(str(relative), "is not in the output"))
        elif not filecmp.cmp(copy, source.root / relative, shallow=False):
            found.append(_problem(str(relative), "differs from the source"))
    return found
