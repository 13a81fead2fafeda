"""Paths and names of checkpoints on the command line: `~`, and completion in the shell."""

import os
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

_SCHEME = re.compile(r"(s3a?|gs|gcs|az|abfss?|adl|wasbs?|hdfs|oss|cos|r2|file)://", re.IGNORECASE)
"""Object stores, and others that fsspec reads; http is an address of a server for `w4a8 evaluate`."""
_HUB = re.compile(r"^hf://(?:models/)?", re.IGNORECASE)
"""How fsspec writes a Hub id."""


def _storage(value: str) -> str:
    """Return why an address of an object store is no path."""
    return f"{value[:80]!r} is not a path; mount the bucket (s3fs, gcsfuse, JuiceFS), or copy the files first"


class LocalPath(click.Path):
    """A path, with `~` for a home directory: shells do not expand it in `--html=~/report.html`.

    directory: what the shell completes; whether there is one already is for the command to say.
    """

    def __init__(self, *, directory: bool = False, **kinds: Any) -> None:
        super().__init__(**kinds)
        self._directory = directory

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; a usage error where it is empty, as that of a variable that is not set."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        if isinstance(value, str) and _SCHEME.match(value):
            self.fail(_storage(value), param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - raises nothing

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave it to the shell to complete a file or directory."""
        return (
            [CompletionItem(incomplete, type="dir")]
            if self._directory
            else super().shell_complete(ctx, param, incomplete)
        )


class CheckpointName(click.ParamType):  # type: ignore[type-arg]  # a generic from Click 8.4 on only
    """A checkpoint: a directory, or a Hub id, also as hf://org/name. Shells complete directories."""

    name = "checkpoint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name, with `~` expanded; a usage error where it is the address of an object store."""
        name = _HUB.sub("", str(value))
        if _SCHEME.match(name):
            self.fail(_storage(name), param, ctx)
        return os.path.expanduser(name)  # noqa: PTH111 - raises nothing

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Leave it to the shell to complete a directory."""
        return [CompletionItem(incomplete, type="dir")]


CHECKPOINT = CheckpointName()


def check_homes(ctx: click.Context) -> None:
    """Raise ConvertError for a path that begins with the home directory of a user that there is not."""
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if isinstance(parameter.type, LocalPath | CheckpointName) and str(value or "").startswith("~"):
            from convert_w4a8.api import local_path

            local_path(str(value))
