"""`w4a8 report`: a conversion in numbers and pictures."""

from pathlib import Path

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.files import check_writable, write_files
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import progress


@click.command("report", cls=W4A8Command)
@click.argument("out", metavar="OUT", type=CHECKPOINT)
@click.option(
    "--source", required=True, metavar="IN", type=CHECKPOINT, help="The checkpoint that OUT was converted from."
)
@click.option(
    "--html",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write one self-contained HTML file.",
)
@click.option(
    "--png-dir",
    type=LocalPath(file_okay=False, path_type=Path, directory=True),
    metavar="DIR",
    help="Write the pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers behind it as one JSON document on stdout.")
def report_command(out: str, source: str, html: Path | None, png_dir: Path | None, as_json: bool) -> None:
    """Show what a conversion did: SQNR by layer, group scales, clipping, memory. From the bytes of both checkpoints.

    Prints a summary. The pictures of --html and --png-dir need matplotlib, which the extra `report` brings.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import collect as reports
    from convert_w4a8.report import html as report_html
    from convert_w4a8.report import pictures as report_pictures
    from convert_w4a8.report.drawing import require_matplotlib

    with_pictures = html is not None or png_dir is not None
    if with_pictures:
        require_matplotlib()
    png_files = {name: png_dir / f"{name}.png" for name in report_pictures.NAMES} if png_dir is not None else {}
    check_writable(*png_files.values(), *([html] if html is not None else []))
    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with progress(original.nbytes, "report", quiet=as_json) as update:
        found = reports.collect(converted, original, progress=update)
    if with_pictures:
        pictures = report_pictures.draw(found)
        written = {path: pictures[name] for name, path in png_files.items()}
        if html is not None:
            written[html] = report_html.render(found, pictures).encode(errors="backslashreplace")
        write_files(written)
    if as_json:
        echo_json(reports.as_dict(found))
    else:
        echo(reports.as_text(found))
