"""Proof of a conversion from the two directories alone: every layer decoded from its bytes and compared."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import LeftOut
from convert_w4a8.checkpoint.names import natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import DenseLinear, ServedLinear, W4Linear, keeps_codes
from convert_w4a8.sources import find_origin, unquantized_source
from convert_w4a8.sources.carried import carried_groups, find_carried
from convert_w4a8.targets import find_target
from convert_w4a8.targets.base import Target
from convert_w4a8.verification.accounting import Accounts, account
from convert_w4a8.verification.files import check_config, check_copy, problem
from convert_w4a8.verification.layers import LayerCheck, check_layer, judge
from convert_w4a8.verification.reading import LibraryReader
from convert_w4a8.verification.scaling import Scaling, find_scaling


@dataclass(frozen=True)
class Verification:
    """The checks of all layers, and every problem found; without problems the conversion is right.

    carried: how many layers were carried over, byte for byte.
    added: files of the output that the source has not, and that run no code and hold no weights.
    left_out: files of the source that the output has not, and why.
    copied_weights: safetensors files beside the weights of the model that are in the output as they are.
    """

    target: str
    layers: tuple[LayerCheck, ...]
    problems: tuple[Problem, ...]
    added: tuple[str, ...] = ()
    carried: int = 0
    left_out: tuple[LeftOut, ...] = ()
    copied_weights: tuple[str, ...] = ()


def verify(
    out: Checkpoint,
    source: Checkpoint,
    *,
    only: Collection[str] | None = None,
    min_sqnr_db: float | None = None,
    progress: Callable[[int], None] = lambda _nbytes: None,
) -> Verification:
    """Compare a converted checkpoint with its source.

    Codes that are kept are compared one by one; new ones have to be the nearest to the source's weights. Every group,
    every output channel and every layer has a bound for its error. Everything else has to be equal, but for what a
    conversion changes, and powers of two that calibration moved from one layer into another (`scaling.py`).

    only: the layers of which the output is a sample, by their names there; all, and all files, if None.
    min_sqnr_db: least SQNR of a layer; by default 25 dB where codes are kept, and where they are new, 2 dB less than
        round to nearest of the source has.
    progress: called with the number of source bytes compared since the last call.

    Raises:
        ConvertError: one of the two cannot be read.

    """
    target, reader, read = find_target(out), find_origin(source), LibraryReader()
    calibrated = reader.NAME == unquantized_source().NAME
    if target.SCHEME == "W4A16" and not calibrated:
        reason = "is W4A16, which no conversion writes"
        raise ConvertError(str(out.root), reason, "give as --source the model in 16 bits that it was quantized from")
    problems: list[Problem] = []
    specs = {output_name(spec.name, source.config): spec for spec in reader.find_layers(source, problems)}
    carried = find_carried(reader, source, problems)
    copies = {info.name: name for layer in carried for name, info in layer.outputs(source.config).items()}
    consumed = {part.name for spec in specs.values() for part in spec.parts.values()}
    if only is not None:
        specs = {module: spec for module, spec in specs.items() if module in only}
    converted = set(target.find_layers(out))
    others = {output_name(name, source.config): info for name, info in source.tensors.items() if name not in consumed}
    scaling = find_scaling(out, reader, target, read, specs, others)
    expected: set[str] = set()
    checks = []
    for module, spec in sorted(specs.items(), key=lambda item: natural_key(item[0])):
        w = reader.read_layer(spec, read)
        if scaling is not None and isinstance(w, DenseLinear):
            w = scaling.layer(module, w)
        if module in converted:
            w4a8 = _decode(target, out, module, read, w.shape_nk, problems)
            if w4a8 is None:
                expected.update(name for name in out.tensors if name.rpartition(".")[0] == module)
            else:
                for mode in target.MODES:
                    expected.update(part.name for part in target.tensor_specs(module, *w4a8.shape_nk, mode))
                check = check_layer(module, w, w4a8, calibrated=calibrated)
                checks.append(check)
                problems.extend(judge(check, keeps_codes(w), min_sqnr_db))
        else:
            expected.add(f"{module}.weight")
            problems.extend(_check_dequantized(out, f"{module}.weight", read, w))
        progress(spec.nbytes)
    for info in source.tensors.values():
        if info.name not in consumed:
            name = copies.get(info.name) or output_name(info.name, source.config)
            expected.add(name)
            if scaling is not None and scaling.touches(name):
                problems.extend(_check_scaled(info, out.tensors.get(name), name, read, scaling))
            else:
                problems.extend(check_copy(info, out.tensors.get(name), name, read, carried=info.name in copies))
            progress(info.nbytes)
    problems.extend(
        problem(name, "is in the output, but not in the source") for name in out.tensors if name not in expected
    )
    problems.extend(
        check_config(out, source, target, converted, carried_groups(carried, source.config), whole=only is None)
    )
    accounts = account(out, source) if only is None else Accounts()
    return Verification(
        target.NAME,
        tuple(checks),
        (*problems, *accounts.problems),
        added=accounts.added,
        carried=len(carried),
        left_out=accounts.left_out,
        copied_weights=accounts.copied_weights,
    )


def _check_scaled(
    info: TensorInfo, copy: TensorInfo | None, name: str, read: Reader, scaling: Scaling
) -> list[Problem]:
    """Compare a tensor that was multiplied by powers of two."""
    dtype = "BF16" if info.dtype == "F16" else info.dtype
    if copy is None or (copy.dtype, copy.shape) != (dtype, info.shape):
        return [problem(name, f"is not in the output as {dtype} {list(info.shape)}")]
    stored = read(copy)
    if not torch.equal(stored, scaling.scaled(name.rpartition(".")[0], read(info).to(stored.dtype))):
        return [problem(name, "is not the source's, scaled as the norms and layers around it")]
    return []


def _decode(
    target: Target,
    out: Checkpoint,
    module: str,
    read: Reader,
    shape_nk: tuple[int, int],
    problems: list[Problem],
) -> ServedLinear | None:
    """Read a layer of the output; None, and a problem, where it is not of the format or the source's shape."""
    try:
        w4a8 = target.decode(out, module, read)
    except ConvertError as error:
        problems.append(error.problem)
        return None
    if w4a8.shape_nk != shape_nk:
        problems.append(problem(module, f"is {list(w4a8.shape_nk)}, the source is {list(shape_nk)}"))
        return None
    return w4a8


def _check_dequantized(out: Checkpoint, name: str, read: Reader, w: W4Linear | DenseLinear) -> list[Problem]:
    info = out.tensors.get(name)
    n, k = w.shape_nk
    if info is None or (info.dtype, info.shape) != ("BF16", (n, k)):
        return [problem(name, f"is not in the output as BF16 {[n, k]}")]
    stored = read(info)
    for start, stop in output_blocks(n, k):
        if not torch.equal(stored[start:stop], dequantize(w.output_channels(start, stop)).bfloat16()):
            return [problem(name, "is not the dequantized weight of the source")]
    return []
