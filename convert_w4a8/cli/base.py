"""What every command does alike: errors, signals, exit codes."""

import os
from collections.abc import Sequence
from typing import Any

import click

from convert_w4a8.cli.options import with_ray_address
from convert_w4a8.cli.output import (
    echo_error,
    echo_refusal,
    escape_what_cannot_be_encoded,
    stdout_failure,
)
from convert_w4a8.cli.paths import check_homes
from convert_w4a8.cli.ray import enter_cluster
from convert_w4a8.cli.signals import exit_code, signal_name, signals_interrupt
from convert_w4a8.errors import ConvertError, PlanError, Problem, W4A8Error, grouped
from convert_w4a8.startup import import_torch, leave_out_working_directory


class _Printing(click.Command):
    """A command whose help, version and completions may be printed where nothing can be printed."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the command line, which prints what --help asks for."""
        leave_out_working_directory()
        escape_what_cannot_be_encoded()
        try:
            return super().make_context(info_name, args, parent, **extra)
        except OSError as error:
            failure = stdout_failure(error)
            if isinstance(failure, ConvertError):
                echo_error(f"Error: {failure}")
                raise click.exceptions.Exit(1) from error
            raise failure from error


class W4A8Group(_Printing, click.Group):
    """A group of commands."""


class W4A8Command(_Printing):
    """A command whose user errors become lines on stderr and exit code 1; with --json a document on stdout too."""

    needs_torch = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line."""
        has_ray = any("--ray" in parameter.opts for parameter in self.params)
        return super().parse_args(ctx, with_ray_address(args) if has_ray else args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Errors that are not the user's keep their traceback."""
        try:
            with signals_interrupt():
                return self._run(ctx)
        except PlanError as error:
            count = len(error.problems)
            echo_error(f"Error: {count} problem{'s' * (count != 1)}; nothing was written.")
            for group in grouped(error.problems):
                echo_error(f"  {group}")
            _refuse(ctx, error, error.problems)
        except W4A8Error as error:
            echo_error("; ".join([f"Error: {error}", *_notes(error)]))
            _refuse(ctx, error, (error.problem,) if isinstance(error, ConvertError) else ())
        except KeyboardInterrupt as error:
            echo_error("; ".join([signal_name(error), *(_notes(error) or ["nothing was written"])]))
            ctx.exit(exit_code(error))
        return ctx.exit(1)

    def _run(self, ctx: click.Context) -> Any:
        try:
            if self.needs_torch:
                os.getcwd()  # noqa: PTH109 - without one, MKL ends the process when torch is imported
                check_homes(ctx)
                enter_cluster(ctx)
                import_torch()
            elif not _has_working_directory():
                os.chdir("/")
            return super().invoke(ctx)
        except FileNotFoundError as error:
            if _has_working_directory():
                raise
            raise ConvertError(
                "working directory", "has been deleted", "change to a directory that exists, and begin again"
            ) from error


def _refuse(ctx: click.Context, error: W4A8Error, problems: Sequence[Problem]) -> None:
    if ctx.params.get("as_json"):
        echo_refusal(problems, _notes(error))


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _has_working_directory() -> bool:
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return False
    return True
