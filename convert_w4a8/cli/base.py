"""What every command does alike: errors, progress, output."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from convert_w4a8.cli.startup import import_torch
from convert_w4a8.errors import ConvertError, PlanError, W4A8Error


class W4A8Command(click.Command):
    """A command whose user errors become lines on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Errors that are not the user's keep their traceback."""
        try:
            import_torch()
            return super().invoke(ctx)
        except PlanError as error:
            count = len(error.problems)
            click.echo(f"Error: {count} problem{'s' * (count != 1)}; nothing was written.", err=True)
            for refusal in error.problems:
                click.echo(f"  {refusal}", err=True)
        except W4A8Error as error:
            click.echo("; ".join([f"Error: {error}", *getattr(error, "__notes__", ())]), err=True)
        except KeyboardInterrupt as error:
            click.echo("; ".join(["Interrupted", *getattr(error, "__notes__", ["nothing was written"])]), err=True)
            ctx.exit(130)
        return ctx.exit(1)


@contextmanager
def progress(total: int, label: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on stderr, if that is a terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=hidden) as bar:
        yield bar.update


def echo_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files, with their directories. Raises ConvertError where one cannot be written."""
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise ConvertError(str(path), f"cannot be written ({error.strerror})", "choose another path") from error
