"""Draw modes.png, the README's picture: the error that each scale mode leaves in the weights, layer by layer.

    for scales in reference search direct; do
        w4a8-convert IN OUT-$scales --scales $scales
        w4a8 report OUT-$scales --source IN --json > $scales.json
    done
    python docs/images/modes.py modes.png 'TITLE' reference.json search.json direct.json ['TITLE' ...]

A panel for each title and the three reports behind it. IN was llama-31m-gptq, then llama-31m-awq-zp.
"""  # noqa: INP001

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

MODES = {
    "reference": ("#0072B2", "s", "reference: what vLLM computes at load"),
    "search": ("#E69F00", "o", "search: the default"),
    "direct": ("#009E73", "D", "direct: stored tables"),
}
"""Okabe and Ito's colours, and markers of their own, for those who do not see colours."""


def errors(report: Path) -> list[float]:
    """Return the relative error of each layer's weights: 10^(−SQNR/20)."""
    layers = json.loads(report.read_text(encoding="utf-8"))["layers"]
    return [10 ** (-layer["sqnr_db"]["output"] / 20) for layer in layers]


def main() -> None:
    """Draw the panels that the command line names."""
    out, *panels = sys.argv[1:]
    titles = panels[::4]
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        grid = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        top = 0.0
        for axes, title, *reports in zip(grid, titles, panels[1::4], panels[2::4], panels[3::4], strict=True):
            for (color, marker, label), report in zip(MODES.values(), reports, strict=True):
                layers = errors(Path(report))
                axes.plot(layers, marker, color=color, markersize=4.5, label=label)
                top = max(top, *layers)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("layer")
            axes.set_xticks([])
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
            axes.grid(axis="y", color="#e6e6e6")
        grid[0].set_ylim(0, 1.05 * top)
        grid[0].set_ylabel("error of the weights\n(lower is better)")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
