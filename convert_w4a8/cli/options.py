"""The options that more than one command takes, and what their values mean."""

import math
import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import click

from convert_w4a8.cli.paths import LocalPath
from convert_w4a8.options import DEFAULT_SHARD_SIZE, PATTERN, Options, Policy, ScalesMode, Unsupported
from convert_w4a8.targets import target_names

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SIZE_PATTERN = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?)i?b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LARGEST_SIZE = 2.0**63
"""Bytes that a file can have, on any system."""


class _Size(click.ParamType):  # type: ignore[type-arg]  # a generic from Click 8.4 on only
    """A number of bytes, such as 5GB (powers of 1000) or 512MiB (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; a usage error if the value is none."""
        if isinstance(value, int):
            return value
        match = _SIZE_PATTERN.fullmatch(value.strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 5GB", param, ctx)
        base = 1024 if "i" in value.lower() else 1000
        size = float(match["number"]) * base ** _POWERS[match["unit"].lower()]
        if not 1 <= size <= _LARGEST_SIZE:
            self.fail(f"{value[:40]!r} is not a size such as 5GB, up to 8 EiB", param, ctx)
        return int(size)


class Number(click.types.FloatParamType):
    """A finite number."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; a usage error for infinity and for NaN, which any comparison lets pass."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class NumberRange(click.FloatRange):
    """A finite number in a range. click.FloatRange takes NaN for one in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; a usage error if the value is none."""
        return float(super().convert(Number().convert(value, param, ctx), param, ctx))


class _Layers(click.ParamType):  # type: ignore[type-arg]
    """Names of layers: one, or `re:` and a regular expression."""

    name = "pattern"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the pattern; a usage error if it is none."""
        try:
            re.compile(value.removeprefix(PATTERN))
        except (re.error, RecursionError, OverflowError) as error:
            if value.startswith(PATTERN):
                self.fail(f"{value[:40]!r} is not a regular expression ({error})", param, ctx)
        return str(value)


class _Mask(click.ParamType):  # type: ignore[type-arg]
    """What `parse_mask` reads."""

    name = "mask"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the mask; a usage error if the value is none."""
        from convert_w4a8.samples.masks import parse_mask

        try:
            return parse_mask(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _RayAddress(click.ParamType):  # type: ignore[type-arg]
    """Where a Ray cluster is: `local` (started for this command), `auto`, or host:port."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the address; a usage error if it is none."""
        if not _ADDRESS.fullmatch(value):
            self.fail(f"{value[:40]!r} is not local, auto or HOST:PORT", param, ctx)
        return str(value)


_ADDRESS = re.compile(r"local|auto|(ray://)?(\[[\da-fA-F:]+\]|[\w.-]+):\d{1,5}")
_RAY = "--ray"


def with_ray_address(arguments: list[str]) -> list[str]:
    """Return a command line in which `--ray` has an address: what follows it, if that is one, or `local`."""
    found: list[str] = []
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for argument, following in zip_longest(options, options[1:]):
        has_none = argument == _RAY and not (following is not None and _ADDRESS.fullmatch(following))
        found.append(f"{_RAY}=local" if has_none else argument)
    return found + arguments[len(options) :]


SIZE = _Size()
RAY = click.option(
    _RAY,
    "ray",
    type=_RayAddress(),
    metavar="[ADDRESS]",
    help="Work on a Ray cluster, whose nodes all see the same files: HOST:PORT, or auto for the one that runs here."
    " Without an address Ray is started on this machine.",
)
LAYERS = _Layers()
_CONVERSION_OPTIONS = (
    click.option(
        "--format",
        "output_format",
        type=click.Choice(target_names()),
        default="lut",
        show_default=True,
        help="lut: in the kernel's own order, for our vLLM plugin. compressed-tensors: for vLLM without it.",
    ),
    click.option(
        "--scales",
        type=click.Choice(list(map(str, ScalesMode))),
        default="search",
        show_default=True,
        help="How FP8 scales are chosen. search: least error of the final weights. reference: by vLLM's own load-time"
        " arithmetic. direct: table entries one by one, with --format lut only.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where the arithmetic runs. auto: on a GPU of compute capability 8.0 or higher, if there is one.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many layers are converted at a time. [default: one a core, up to 4]",
    ),
    click.option(
        "--asymmetric",
        type=click.Choice(list(map(str, Policy))),
        default="requantize",
        show_default=True,
        help="Layers with zero-points: choose new symmetric codes, or refuse.",
    ),
    click.option(
        "--act-order",
        type=click.Choice(list(map(str, Policy))),
        default="error",
        show_default=True,
        help="GPTQ layers whose g_idx permutes: choose new codes for contiguous groups, or refuse.",
    ),
    click.option(
        "--group-size",
        type=click.Choice(list(map(str, Policy))),
        default="error",
        show_default=True,
        help="Group sizes that are no multiple of 128 (32, 64): choose new codes for groups of 128, or refuse.",
    ),
    click.option(
        "--unsupported",
        type=click.Choice(list(map(str, Unsupported))),
        default="error",
        show_default=True,
        help="Layers whose size the kernel cannot take: refuse, or keep them in BF16.",
    ),
    click.option(
        "--keep",
        type=LAYERS,
        multiple=True,
        metavar="PATTERN",
        help="Keep these layers in BF16, with all that vLLM serves together with them: a full name, or re: and a"
        " regular expression. Can be given more than once.",
    ),
    click.option(
        "--verbose",
        "-v",
        is_flag=True,
        help="Say on stderr with what the conversion works: versions, device, kernels, workers.",
    ),
)


def conversion_options(command: _Command) -> _Command:
    """Add the options that decide what a conversion does."""
    for option in reversed(_CONVERSION_OPTIONS):
        command = option(command)
    return command


def data_options(
    more: str = "",
    *,
    data: str = "Calibration data: JSON lines of messages (and tools), text or input_ids. Can be given more than once.",
    masked: str = "Tokens that count in no statistic",
    required: bool = True,
) -> Callable[[_Command], _Command]:
    """Return what adds --data and --mask. data, more: what the help says of the data. masked: of what is masked."""
    options = (
        click.option(
            "--data",
            type=LocalPath(path_type=Path),
            multiple=True,
            required=required,
            metavar="FILE",
            help=f"{data} {more}".strip(),
        ),
        click.option(
            "--mask",
            type=_Mask(),
            metavar="MASK",
            help=f"{masked}: template, system, tools, repeated, with commas between. [default: none]",
        ),
    )

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def max_tokens_option(command: _Command) -> _Command:
    """Add --max-tokens."""
    help_ = "Use so many tokens of the data at most."
    return click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help=help_)(command)


def read_options(choices: Mapping[str, Any], max_shard_size: int = DEFAULT_SHARD_SIZE) -> Options:
    """Return what the user chose, from the values of `conversion_options` that decide about layers."""
    keep = choices["keep"]
    return Options(
        format=choices["output_format"],
        scales=ScalesMode(choices["scales"]),
        asymmetric=Policy(choices["asymmetric"]),
        act_order=Policy(choices["act_order"]),
        group_size=Policy(choices["group_size"]),
        unsupported=Unsupported(choices["unsupported"]),
        max_shard_size=max_shard_size,
        keep=keep if isinstance(keep, tuple) else (),
    )
