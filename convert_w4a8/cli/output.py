"""Where a command prints, and what happens where that is not possible."""

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from convert_w4a8.errors import ConvertError, Problem, grouped

_CLOSED_PIPE = 141
"""What a shell says of a process that SIGPIPE ended, which Python ignores."""
_PRINTED = "convert_w4a8.printed"


def echo(text: str, *, nl: bool = True) -> None:
    """Print on stdout. Raises ConvertError where that is not possible; ends quietly where nobody reads any more."""
    try:
        click.echo(text, nl=nl)
    except OSError as error:
        raise stdout_failure(error) from error


def echo_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout, the only one of this command; null for the numbers that JSON has not."""
    click.get_current_context().meta[_PRINTED] = True
    finite = json.loads(json.dumps(value), parse_constant=lambda _infinity_or_nan: None)
    echo(json.dumps(finite, indent=2))


def echo_error(line: str) -> None:
    """Print a line on stderr; where that is not possible, there is nobody to tell."""
    with suppress(OSError):
        click.echo(line, err=True)


def echo_refusal(problems: Sequence[Problem], notes: Iterable[str]) -> None:
    """Print what was refused as a JSON document, unless a document was printed before or stdout is what failed."""
    if not click.get_current_context().meta.get(_PRINTED):
        document = {"ok": False, "problems": [group.as_dict() for group in grouped(problems)], "notes": list(notes)}
        with suppress(ConvertError, click.exceptions.Exit):
            echo_json(document)


def stdout_failure(error: OSError) -> Exception:
    """Return what to raise where stdout cannot be written to, and let Python's flush at exit go nowhere."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    if error.errno == errno.EPIPE:
        return click.exceptions.Exit(_CLOSED_PIPE)
    return ConvertError(
        "standard output", f"cannot be written ({error.strerror})", "free space there, or print to another place"
    )


def escape_what_cannot_be_encoded() -> None:
    """Let stdout print any name, escaped where its encoding has no such characters, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
