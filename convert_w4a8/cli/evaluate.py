"""`w4a8 evaluate`: whether the candidate may take the baseline's place."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.files import append_for_the_job, check_writable, write_files
from convert_w4a8.cli.options import NumberRange
from convert_w4a8.cli.output import echo, echo_error, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import at_terminal
from convert_w4a8.evaluation.options import SERVERS

if TYPE_CHECKING:
    from convert_w4a8.evaluation.results import Evaluation


class _Tolerance(click.ParamType):  # type: ignore[type-arg]  # a generic from Click 8.4 on only
    """A share of 1, for every tag or, as `TAG=SHARE`, for one."""

    name = "tolerance"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return tag, empty for all, and share; a usage error if it is none."""
        tag, _, share = value.rpartition("=")
        if not re.fullmatch(r"0(\.\d*)?|\.\d+|1(\.0*)?", share):
            self.fail(f"{value!r} is neither a number from 0 to 1 nor TAG=NUMBER", param, ctx)
        return tag, float(share)


@click.command("evaluate", cls=W4A8Command)
@click.option(
    "--baseline",
    type=CHECKPOINT,
    metavar="URL|DIR",
    help="What serves now: an OpenAI-compatible server, or a checkpoint.",
)
@click.option("--candidate", type=CHECKPOINT, metavar="URL|DIR", help="What is to take its place.")
@click.option(
    "--prompts",
    type=LocalPath(path_type=Path),
    metavar="FILE",
    help="JSON lines: prompt or messages, and perhaps tools, reference, checks, tags, max_tokens, id.",
)
@click.option(
    "--logs",
    type=LocalPath(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Instead of prompts: requests of production, which the rollout kit logs. Can be given more than once. Without"
    " --baseline and --candidate, those with both answers in them.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="So many requests of the logs, drawn at random.",
)
@click.option(
    "--out",
    type=LocalPath(file_okay=False, path_type=Path, directory=True),
    metavar="DIR",
    help="Keep answers, and write evaluation.html, .md and .json.",
)
@click.option("--resume", is_flag=True, help="Go on with the answers in --out.")
@click.option(
    "--tolerance",
    type=NumberRange(0, 1),
    default=0.05,
    show_default=True,
    help="How much of the score, from 0 to 1, may be lost.",
)
@click.option(
    "--tag-tolerance",
    type=_Tolerance(),
    multiple=True,
    metavar="[TAG=]X",
    help="The same for tags, or for one. Can be given more than once. [default: that of --tolerance]",
)
@click.option(
    "--max-divergence",
    type=NumberRange(min=0, min_open=True),
    metavar="NATS",
    help="What the divergence on the baseline's own answers may be, in nats per token. [default: it does not matter]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens of an answer, unless its prompt says.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answers of each prompt, with seeds from 0 on.",
)
@click.option(
    "--temperature", type=NumberRange(min=0), default=0.0, show_default=True, help="Of sampling; 0 is greedy."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Requests at a time.")
@click.option(
    "--timeout",
    type=NumberRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that an answer may take.",
)
@click.option("--baseline-model", metavar="NAME", help="As the server names it. [default: the first that it lists]")
@click.option("--candidate-model", metavar="NAME", help="As the server names it. [default: the first that it lists]")
@click.option(
    "--server",
    type=click.Choice(SERVERS),
    default="auto",
    show_default=True,
    help="What serves a DIR. auto: vLLM where it is installed.",
)
@click.option(
    "--max-model-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of a sequence, for vLLM. [default: the model's]",
)
@click.option(
    "--serve-options",
    default="",
    metavar="OPTIONS",
    help="More options of what serves a DIR, the same for both, as in a shell.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Divide the prompts into so many parts, and have DIRs take turns: one server more than parts is started.",
)
@click.option(
    "--start-timeout",
    type=NumberRange(min=1),
    default=600.0,
    show_default=True,
    help="Seconds that a server may take to start.",
)
@click.option(
    "--ratings",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Count the ratings that were given in evaluation.html as checks.",
)
@click.option(
    "--drop-by-tag",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what each tag lost, as JSON.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def evaluate_command(
    baseline: str | None,
    candidate: str | None,
    prompts: Path | None,
    logs: tuple[Path, ...],
    out: Path | None,
    resume: bool,
    ratings: Path | None,
    drop_by_tag: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Ask two servers the same prompts, compare quality, speed and room, and say whether the candidate may be shipped.

    Exit code 0: ship; 3: do not ship; 4: cannot tell. The extra `evaluate` brings what it needs. A DIR is served, one
    after the other, and the server stopped again. --baseline, --candidate, and --prompts or --logs are required.
    """
    from convert_w4a8.evaluation.evaluate import evaluate, prepare
    from convert_w4a8.evaluation.options import EvaluateOptions
    from convert_w4a8.evaluation.results import drops
    from convert_w4a8.evaluation.verdict import EXIT_CODES

    if out is None and (resume or ratings):
        raise click.UsageError("--resume and --ratings need the --out of the run that they go on with")
    settings["tag_tolerance"] = dict(settings["tag_tolerance"])
    try:
        settings["serve_options"] = tuple(shlex.split(settings["serve_options"]))
        prepared = prepare(baseline, candidate, prompts, logs, EvaluateOptions(**settings))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    check_writable(*([drop_by_tag] if drop_by_tag else []))
    with _progress(2 * len(prepared.plan.jobs), quiet=as_json) as update:
        say = (lambda _line: None) if as_json else echo_error
        found = evaluate(prepared, out, resume=resume, ratings=ratings, progress=update, say=say)
    _write(found, out)
    if drop_by_tag:
        write_files({drop_by_tag: (json.dumps(drops(found), indent=1) + "\n").encode()})
    _print(found, as_json=as_json)
    click.get_current_context().exit(EXIT_CODES[found.verdict.decision])


def _write(found: "Evaluation", out: Path | None) -> None:
    from convert_w4a8.evaluation import document, page, text

    if out is None:
        return
    plain = json.loads(json.dumps(document.as_dict(found)), parse_constant=lambda _infinity_or_nan: None)
    write_files(
        {
            out / "evaluation.html": page.render(found).encode(errors="backslashreplace"),
            out / "evaluation.md": text.as_markdown(found).encode(errors="backslashreplace"),
            out / "evaluation.json": (json.dumps(plain, indent=1) + "\n").encode(),
        }
    )


def _print(found: "Evaluation", *, as_json: bool) -> None:
    from convert_w4a8.evaluation import document, text

    if as_json:
        echo_json(document.as_dict(found))
    else:
        echo(text.as_text(found))
    append_for_the_job(text.as_markdown(found))


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many answers there are: as a bar if that is a terminal, else every tenth of them."""
    if quiet:
        yield lambda _number: None
        return
    if at_terminal():
        from tqdm import tqdm

        with tqdm(total=total, desc="evaluate", unit="answer") as bar:
            yield bar.update
        return
    done, step = 0, max(1, total // 10)

    def update(number: int) -> None:
        nonlocal done
        done += number
        if done % step == 0:
            echo_error(f"evaluate   {done:,} of {total:,} answers")

    yield update
