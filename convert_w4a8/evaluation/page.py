"""An evaluation as one page that needs nothing else: verdict, tables, latencies, answers side by side, blind review."""

from collections.abc import Iterable
from datetime import UTC, datetime

from convert_w4a8.evaluation.answer import SIDES, Side
from convert_w4a8.evaluation.differences import marked, visible
from convert_w4a8.evaluation.plots import latencies
from convert_w4a8.evaluation.results import Compared, Evaluation
from convert_w4a8.evaluation.review import STYLE, begin, review
from convert_w4a8.evaluation.servers import is_url
from convert_w4a8.evaluation.text import Section, sections
from convert_w4a8.report.page import document, escape, note, table
from convert_w4a8.version import __version__

_CSS = """
body { max-width: 70rem; }
th, td { padding: 0.3rem 0.6rem; }
.verdict { font-size: 1.25rem; font-weight: 600; padding: 0.6rem 1rem; border-left: 6px solid #777;
  background: #f5f7f9; }
.verdict.ship { border-color: #009E73; }
.verdict.do-not-ship { border-color: #D55E00; }
.verdict.cannot-tell { border-color: #E69F00; }
svg { max-width: 40rem; width: 100%; font: 12px system-ui, sans-serif; fill: #55606e; }
svg .grid { stroke: #e8ebef; }
svg .plot-title { font-weight: 600; fill: #1c2430; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.sides h3 { font-size: 0.95rem; margin: 0.4rem 0; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace;
  border: 1px solid #dde2e8; padding: 0.6rem 0.8rem; margin: 0.3rem 0; max-height: 30rem; overflow-y: auto; }
mark { background: #ffe0a3; color: inherit; border-radius: 2px; }
details { margin: 0.7rem 0; border-bottom: 1px solid #e8ebef; padding-bottom: 0.4rem; }
@media (max-width: 45rem) { .sides { grid-template-columns: 1fr; } }
"""
_PLOTS = {"ttft": "time to first token", "tpot": "time per output token"}


def render(evaluation: Evaluation, made: datetime | None = None) -> str:
    """Return the HTML document. made: now, if not given."""
    decision = evaluation.verdict.decision
    when = (made or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sides = " ".join(f"{side.capitalize()}: {_place(evaluation, side)}." for side in SIDES)
    body = [
        "<h1>May it be shipped?</h1>",
        f'<p class="verdict {decision.replace(" ", "-")}">{escape(decision)}</p>',
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in evaluation.verdict.reasons)}</ul>",
        note(f"{sides} {when}, w4a8-convert {__version__}."),
        begin(evaluation),
    ]
    for section in sections(evaluation):
        body += _section(section)
        if section.title == "Speed":
            body += [latencies(title, evaluation.speed[name]) for name, title in _PLOTS.items()]
    if evaluation.missing:
        body += ["<h2>Left out</h2>", *map(note, evaluation.missing)]
    body += ["<h2>Answers</h2>", *_answers(evaluation.compared), review(evaluation)]
    return document(f"w4a8 evaluate: {decision}", "\n".join(part for part in body if part), _CSS + STYLE)


def _place(evaluation: Evaluation, side: Side) -> str:
    place, model = evaluation.places[side], evaluation.models[side]
    return f"{place} (model {model})" if is_url(place) and model else place


def _section(section: Section) -> list[str]:
    return [
        f"<h2>{escape(section.title)}</h2>",
        table(section.header, section.rows),
        note(section.note) if section.note else "",
    ]


def _answers(compared: Iterable[Compared]) -> Iterable[str]:
    """Yield every pair of answers, those that lost most first."""
    for one in sorted(compared, key=_gain):
        before, after = one.answers["baseline"].shown, one.answers["candidate"].shown
        left, right = marked(before, after)
        label = f"prompt {one.prompt.id}" + (f", sample {one.sample}" if one.sample else "")
        tags = f" ({', '.join(one.prompt.tags)})" if one.prompt.tags else ""
        state = "identical" if one.difference is None else f"differ from character {one.difference + 1:,} on"
        opened = " open" if _gain(one) < 0 else ""
        yield (
            f"<details{opened}><summary>{escape(label + tags)}: {state}{escape(_scores(one))}</summary>"
            f'<pre class="text">\n{visible(one.prompt.shown)}</pre><div class="sides">'
            f'<div><h3>baseline</h3><pre class="text">\n{left}</pre></div>'
            f'<div><h3>candidate</h3><pre class="text">\n{right}</pre></div></div>{_checks(one)}</details>'
        )


def _gain(one: Compared) -> float:
    return sum(found.value for found in one.scores["candidate"]) - sum(found.value for found in one.scores["baseline"])


def _scores(one: Compared) -> str:
    if not one.scores["baseline"]:
        return ""
    means = (sum(found.value for found in one.scores[side]) / len(one.scores[side]) for side in one.scores)
    return "; score " + " → ".join(f"{100 * mean:.0f}" for mean in means)


def _checks(one: Compared) -> str:
    rows = [
        (before.type, f"{100 * before.value:.0f}: {before.detail}", f"{100 * after.value:.0f}: {after.detail}")
        for before, after in zip(one.scores["baseline"], one.scores["candidate"], strict=True)
    ]
    return table(("check", "baseline", "candidate"), rows) if rows else ""
