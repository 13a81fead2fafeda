"""Proof of a conversion from the two directories alone: every layer decoded from its bytes and compared."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import LeftOut
from convert_w4a8.checkpoint.names import natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import Reader, TensorInfo
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.errors import ConvertError, Problem
from convert_w4a8.linear import DenseLinear, ServedLinear, W4Linear, keeps_codes
from convert_w4a8.sources import LayerSpec, find_origin, unquantized_source
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


@dataclass(frozen=True)
class Findings:
    """What was found of some units of a proof: names of tensors that the output has to have, checks, problems."""

    expected: frozenset[str]
    checks: tuple[LayerCheck, ...]
    problems: tuple[Problem, ...]


Units = tuple[int, int]
"""The first unit of a proof, and the one behind the last: they are in the same order for everybody who counts them."""
CheckUnits = Callable[["Proof", Callable[[int], None]], Iterable[Findings]]
"""Checks all units of a proof; what it finds is in their order."""


class Proof:
    """Compares a converted checkpoint with its source: unit by unit, a layer or a tensor each, then as a whole.

    Parameters are those of `verify`. Two processes that see the same files count the same units.

    Raises:
        ConvertError: one of the two cannot be read.

    """

    def __init__(
        self,
        out: Checkpoint,
        source: Checkpoint,
        *,
        only: Collection[str] | None = None,
        min_sqnr_db: float | None = None,
    ) -> None:
        self.out, self.source, self.only, self.min_sqnr_db = out, source, only, min_sqnr_db
        self._target, self._reader, self._read = find_target(out), find_origin(source), LibraryReader()
        self._calibrated = self._reader.NAME == unquantized_source().NAME
        if self._target.SCHEME == "W4A16" and not self._calibrated:
            reason = "is W4A16, which no conversion writes"
            remedy = "give as --source the model in 16 bits that it was quantized from"
            raise ConvertError(str(out.root), reason, remedy)
        problems: list[Problem] = []
        specs = {output_name(spec.name, source.config): spec for spec in self._reader.find_layers(source, problems)}
        self._carried = find_carried(self._reader, source, problems)
        self._problems = tuple(problems)
        self._copies = {
            info.name: name for layer in self._carried for name, info in layer.outputs(source.config).items()
        }
        consumed = {part.name for spec in specs.values() for part in spec.parts.values()}
        if only is not None:
            specs = {module: spec for module, spec in specs.items() if module in only}
        self._converted = set(self._target.find_layers(out))
        self._others = [info for name, info in source.tensors.items() if name not in consumed]
        others = {output_name(info.name, source.config): info for info in self._others}
        self._scaling = find_scaling(out, self._reader, self._target, self._read, specs, others)
        self._specs = sorted(specs.items(), key=lambda item: natural_key(item[0]))

    @property
    def sizes(self) -> list[int]:
        """Bytes of the source of each unit: the layers, then the other tensors."""
        return [spec.nbytes for _, spec in self._specs] + [info.nbytes for info in self._others]

    def check(self, units: Units | None = None, progress: Callable[[int], None] = lambda _nbytes: None) -> Findings:
        """Check some units, or all."""
        start, stop = units or (0, len(self._specs) + len(self._others))
        layers = len(self._specs)
        expected: set[str] = set()
        checks: list[LayerCheck] = []
        problems: list[Problem] = []
        for module, spec in self._specs[start:stop]:
            self._check_layer(module, spec, expected, checks, problems)
            progress(spec.nbytes)
        for info in self._others[max(0, start - layers) : max(0, stop - layers)]:
            name = self._copies.get(info.name) or output_name(info.name, self.source.config)
            copy = self.out.tensors.get(name)
            expected.add(name)
            if self._scaling is not None and self._scaling.touches(name):
                problems.extend(_check_scaled(info, copy, name, self._read, self._scaling))
            else:
                problems.extend(check_copy(info, copy, name, self._read, carried=info.name in self._copies))
            progress(info.nbytes)
        return Findings(frozenset(expected), tuple(checks), tuple(problems))

    def _check_layer(
        self, module: str, spec: LayerSpec, expected: set[str], checks: list[LayerCheck], problems: list[Problem]
    ) -> None:
        out, target, read = self.out, self._target, self._read
        w = self._reader.read_layer(spec, read)
        if self._scaling is not None and isinstance(w, DenseLinear):
            w = self._scaling.layer(module, w)
        if module not in self._converted:
            expected.add(f"{module}.weight")
            problems.extend(_check_dequantized(out, f"{module}.weight", read, w))
            return
        w4a8 = _decode(target, out, module, read, w.shape_nk, problems)
        if w4a8 is None:
            expected.update(name for name in out.tensors if name.rpartition(".")[0] == module)
            return
        for mode in target.MODES:
            expected.update(part.name for part in target.tensor_specs(module, *w4a8.shape_nk, mode))
        check = check_layer(module, w, w4a8, calibrated=self._calibrated)
        checks.append(check)
        problems.extend(judge(check, keeps_codes(w), self.min_sqnr_db))

    def verdict(self, found: Iterable[Findings]) -> Verification:
        """Return what comes of it all. found: what was found of all units, in their order."""
        out, source, whole = self.out, self.source, self.only is None
        expected: set[str] = set()
        checks: list[LayerCheck] = []
        problems = list(self._problems)
        for part in found:
            expected |= part.expected
            checks += part.checks
            problems += part.problems
        problems += [
            problem(name, "is in the output, but not in the source") for name in out.tensors if name not in expected
        ]
        groups = carried_groups(self._carried, source.config)
        problems += check_config(out, source, self._target, self._converted, groups, whole=whole)
        accounts = account(out, source) if whole else Accounts()
        return Verification(
            self._target.NAME,
            tuple(checks),
            (*problems, *accounts.problems),
            added=accounts.added,
            carried=len(self._carried),
            left_out=accounts.left_out,
            copied_weights=accounts.copied_weights,
        )


def verify(
    out: Checkpoint,
    source: Checkpoint,
    *,
    only: Collection[str] | None = None,
    min_sqnr_db: float | None = None,
    progress: Callable[[int], None] = lambda _nbytes: None,
    check: CheckUnits | None = None,
) -> Verification:
    """Compare a converted checkpoint with its source.

    Codes that are kept are compared one by one; new ones have to be the nearest to the source's weights. Every group,
    every output channel and every layer has a bound for its error. Everything else has to be equal, but for what a
    conversion changes, and powers of two that calibration moved from one layer into another (`scaling.py`).

    only: the layers of which the output is a sample, by their names there; all, and all files, if None.
    min_sqnr_db: least SQNR of a layer; by default 25 dB where codes are kept, and where they are new, 2 dB less than
        round to nearest of the source has.
    progress: called with the number of source bytes compared since the last call.
    check: what checks the units, instead of this process.

    Raises:
        ConvertError: one of the two cannot be read.

    """
    proof = Proof(out, source, only=only, min_sqnr_db=min_sqnr_db)
    return proof.verdict([proof.check(progress=progress)] if check is None else check(proof, progress))


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
