"""Draw roofline.png: which share of the memory's speed each kernel reaches, by the size of the layer.

    python docs/images/roofline.py docs/benchmarks/results/decode.json docs/images/roofline.png [TOKENS ...]

A panel for each number of tokens (1, 16 and 64 unless told otherwise). A layer's time at the memory's speed,
`floor_us`, divided by a kernel's, quantization of the activations included: 100 % is the roof, which no kernel of 4-bit
weights can go beyond.
"""  # noqa: INP001

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

KERNELS = {
    "ours": ("#D55E00", "o", "ours"),
    "ours_bf16": ("#E69F00", "P", "ours, BF16 activations"),
    "cutlass": ("#0072B2", "s", "CUTLASS W4A8"),
    "humming_w4a8": ("#009E73", "D", "humming W4A8"),
    "humming_w4a16": ("#56B4E9", "d", "humming W4A16"),
    "machete": ("#CC79A7", "^", "Machete W4A16"),
    "marlin": ("#000000", "v", "Marlin W4A16"),
}
"""Okabe and Ito's colours, and markers of their own, for those who do not see colours."""


def shares(rows: Sequence[Mapping[str, Any]], kernel: str, tokens: int) -> tuple[list[float], list[float]]:
    """Return the times of layers at the memory's speed, in order, and which share of that a kernel reaches."""
    found = sorted(
        (row["floor_us"], row["floor_us"] / row[f"{kernel}_us"])
        for row in rows
        if row["m"] == tokens and f"{kernel}_us" in row
    )
    return [floor for floor, _ in found], [share for _, share in found]


def main() -> None:
    """Draw the panels that the command line names."""
    results, out, *words = sys.argv[1:]
    rows = json.loads(Path(results).read_text(encoding="utf-8"))["rows"]
    panels = [int(word) for word in words] or [1, 16, 64]
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    layers = {row["floor_us"]: f"{row['n']} × {row['k']}" for row in rows}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, tokens in zip(grid, panels, strict=True):
            for kernel, (color, marker, label) in KERNELS.items():
                floors, reached = shares(rows, kernel, tokens)
                if floors:
                    width = 2.2 if kernel == "ours" else 1
                    axes.plot(floors, reached, marker, color=color, markersize=5, label=label, ls="-", lw=width)
            axes.axhline(1, color="#888888", lw=1)
            axes.set_title(f"{tokens} token{'' if tokens == 1 else 's'}", fontsize=10)
            axes.set_xscale("log")
            axes.set_xticks(
                list(layers), list(layers.values()), fontsize=7.5, rotation=50, ha="right", rotation_mode="anchor"
            )
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            axes.grid(axis="y", color="#e6e6e6")
            axes.set_ylim(0, 1.05)
        grid[0].set_ylabel("share of the memory's speed\n(higher is better)")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KERNELS))
        figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
