"""`w4a8 report`: a conversion in numbers and pictures."""

from pathlib import Path

import click

from convert_w4a8.cli.base import W4A8Command, echo_json, progress, write_files


@click.command("report", cls=W4A8Command)
@click.argument("out", metavar="OUT")
@click.option("--source", required=True, metavar="IN", help="The checkpoint that OUT was converted from.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write one self-contained HTML file.",
)
@click.option("--png-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers behind it as one JSON document on stdout.")
def report_command(out: str, source: str, html: Path | None, png_dir: Path | None, as_json: bool) -> None:
    """Show what a conversion did: SQNR by layer, group scales, clipping, memory. From the bytes of both checkpoints.

    The pictures need matplotlib, which the extra `report` brings.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import collect as reports
    from convert_w4a8.report import html as report_html
    from convert_w4a8.report import pictures as report_pictures

    if html is None and png_dir is None and not as_json:
        raise click.UsageError("give --html, --png-dir or --json")
    with_pictures = html is not None or png_dir is not None
    if with_pictures:
        report_pictures.require_matplotlib()
    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with progress(original.nbytes, "report", quiet=as_json) as update:
        found = reports.collect(converted, original, progress=update)
    if with_pictures:
        pictures = report_pictures.draw(found)
        written = {png_dir / f"{name}.png": png for name, png in pictures.items()} if png_dir is not None else {}
        if html is not None:
            written[html] = report_html.render(found, pictures).encode()
        write_files(written)
    if as_json:
        echo_json(reports.as_dict(found))
    else:
        click.echo(reports.as_text(found))
