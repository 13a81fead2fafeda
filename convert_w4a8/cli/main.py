"""The command line: a file for each command. Everything heavy is imported by the command that needs it."""

import click

from convert_w4a8.cli.base import W4A8Group
from convert_w4a8.cli.check import check_command
from convert_w4a8.cli.convert import convert_command
from convert_w4a8.cli.distill import distill_command
from convert_w4a8.cli.env import env_command
from convert_w4a8.cli.evaluate import evaluate_command
from convert_w4a8.cli.inspect import inspect_command
from convert_w4a8.cli.push import push_command
from convert_w4a8.cli.quantize import quantize_command
from convert_w4a8.cli.report import report_command
from convert_w4a8.cli.samples import samples_command
from convert_w4a8.cli.verify import verify_command
from convert_w4a8.version import __version__


@click.group(cls=W4A8Group)
@click.version_option(__version__, package_name="w4a8-convert")
def main() -> None:
    """W4A8 checkpoints for vLLM: convert, quantize, distill, inspect, verify, report, push, check, evaluate."""


for _command in (
    convert_command,
    quantize_command,
    distill_command,
    samples_command,
    check_command,
    evaluate_command,
    inspect_command,
    verify_command,
    push_command,
    report_command,
    env_command,
):
    main.add_command(_command)
