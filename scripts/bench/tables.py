#!/usr/bin/env python3
"""Write the tables of the documents from the figures in docs/benchmarks/results, or check that they are current.

    python scripts/bench/tables.py          # write them
    python scripts/bench/tables.py --check  # write nothing; exit with 1 and name each table that is not current

A table NAME stands between the lines `<!-- table: NAME -->` and `<!-- end -->`: the question, a line for each row of
NAME.json, the run's note if it has one, where it was measured, and the command, after those that prepare it. COLUMNS
says which columns, in which order, and with how many digits.
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

Columns = tuple[tuple[str, str], ...]
"""Heading and contents: a template of `str.format` over the keys of a row. Formats beside Python's are `~`, three
digits or so, and `~%`, the same in percent. A cell is empty where the row lacks a key. Text stands as it is, also
where a number is expected: a range, or fewer digits than the format would print."""

COPY: Columns = (
    ("wall s", "{wall_s:.2f}"),
    ("CPU s", "{cpu_s:.2f}"),
    ("peak MiB", "{rss_mib:.0f}"),
    ("MB/s", "{mb_per_s:.0f}"),
    ("wall / cp", "{wall_to_cp:.2f}"),
    ("wall / cp on the disk", "{wall_to_durable_cp:.2f}"),
)
CONVERSION: Columns = (("input", "{input}"), ("contender", "{contender}"), *COPY)
PERPLEXITY: Columns = (
    ("scheme", "{scheme}"),
    ("activations", "{activations}"),
    ("SQNR dB", "{sqnr_db:.1f}"),
    ("perplexity", "{perplexity:.3f}"),
    ("Δ nats/token", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
    ("divergence", "{divergence:.5f}"),
    ("accuracy, of W4A16's", "{relative_accuracy:.2%}"),
    ("same next token", "{agreement:.2%}"),
)
VLLM_PERPLEXITY: Columns = (
    ("checkpoint", "{checkpoint}"),
    ("perplexity", "{perplexity:.4f}"),
    ("nats/token over W4A16", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
    ("next-token accuracy, of W4A16's", "{relative_accuracy:.2%}"),
)
VERDICTS: Columns = (
    ("drop", "{drop:.0%}"),
    ("prompts", "{prompts:d}"),
    ("ship", "{ship:.1%}"),
    ("do not ship", "{do_not_ship:.1%}"),
    ("cannot tell", "{cannot_tell:.1%}"),
    ("right", "{right:.1%}"),
    ("wrong", "{wrong:.1%}"),
    ("decided by more", "{decided:.0%}"),
)
SERVING: Columns = (
    ("served as", "{kind}"),
    ("requests", "{batch:d}"),
    ("prompt", "{prompt:d}"),
    ("TTFT ms", "{ttft_ms:.2f}"),
    ("fastest tenth", "{ttft_p10_ms:.2f}"),
    ("prefill ms", "{prefill_ms:.1f}"),
    ("TPOT ms", "{tpot_ms:.2f}"),
    ("step ms", "{step_ms:.2f}"),
    ("tokens/s", "{tokens_per_s:.0f}"),
    ("TTFT: more than W4A16", "{ttft_gain:+.0%}"),
    ("TPOT", "{tpot_gain:+.0%}"),
    ("step", "{step_gain:+.0%}"),
    ("tokens/s", "{throughput_gain:+.0%}"),
)
CODEBOOKS: Columns = (
    ("model", "{model}"),
    ("preset", "{kind}"),
    ("matrices", "{matrices}"),
    ("N × K", "{shape}"),
    ("million weights", "{million_weights:.1f}"),
)
DIVERGENCE: Columns = (
    ("weights", "{weights}"),
    ("form", "{kind}"),
    ("activations", "{activations}"),
    ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
    ("less the closest W4A16's", "{kl_difference:+.5f} ± {kl_difference_standard_error:.5f}"),
    ("perplexity", "{perplexity:.3f}"),
    ("same next token", "{agreement:.2%}"),
)
COLUMNS: dict[str, Columns] = {
    "codebooks": (*CODEBOOKS, ("CPU s", "{cpu_s:.2f}"), ("CPU s a million weights", "{cpu_per_million:.2f}")),
    "codebooks-gpu": (
        *CODEBOOKS,
        ("factoring s", "{moment_s:.2f}"),
        ("codebooks s", "{matrix_s:.2f}"),
        ("s a million weights", "{seconds_per_million:.4f}"),
        ("all blocks, minutes", "{model_minutes:.1f}"),
        ("GPU memory GiB", "{gpu_gib:.1f}"),
    ),
    "conversion": CONVERSION,
    "conversion-without-rest": CONVERSION,
    "conversion-sizes": (("GB", "{gigabytes:g}"), ("contender", "{contender}"), *COPY),
    "conversion-new-codes": (*CONVERSION[:5], ("times as fast as 1 worker", "{times_peer:.1f}")),
    "conversion-peer": (*CONVERSION[:5], ("times as fast as 1 worker", "{times_peer:.1f}")),
    "conversion-gpu": (*CONVERSION[:3], CONVERSION[5]),
    "conversion-gpu-new-codes": CONVERSION[:3],
    "conversion-new-codes-16-cores": CONVERSION[:3],
    "startup": (
        ("command", "`{command}`"),
        ("wall s", "{wall_s:.2f}"),
        ("CPU s", "{cpu_s:.2f}"),
        ("peak MiB", "{rss_mib:.0f}"),
    ),
    "requantize-gpu": (
        ("N × K", "{n} × {k}"),
        ("scales", "{scales}"),
        ("our kernels ms", "{ms:.1f}"),
        ("torch's operations ms", "{reference_ms:.1f}"),
        ("times as fast", "{times:.1f}"),
        ("the same, codes kept ms", "{codes_kept_ms:.1f}"),
        ("copies of the codes ms", "{copies_ms:.1f}"),
    ),
    "perplexity-gptq": PERPLEXITY,
    "perplexity-gptq-fp8": PERPLEXITY,
    "perplexity-awq": PERPLEXITY,
    "perplexity-vllm-gptq": VLLM_PERPLEXITY,
    "perplexity-vllm-awq": VLLM_PERPLEXITY,
    "kl": DIVERGENCE,
    "kl-vllm": DIVERGENCE,
    "kl-presets": (
        ("preset", "{weights}"),
        ("divergence from BF16", "{kl:.5f} ± {kl_standard_error:.5f}"),
        ("perplexity", "{perplexity:.3f}"),
        ("same next token", "{agreement:.2%}"),
    ),
    "sources-served": (
        ("source", "{source}"),
        ("converted to", "`{format}`"),
        ("nats/token over the source", "{nats_per_token:+.4f} ± {nats_standard_error:.4f}"),
        ("likeliest token the same", "{agreement:.1%}"),
    ),
    "decode": (
        ("N × K", "{n} × {k}"),
        ("tokens", "{m}"),
        ("memory µs", "{floor_us:.1f}"),
        ("ours µs", "{ours_us:.1f}"),
        ("ours, BF16 in", "{ours_bf16_us:.1f}"),
        ("CUTLASS W4A8", "{cutlass_us:.1f}"),
        ("humming W4A8", "{humming_w4a8_us:.1f}"),
        ("humming W4A16", "{humming_w4a16_us:.1f}"),
        ("Machete W4A16", "{machete_us:.1f}"),
        ("Marlin W4A16", "{marlin_us:.1f}"),
        ("BF16", "{bf16_us:.1f}"),
        ("ours does more than the best", "{gain:+.0%}"),
        ("FP8 in: ours", "{ours_before_us:.1f}"),
        ("CUTLASS", "{cutlass_before_us:.1f}"),
        ("humming", "{humming_w4a8_before_us:.1f}"),
        ("our error", "{ours_error:.4f}"),
    ),
    "experts": (
        ("mixture", "{mixture}"),
        ("tokens", "{m}"),
        ("memory µs", "{floor_us:.1f}"),
        ("ours µs", "{ours_us:.1f}"),
        ("CUTLASS W4A8", "{cutlass_us:.1f}"),
        ("Marlin W4A16", "{marlin_us:.1f}"),
        ("BF16", "{bf16_us:.1f}"),
        ("ours does more than the best", "{faster:+.0%}"),
    ),
    "perplexity-decode": (
        ("checkpoint", "{checkpoint}"),
        ("by", "{path}"),
        ("activations", "{activations}"),
        ("perplexity", "{perplexity:.4f}"),
        ("nats/token over W4A16 by prefill", "{nats_per_token:+.5f} ± {nats_standard_error:.5f}"),
        ("over the same by prefill", "{nats_over_prefill:+.5f} ± {nats_over_prefill_standard_error:.5f}"),
    ),
    "serving": SERVING,
    "serving-h200": SERVING,
    "load-time": (
        ("model", "{model}"),
        ("what", "{what}"),
        ("stock ms", "{stock_ms:~}"),
        ("plugin ms", "{plugin_ms:~}"),
        ("without its decode kernel ms", "{without_ms:~}"),
        ("plugin / stock", "{ratio:~%}"),
    ),
    "equality": (
        ("model", "{model}"),
        ("mode", "`{mode}`"),
        ("compared", "{what}"),
        ("prompt log-probs equal", "{prompt_logprobs_equal} of {prompt_logprobs}"),
        ("greedy tokens equal", "{tokens_equal} of {tokens}"),
    ),
    "tensor-parallel": (
        ("model", "{model}"),
        ("mode", "`{mode}`"),
        ("compared", "{what}"),
        ("mean gap", "{mean_gap:#.3g}"),
    ),
    "architectures": (
        ("architecture", "`{architecture}`"),
        ("INT4 layers", "{layers:.0f}"),
        ("`lut`, `search`", "{lut_search}"),
        ("`lut`, `direct`", "{lut_direct}"),
        ("`compressed-tensors`", "{compressed_tensors_search}"),
        ("why", "{why}"),
    ),
    "verdict-power": VERDICTS,
    "verdict-power-graded": VERDICTS,
    "repacking-gpu": (
        ("kernel", "`{kernel}`"),
        ("from", "{packing}"),
        ("N × K", "{n} × {k}"),
        ("GB/s", "{gb_s:.0f}"),
        ("of a copy", "{of_copy:.0%}"),
    ),
}
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
        *(f"{name}: no columns in scripts/bench/tables.py" for name in sorted({*used} - {*COLUMNS})),
        *(f"{name}: columns in scripts/bench/tables.py, but no table" for name in sorted({*COLUMNS} - {*used})),
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
