"""An evaluation as tables, for a terminal and for a job's summary (Markdown)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert_w4a8.evaluation import divergence
from convert_w4a8.evaluation.answer import SIDES, Side
from convert_w4a8.evaluation.paired import CONFIDENCE
from convert_w4a8.evaluation.results import Evaluation, Measure, losses_by_tag, measure
from convert_w4a8.evaluation.verdict import Group
from convert_w4a8.text import counted, human_bytes, markdown_cell, markdown_table, shortened, table

_LISTED = 20
_CACHED_ALIKE = 0.05
"""How far the shares of prompts in prefix caches may be apart."""
_SPEED = {
    "ttft": ("time to first token", "ms", 1000.0),
    "tpot": ("time per output token", "ms", 1000.0),
    "rate": ("tokens/s", "", 1.0),
}


@dataclass(frozen=True)
class Section:
    """A table with its title, and what is to be said below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def sections(evaluation: Evaluation) -> list[Section]:
    """Return the tables, those that have rows."""
    found = [
        _quality(evaluation),
        _agreement(evaluation),
        _divergences(evaluation),
        _speed(evaluation),
        _length(evaluation),
        _production(evaluation),
        _room(evaluation),
        _failures(evaluation),
    ]
    return [section for section in found if section.rows]


def as_text(evaluation: Evaluation) -> str:
    """Return it for a terminal."""
    parts = [
        f"verdict    {evaluation.verdict.decision}",
        *(f"           {line}" for line in evaluation.verdict.reasons),
    ]
    for section in sections(evaluation):
        parts += ["", section.title, table(section.rows, section.header)]
        parts += [section.note] if section.note else []
    parts += [f"left out   {line}" for line in evaluation.missing]
    return "\n".join(parts)


def as_markdown(evaluation: Evaluation) -> str:
    """Return it for a job's summary."""
    parts = [f"## w4a8 evaluate: {evaluation.verdict.decision}"]
    parts.append("\n".join(f"* {markdown_cell(line)}" for line in evaluation.verdict.reasons))
    for section in sections(evaluation):
        rows = [[markdown_cell(cell) for cell in row] for row in section.rows]
        parts += [f"### {section.title}", markdown_table(section.header, rows, "l" + "r" * (len(section.header) - 1))]
        parts += [markdown_cell(section.note)] if section.note else []
    if evaluation.missing:
        parts += ["### Left out", "\n".join(f"* {markdown_cell(line)}" for line in evaluation.missing)]
    return "\n\n".join(parts) + "\n"


def _quality(evaluation: Evaluation) -> Section:
    rows = [_quality_row(group) for group in evaluation.verdict.groups]
    rated = f" Ratings among the checks: {evaluation.rated}." if evaluation.rated else ""
    return Section(
        "Quality",
        (
            "prompts",
            "verdict",
            "number",
            "baseline",
            "candidate",
            "difference",
            "from",
            "to",
            "may lose",
            "lost : won",
            "p",
        ),
        tuple(rows),
        f"Scores in points of 100; 'from' and 'to' are bounds at {CONFIDENCE:.0%} each. Lost : won: prompts that only"
        f" one side passed; p: exact McNemar.{rated}",
    )


def _quality_row(group: Group) -> tuple[str, ...]:
    return (
        group.name or "all",
        group.decision,
        str(group.prompts),
        f"{100 * group.baseline:.1f}",
        f"{100 * group.candidate:.1f}",
        f"{100 * group.bounds.mean:+.1f}",
        f"{100 * group.bounds.lower:+.1f}",
        f"{100 * group.bounds.upper:+.1f}",
        f"{100 * group.tolerance:g}",
        "-" if group.p is None else f"{group.losses} : {group.wins}",
        "-" if group.p is None else f"{group.p:.3f}",
    )


def _agreement(evaluation: Evaluation) -> Section:
    if evaluation.agreement is None:
        return Section("Agreement", (), ())
    differ = sorted(one.difference for one in evaluation.compared if one.difference is not None)
    rows = [
        ("on both sides", str(len(evaluation.compared))),
        ("identical", f"{evaluation.agreement:.1%}"),
        ("first different character, median of the others", f"{differ[len(differ) // 2] + 1:,}" if differ else "-"),
    ]
    note = "All are the same: is the candidate what it should be?" if evaluation.agreement == 1 else ""
    return Section("Agreement with the baseline", ("answers", ""), tuple(rows), note)


def _divergences(evaluation: Evaluation) -> Section:
    rows = [
        (tag or "all", f"{kl:.5f}", f"{surprise:+.5f}") for tag, (surprise, kl) in losses_by_tag(evaluation).items()
    ]
    return Section(
        "On the baseline's own answers, in nats per token",
        ("prompts", "divergence, at least", "more surprised"),
        tuple(rows),
        f"Teacher-forced; from the {divergence.TOP} most likely tokens of each side.",
    )


def _speed(evaluation: Evaluation) -> Section:
    rows = []
    for name, sides in evaluation.speed.items():
        label, unit, factor = _SPEED[name]
        for place, share in enumerate(("median", "p90", "p99")):
            values = [_at(sides[side], place) for side in SIDES]
            cells = ["-" if value is None else f"{factor * value:,.1f}{unit and ' ' + unit}" for value in values]
            rows.append((f"{label}, {share}", *cells, _ratio(name, values)))
    return Section(
        "Speed",
        ("", *SIDES, "candidate is"),
        tuple(row for row in rows if row[1:3] != ("-", "-")),
        "p90 and p99: what 90 and 99 % of the answers do not exceed, or, of tokens/s, reach at least."
        + _cached_unlike(evaluation),
    )


