"""`w4a8 samples`: what calibration data hold, and what masks leave of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.data import page_of, read_data
from convert_w4a8.cli.files import check_writable, write_files
from convert_w4a8.cli.options import data_options, max_tokens_option
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath

if TYPE_CHECKING:
    from convert_w4a8.samples.masks import MaskOptions


@click.command("samples", cls=W4A8Command)
@click.argument("model", metavar="MODEL", type=CHECKPOINT)
@data_options()
@max_tokens_option
@click.option(
    "--html", type=LocalPath(path_type=Path), metavar="FILE", help="Write a page with the text of one sample, coloured."
)
@click.option("--png", type=LocalPath(path_type=Path), metavar="FILE", help="Write the same as a picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON document on stdout.")
def samples_command(
    model: str,
    data: tuple[Path, ...],
    mask: "MaskOptions | None",
    max_tokens: int | None,
    html: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    """Show what calibration data hold, as `w4a8 quantize` reads them: kinds of tokens, and which of them count.

    MODEL is a local directory or a Hub id; its tokenizer and its chat template are used, and no weights are read. The
    picture of --png needs matplotlib, which the extra `report` brings.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import tokens
    from convert_w4a8.report.drawing import require_matplotlib
    from convert_w4a8.text import table

    if png is not None:
        require_matplotlib()
    check_writable(*(path for path in (html, png) if path is not None))
    checkpoint = open_checkpoint(resolve_input(model))
    found = read_data(checkpoint, data, mask, max_tokens)
    written = {}
    if html is not None:
        written[html] = page_of(found, checkpoint)
    if png is not None:
        written[png] = tokens.draw(found)
    write_files(written)
    if as_json:
        echo_json(found.as_dict())
    else:
        echo(table(tokens.as_rows(found), tokens.HEADER))
        echo(tokens.summary(found))
