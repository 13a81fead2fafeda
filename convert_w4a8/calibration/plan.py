"""What quantizing a model will do, from headers and configuration alone: the plan of a conversion, cut by blocks."""

from collections.abc import Hashable, Iterator
from dataclasses import replace

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.conversion.plan import Plan, make_plan
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import ScalesMode
from convert_w4a8.samples.sample import SampleSet
from convert_w4a8.sources import find_origin, unquantized_source
from convert_w4a8.targets import W4A16, target_named, target_names


def with_samples(options: QuantizeOptions, samples: SampleSet | None) -> QuantizeOptions:
    """Return options for these samples: what an output depends on."""
    return replace(options, data="" if samples is None else samples.digest)


def plan_quantization(checkpoint: Checkpoint, options: QuantizeOptions) -> Plan:
    """Plan the quantization of a model.

    With data, every decoder block has files of its own: what is finished of an interrupted run is whole blocks. The
    plan's options are those that are carried out: beside an adapter no inputs are scaled.

    Raises:
        ConvertError: the checkpoint is quantized already, or of no form that is known.
        PlanError: something cannot be quantized; every such thing is listed.

    """
    source = find_origin(checkpoint)
    if source.NAME != unquantized_source().NAME:
        raise ConvertError(
            str(checkpoint.root), f"is quantized already ({source.NAME})", "convert it with w4a8-convert"
        )
    formats = (*target_names(), W4A16)
    if options.format in formats:
        target = target_named(options.format)
        if options.scales not in target.MODES or (target.SCALES_AT_LOAD and options.scales is ScalesMode.DIRECT):
            raise ConvertError(
                f"--tables {options.tables}", f"cannot be stored by --format {target.NAME}", "use --tables scale"
            )
    if any(path.name.startswith("adapter_model") for path in checkpoint.side_files):
        options = replace(options, awq_scaling=False)  # an adapter gets the inputs as they were
    return make_plan(checkpoint, options, source=source, formats=formats, part_of=_part if options.data else _whole)


def _part(name: str) -> Hashable:
    """Return the decoder block of a tensor: it has its own files."""
    return block_of(name)


def _whole(_name: str) -> Hashable:
    return None


def blocks_of(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield the decoder blocks of a plan's converted layers, each once."""
    yield from dict.fromkeys(block for layer in plan.converted if (block := block_of(layer.spec.name)))
