#!/usr/bin/env python3
"""Write the tables of the documents from the figures in docs/benchmarks/results, or check that they are current.

    python scripts/bench/tables.py          # write them
    python scripts/bench/tables.py --check  # write nothing; exit with 1 and name each table that is not current

A table NAME stands between the lines `<!-- table: NAME -->` and `<!-- end -->`: the question, a line for each row of
NAME.json, the run's note if it has one, where it was measured, and the command, after those that prepare it.
columns/ says which columns, in which order, and with how many digits: a module for each document.
"""

import argparse
import json
import re
import string
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from results import RESULTS, ROOT, line
from table_columns import COLUMNS, Columns

MARKED = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


class CellFormatter(string.Formatter):
    """Formats as COLUMNS says."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format one value: text as it is, a number with a true minus sign and a space before its percent sign."""
        if isinstance(value, str):
            return value
        if format_spec == "~":
            format_spec = ".0f" if abs(value) >= 100 else ".1f" if abs(value) >= 10 else ".2f"
        elif format_spec == "~%":
            format_spec = ".0%" if abs(value) >= 0.1 else ".2%"
        return str(format(value, format_spec)).replace("-", "−").replace("%", " %")


def cell(template: str, row: Mapping[str, Any]) -> str:
    """Return the contents of one cell."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return "" if any(row.get(name) is None for name in names) else CellFormatter().vformat(template, (), row)


def table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table. What repeats in the first column is left out."""
    rule = ("---:" if ":" in template else "---" for _, template in columns)
    lines = [f"| {' | '.join(heading for heading, _ in columns)} |", f"|{'|'.join(rule)}|"]
    previous = None
    for row in rows:
        first, *others = (cell(template, row) for _, template in columns)
        lines.append(f"| {' | '.join(['' if first == previous else first, *others])} |")
        previous = first
    return lines


def render(name: str, document: Mapping[str, Any]) -> str:
    """Return what stands between the two markers of a table."""
    lines = ["", f"**{document['question']}**", "", *table(COLUMNS[name], document["rows"]), ""]
    for text in filter(None, [document.get("note"), line(document)]):
        lines += [*textwrap.wrap(text, 120, break_on_hyphens=False), ""]
    commands = "\n".join(filter(None, [document.get("setup"), document["command"]])).splitlines()
    lines += [*(f"    {command}" for command in commands), ""]
    return "".join(f"{text}\n" for text in lines)


def problems_of_names(used: Sequence[str]) -> list[str]:
    """Return what is wrong with the names that the documents use: each has one file, columns, and one place."""
    kept = {path.stem for path in RESULTS.glob("*.json")}
    return [
        *(f"{name}: no {name}.json in docs/benchmarks/results" for name in sorted({*used} - kept)),
        *(f"{name}: no columns in scripts/bench/columns" for name in sorted({*used} - {*COLUMNS})),
        *(f"{name}: columns in scripts/bench/columns, but no table" for name in sorted({*COLUMNS} - {*used})),
        *(f"{name}: in docs/benchmarks/results, but in no document" for name in sorted(kept - {*used})),
        *(f"{name}: more than one table" for name in sorted({name for name in used if used.count(name) > 1})),
    ]


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is not current")
    args = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    problems = problems_of_names([name for text in texts.values() for name, _ in MARKED.findall(text)])
    stale: list[str] = []

    def replace(match: re.Match[str]) -> str:
        file = RESULTS / f"{match[1]}.json"
        if not file.is_file() or match[1] not in COLUMNS:
            return match[0]
        current = render(match[1], json.loads(file.read_text(encoding="utf-8")))
        if current != match[2]:
            stale.append(match[1])
        return f"<!-- table: {match[1]} -->\n{current}<!-- end -->"

    for path, text in texts.items():
        replaced = MARKED.sub(replace, text)
        if replaced != text and not args.check:
            path.write_text(replaced, encoding="utf-8")
    if args.check:
        problems += [f"{name}: not current; run scripts/bench/tables.py" for name in stale]
    else:
        print(f"written: {', '.join(stale) or 'nothing, all tables were current'}")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