def _length(evaluation: Evaluation) -> Section:
    """Terse answers, and ones that do not end, are what quantization does to a model first."""
    rows = [
        (label, *("-" if (value := _at(evaluation.length[side], place)) is None else f"{value:,.0f}" for side in SIDES))
        for place, label in enumerate(("tokens, median", "tokens, p90"))
    ]
    cut = (evaluation.cut_off[side] for side in SIDES)
    rows.append(("cut off at max_tokens", *("-" if share is None else f"{share:.1%}" for share in cut)))
    return Section("Length of answers", ("", *SIDES), tuple(row for row in rows if row[1:] != ("-", "-")))


def _production(evaluation: Evaluation) -> Section:
    if not any(one.requests for one in evaluation.production.values()):
        return Section("In production", (), ())
    found = [evaluation.production[side] for side in SIDES]
    took = [measure(one.seconds) for one in found]
    rows = [
        ("requests", *(f"{one.requests:,}" for one in found)),
        ("failed", *(f"{one.failed / one.requests:.2%}" if one.requests else "-" for one in found)),
    ]
    for place, share in enumerate(("median", "p90", "p99")):
        values = [_at(one, place) for one in took]
        rows.append((f"seconds, {share}", *("-" if value is None else f"{value:,.2f}" for value in values)))
    note = "Of all lines of the logs. Failed: no answer, or 5xx; of the candidate also 4xx where the baseline answered."
    return Section("In production", ("", *SIDES), tuple(rows), note)


def _prefix_share(evaluation: Evaluation, side: Side) -> float | None:
    """Return the share of the prompts' tokens that the prefix cache of a side had."""
    room = evaluation.room.get(side, {})
    queries, hits = room.get("prefix_queries"), room.get("prefix_hits")
    return hits / queries if queries and hits is not None else None


def _cached_unlike(evaluation: Evaluation) -> str:
    """Return what is wrong with times from the request on, where one side had more of the prompts in its cache."""
    before, after = (_prefix_share(evaluation, side) for side in SIDES)
    if before is None or after is None or abs(before - after) <= _CACHED_ALIKE:
        return ""
    return (
        f" Times to the first token and tokens/s do not compare: prefix caches had {before:.0%} of the baseline's"
        f" prompts and {after:.0%} of the candidate's. Start both servers anew."
    )


def _at(measure: Measure, place: int) -> float | None:
    return None if measure.percentiles is None else measure.percentiles[place]


def _ratio(name: str, values: Sequence[float | None]) -> str:
    before, after = values
    if not before or not after:
        return "-"
    return f"{(after / before if name == 'rate' else before / after):.2f} × as fast"


def _room(evaluation: Evaluation) -> Section:
    rows: list[tuple[str, ...]] = []
    room, predicted = evaluation.room, evaluation.predicted
    for label, found, key, show in (
        ("KV cache, tokens that fit", room, "kv_tokens", "{:,}"),
        ("KV cache, largest share in use", room, "kv_usage", "{:.1%}"),
        ("preemptions", room, "preemptions", "{:,}"),
    ):
        _add(rows, label, found, key, show.format)
    shares = [_prefix_share(evaluation, side) for side in SIDES]
    if shares != [None, None]:
        cells = ("-" if share is None else f"{share:.1%}" for share in shares)
        rows.append(("tokens of prompts that the prefix cache had", *cells))
    _add(rows, "weights on the disk", predicted, "weight_bytes", human_bytes)
    _add(rows, "KV cache of a token in BF16, predicted", predicted, "kv_bytes_per_token", human_bytes)
    before, after = (predicted.get(side, {}).get("weight_bytes") for side in SIDES)
    per_token = predicted.get("candidate", {}).get("kv_bytes_per_token")
    if before is not None and after is not None and per_token:
        rows.append(("more tokens that fit, predicted", "", f"{(before - after) // per_token:+,}"))
    return Section(
        "Room",
        ("", *SIDES),
        tuple(rows),
        "Predicted: by w4a8 report's memory arithmetic." if before or after else "",
    )


def _add(rows: list[tuple[str, ...]], label: str, found: Mapping[Side, Mapping[str, Any]], key: str, show: Any) -> None:
    values = [found.get(side, {}).get(key) for side in SIDES]
    if values != [None, None]:
        rows.append((label, *("-" if value is None else show(value) for value in values)))


def _failures(evaluation: Evaluation) -> Section:
    """List failures that are alike as one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for answer in evaluation.failures:
        alike.setdefault((answer.side, str(answer.failure)), []).append(answer.prompt)
    rows = [(side, str(len(prompts)), shortened(prompts), failure) for (side, failure), prompts in alike.items()]
    more = f"{counted(len(rows) - _LISTED, 'more kind')} of failures." if len(rows) > _LISTED else ""
    return Section("Failures", ("of", "answers", "prompts", "failure"), tuple(rows[:_LISTED]), more)
