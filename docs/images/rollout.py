"""Draw rollout.png: which way requests, copies and metrics take in docs/guides/rollout.

python docs/images/rollout.py docs/images/rollout.png
"""  # noqa: INP001

import sys
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BASELINE, CANDIDATE, GREY, DARK = "#0072B2", "#D55E00", "#777777", "#222222"
"""Okabe and Ito's colours; lines differ in style, too."""


@dataclass(frozen=True)
class Box:
    """A rectangle around its middle, with a title and what is in it."""

    x: float
    y: float
    width: float
    height: float
    title: str
    text: str = ""
    color: str = GREY

    def draw(self, axes: Axes) -> None:
        """Draw it."""
        corner = (self.x - self.width / 2, self.y - self.height / 2)
        axes.add_patch(
            FancyBboxPatch(
                corner, self.width, self.height, "round,pad=0,rounding_size=0.12", fc="white", ec=self.color, lw=1.8
            )
        )
        above = 0.17 * self.text.count("\n") + 0.19 if self.text else 0
        axes.text(
            self.x, self.y + above, self.title, ha="center", va="center", weight="bold", color=DARK, fontsize=10.5
        )
        axes.text(
            self.x, self.y - 0.15, self.text, ha="center", va="center", color=DARK, fontsize=8.5, linespacing=1.45
        )


@dataclass(frozen=True)
class Arrow:
    """From one point to another. at: where its label is."""

    start: tuple[float, float]
    end: tuple[float, float]
    label: str
    at: tuple[float, float]
    color: str = GREY
    style: str = "-"

    def draw(self, axes: Axes) -> None:
        """Draw it."""
        axes.add_patch(
            FancyArrowPatch(
                self.start, self.end, arrowstyle="-|>", mutation_scale=14, lw=1.8, ls=self.style, color=self.color
            )
        )
        axes.text(*self.at, self.label, ha="center", va="center", fontsize=8.5, color=self.color, linespacing=1.35)


BOXES = (
    Box(1.0, 4.0, 1.6, 1.0, "clients", "OpenAI's API"),
    Box(
        4.6,
        4.0,
        2.5,
        2.6,
        "nginx",
        "caps max_tokens\nsplits by client\ncopies a sample\n\nno file go: all\nto the baseline",
        DARK,
    ),
    Box(9.3, 5.0, 2.2, 1.0, "baseline", "what serves now", BASELINE),
    Box(9.3, 2.6, 2.2, 1.0, "candidate", "W4A8", CANDIDATE),
    Box(12.9, 3.8, 1.9, 1.3, "Prometheus", "side by side,\nalerts"),
    Box(4.6, 0.75, 2.5, 0.9, "shadow log", "both sides of a copied request"),
    Box(9.3, 0.75, 2.2, 0.9, "w4a8 evaluate", "--logs: verdict"),
)
ARROWS = (
    Arrow((1.8, 4.0), (3.35, 4.0), "requests,\nstreams", (2.57, 4.4)),
    Arrow((5.85, 4.6), (8.2, 5.0), "the others", (7.0, 5.1), BASELINE),
    Arrow((5.85, 4.0), (8.2, 2.95), "canary: a share\nof the clients", (7.55, 3.85), CANDIDATE),
    Arrow(
        (5.85, 3.2),
        (8.2, 2.45),
        "shadow: copies of a\nshare of the baseline's\nrequests; answers\nthrown away",
        (6.65, 2.2),
        CANDIDATE,
        (0, (4, 3)),
    ),  # type: ignore[arg-type]
    Arrow((10.4, 4.9), (11.95, 4.15), "/metrics", (11.4, 4.75)),
    Arrow((10.4, 2.7), (11.95, 3.45), "/metrics", (11.4, 2.85)),
    Arrow((4.6, 2.7), (4.6, 1.2), "", (4.6, 2.0)),
    Arrow((5.85, 0.75), (8.2, 0.75), "asks both again", (7.0, 0.98)),
)


def main() -> None:
    """Write the picture to the path that the command line names."""
    figure = Figure(figsize=(11.2, 4.9), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, 14)
    axes.set_ylim(0.1, 5.8)
    axes.set_aspect("equal")
    axes.axis("off")
    for shape in (*ARROWS, *BOXES):
        shape.draw(axes)
    figure.savefig(sys.argv[1], dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
